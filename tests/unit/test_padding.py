"""Padding in the middle of a sequence is said where it counts as tokens."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import load, make_tiny, save_tiny, tokens

import kvfold

FORMS = {
    "recency": {"length": {"method": "recency", "kept": 0.5, "sinks": 2, "newest": 3}, "context_len": 40},
    "recent": {"bits": {"method": "integer"}, "length": {"method": "recent", "tokens": 8}},
    "plain": {"bits": {"method": "integer"}},
}


def folded(tmp_path, form):
    source = save_tiny(make_tiny("llama_mha"), tmp_path / "source")
    recipe = {"model": str(source), "out": str(tmp_path / "out"), "width": {"method": "identity"}} | FORMS[form]
    return load(
        kvfold.compress(recipe | {"calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}, device="cpu").out
    )


@pytest.mark.parametrize("form", FORMS)
def test_holes_are_said_and_other_padding_is_not(tmp_path, form):
    network, ids = folded(tmp_path, form), tokens(2, 12)
    whole = torch.ones_like(ids)
    front, behind, hole = whole.clone(), whole.clone(), whole.clone()
    front[0, :4], behind[0, 9:], hole[0, 5:8] = 0, 0, 0
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for mask in (None, whole, front, behind, hole.bool() if form == "plain" else front.bool()):
            network(ids, attention_mask=mask)
    if form != "plain":
        with pytest.warns(UserWarning, match="between a sequence's tokens"), torch.no_grad():
            network(ids, attention_mask=hole)
