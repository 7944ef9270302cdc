"""Heads that keep different tokens: whatever the steps in which tokens come, a query sees the same ones."""

from __future__ import annotations

import pytest
import torch
from tiny import FULL_ATTENTION, MODELS, load, logits, step, tokens

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

FORMS = {
    "plain": ({"method": "identity"}, {"method": "identity"}),
    "int4": ({"method": "identity"}, {"method": "integer"}),
    "latents": (
        {"method": "svd_a", "latent": "group", "v_latent": "group", "group_size": 1, "multiple": 4},
        {"method": "identity"},
    ),
}
WINDOWED = ("mistral_window",)
"""All layers forget by themselves."""
CASES = [pytest.param(model, form, id=f"{form}-{model}") for form in FORMS for model in MODELS if model not in WINDOWED]
every_form = pytest.mark.parametrize(("model", "form"), CASES)


LENGTH = {"method": "recency", "kept": 0.6, "sinks": 2, "newest": 3}
CONTEXT = 40


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    root, done = tmp_path_factory.mktemp("runs"), {}

    def run(model, form="plain", **length):
        key = model, form, *length.items()
        if key not in done:
            width, bits = FORMS[form]
            fields = {"model": str(tiny_dir / model), "out": str(root / f"{len(done)}"), "width": width, "bits": bits}
            fields |= {"kv_budget": 0.45 if form == "latents" else None, "context_len": CONTEXT}
            fields |= {"length": LENGTH | length, "calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}
            done[key] = kvfold.compress(make_recipe(fields), run_dir=root / "run", device="cpu")
        return done[key]

    return run


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_cached_equals_uncached(fold, model, form, monkeypatch):
    """In float64, where codes do not depend on how a product was rounded; long prompts pass through in pieces."""
    monkeypatch.setattr("kvfold.runtimes.transformers.head_runs.RUN_BLOCK", 9)
    monkeypatch.setattr("kvfold.runtimes.kernels.head_runs.QUERIES_AT_ONCE", 11)
    folded = fold(model, form)
    network, ids = load(folded.out, dtype=torch.float64), tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :23] = mask[2, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = network(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    seen = mask.bool()
    for cuts in ([*range(1, 61)], [37, *range(38, 61)], [8, 20, 45, 60], [60]):
        cache, start, out = FoldedCache(folded.plan), 0, []
        for end in cuts:
            out.append(step(network, ids, mask, positions, cache, start, end))
            start = end
        assert_close(torch.cat(out, 1)[seen], expected[seen], tolerance=1e-3, name=f"cuts {cuts[:3]}")
    for row, begin in ((0, 23), (1, 0)):
        with torch.no_grad():
            alone = network(ids[row : row + 1, begin:]).logits
        assert_close(expected[row : row + 1, begin:], alone, tolerance=1e-3, name=f"row {row} alone")
    if model in FULL_ATTENTION:
        cache = FoldedCache(folded.plan)
        step(network, ids, mask, positions, cache, 0, 50)
        cache.activate_past_recording()
        step(network, ids.flip(1), mask, positions, cache, 50, 56)
        cache.crop(-6)
        again = step(network, ids, mask, positions, cache, 50, 60)
        assert_close(again[seen[:, 50:]], expected[:, 50:][seen[:, 50:]], tolerance=1e-3)


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_real_bytes_are_planned_bytes(fold, model, form):
    plan = fold(model, form).plan
    network, cache, ids = load(fold(model, form).out), FoldedCache(plan), tokens(2, 400)
    assert plan.drops_tokens and plan.context_len == CONTEXT
    with torch.no_grad():
        for start, end in ((0, 3), (3, 37), (37, 38), (38, 350), *((i, i + 1) for i in range(350, 354))):
            network(ids[:, start:end], past_key_values=cache)
            assert cache.nbytes_allocated == plan.kv_bytes(end, batch_size=2)


@pytest.mark.parametrize("model", FULL_ATTENTION)
def test_everything_kept_is_the_original(fold, tiny_dir, model):
    kept = fold(model, kept=1.0)
    assert torch.equal(logits(load(kept.out), tokens()), logits(load(tiny_dir / model), tokens()))
    assert kept.plan.kv_budget == 1


@pytest.mark.parametrize("sharing", ["equal", "classes", "measured"])
def test_the_mean_over_heads_is_what_was_asked_for(fold, sharing):
    plan = fold("llama_mha", sharing=sharing).plan
    assert 0.5 < plan.kv_budget <= 0.601
    sizes = {run.kept(CONTEXT) for spec in plan.owned for run in spec.tokens.runs}
    assert sizes == {24} if sharing == "equal" else min(sizes) == 5 and max(sizes) == CONTEXT
    if sharing == "classes":
        assert len(sizes) <= 3  # one head gets what is left
