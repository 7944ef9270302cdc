"""Folds of quantized checkpoints, loaded by transformers with its own quantizer (compressed-tensors comes with vLLM)."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import load, logits, tokens

from kvfold.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_quantized_weights import fold, quantized


@pytest.mark.parametrize("form", ["w4a16", "w4a16_zeros", "fp8_rows"])
def test_transformers_loads_the_fold(tmp_path, form):
    """The MLP by its quantizer, attention by kvfold: the logits of the same fold of what the codes mean."""
    source, plain = quantized(tmp_path, form)
    out, expected = (
        fold(folder, tmp_path / name, preset="int4") for folder, name in ((source, "out"), (plain, "expected"))
    )
    found = load(out, dtype=torch.float32)
    assert type(found).__name__ == "KvfoldLlamaForCausalLM"
    assert_close(logits(found, tokens()), logits(load(expected), tokens()), tolerance=2e-2)
