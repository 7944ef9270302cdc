"""Answers much longer than their prompt: caches stay within the plan's bytes, and what they hold is what a plan says."""

from __future__ import annotations

import pytest
import torch
from dropped import folds
from tiny import load, tokens

from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

LENGTH = {"kept": 0.5, "sinks": 2, "newest": 3}
ANSWER, PROMPT = 4096, 40


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    return folds(tiny_dir, tmp_path_factory.mktemp("long"), LENGTH)


@pytest.mark.parametrize(
    ("form", "length"),
    [
        ("plain", {"method": "recency", "grows": False, "sharing": "equal"}),
        pytest.param("int4", {"method": "scored", "rule": "observed", "grows": False}, marks=pytest.mark.rare),
        pytest.param("int4", {"method": "recency"}, marks=pytest.mark.rare),
        pytest.param("plain", {"method": "scored", "rule": "observed"}, marks=pytest.mark.rare),
    ],
    ids=str,
)
def test_bytes_of_a_long_answer(fold, form, length):
    """4,096 tokens behind a prompt, greedily."""
    folded = fold("llama_mha", form, **length)
    network, cache, plan = load(folded.out), FoldedCache(folded.plan), folded.plan
    said = tokens(1, PROMPT)
    with torch.no_grad():
        for step in range(ANSWER):
            said = network(said, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            assert cache.nbytes_allocated <= plan.kv_bytes(PROMPT + step), step
            assert cache.nbytes <= cache.nbytes_allocated
    whole = plan.source_kv_bytes(PROMPT + ANSWER)
    assert cache.nbytes_allocated == plan.kv_bytes(PROMPT + ANSWER - 1)
    bounded = length.get("sharing") == "equal"  # where no head keeps every token
    assert cache.nbytes_allocated < whole * (0.03 if bounded else 0.6)


def test_a_window_of_one_size_forgets_what_came_before(fold):
    """A token that is answered long after another prompt was read depends on that prompt through its first tokens only."""
    folded = fold("llama_mha", method="recency", grows=False, sharing="equal")
    network, ids = load(folded.out, dtype=torch.float64), tokens(2, 400)
    ids[1, :2], ids[1, 200:] = ids[0, :2], ids[0, 200:]  # three layers reach 3 times 20 tokens back
    cache = FoldedCache(folded.plan)
    with torch.no_grad():
        for piece in ids.split(50, dim=1):
            found = network(piece, past_key_values=cache).logits
    assert_close(found[0], found[1], tolerance=1e-9)
