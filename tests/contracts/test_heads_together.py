"""Heads of several runs that are scored together, beside each run by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dropped import folds
from tiny import in_steps, load, tokens

from kvfold import registry
from kvfold.plan.token_runs import TokenRun
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

RULES = registry.names("scorers")
LENGTH = {"method": "scored", "kept": 0.6, "sinks": 2, "newest": 3}
CUTS = [58, *range(59, 67)]


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    return folds(tiny_dir, tmp_path_factory.mktemp("together"), LENGTH)


@pytest.mark.parametrize("rule", [*RULES, "matched"])
@pytest.mark.parametrize("model", ["llama_mha", "qwen2_bias_tied"])
def test_heads_that_are_asked_together_say_what_each_run_says(fold, monkeypatch, model, rule):
    """Of a batch with padding too; runs whose heads lie between each other's."""
    named = {"rule": "observed", "matched": True} if rule == "matched" else {"rule": rule}
    folded, ids = fold(model, kept=0.5, **named), tokens(2, 66)
    spec = folded.plan.owned[0]
    K = spec.num_kv_heads
    parts = (tuple(range(0, K, 2)), tuple(range(1, K, 2)))
    runs = tuple(TokenRun(heads=heads, share=0.3 + 0.3 * i, least=8) for i, heads in enumerate(parts))
    caches = (dataclasses.replace(x, tokens=dataclasses.replace(x.tokens, runs=runs)) for x in folded.plan.caches)
    plan, network = dataclasses.replace(folded.plan, caches=tuple(caches)), load(folded.out)
    for padding in (0, 9):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        given = network, ids, mask, positions
        together = in_steps(*given, FoldedCache(plan), CUTS)
        monkeypatch.setattr("kvfold.runtimes.transformers.head_runs.TOGETHER", 0)
        apart = in_steps(*given, FoldedCache(plan), CUTS)
        monkeypatch.undo()
        assert_close(together[mask.bool()], apart[mask.bool()], tolerance=1e-4)
