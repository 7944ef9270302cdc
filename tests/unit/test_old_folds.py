"""Folders that an earlier kvfold wrote still load, and say the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvfold.checkpoint.source import load_plan
from kvfold.testing import assert_close

FOLDS = sorted((Path(__file__).parents[1] / "data" / "folds-before-rooms").iterdir())
"""Made at commit f189c9c, when all modules lay in one folder, from four random layers (24 tokens of 48)."""


@pytest.mark.parametrize("folder", FOLDS, ids=lambda f: f.name)
def test_an_old_fold_gives_the_same_logits(folder):
    expected = load_file(folder / "expected.safetensors")
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert_close(network(expected["ids"]).logits, expected["logits"])
    assert load_plan(folder)[1]
