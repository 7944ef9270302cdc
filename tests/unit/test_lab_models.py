"""The committed lab models: they load in stock transformers and have the loss that their cards state."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
MODELS = sorted(path.parent for path in (ROOT / "lab" / "models").glob("*/model.safetensors"))
SLICE = "tests/data/books-valid-slice.txt"


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_the_card_states_the_loss(folder):
    sys.path.insert(0, str(ROOT / "lab"))
    from pretrain import validate

    stated = re.search(rf"\| {SLICE} \(all of it\) \| ([\d.]+) \|", (folder / "README.md").read_text())
    assert stated, "the card has no loss on the slice that tests can see"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert validate(model, ROOT / SLICE, 256) == pytest.approx(float(stated[1]), abs=2e-3)
    assert (folder / "model.safetensors").stat().st_size <= 12e6


def test_all_committed_models_together_are_small():
    assert MODELS and sum((folder / "model.safetensors").stat().st_size for folder in MODELS) <= 40e6
