"""Bytes that could be saved by fewer tokens or by less of each: whichever is expected to lose less."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import make_tiny, save_tiny

import kvfold
from kvfold.compression.presets import PRESETS
from kvfold.compression.recipe import make_recipe
from kvfold.compression.share_tokens import SHARES_TRIED, best_of_shares, lost_by_shapes, lost_by_tokens
from kvfold.errors import BudgetError, RecipeError
from kvfold.plan.cache_spec import SourceLayer
from kvfold.plan.plan import source_plan
from kvfold.plan.token_runs import TokenRun, TokenRuns

DROP = ("recency", "scored", "foreseen")
LENGTH = {"method": "recency", "sinks": 2, "newest": 3}
FISHER = {"method": "fisher", "latent": "group", "v_latent": "group", "group_size": 1, "multiple": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(make_tiny("llama_yarn"), tmp_path_factory.mktemp("model"))


def recipe(folder, out, **fields):
    made = {"model": str(folder), "out": str(out), "width": FISHER, "bits": {"method": "mixed"}, "allocate": "greedy"}
    made |= {"length": LENGTH, "context_len": 200, "calibration": {"data": "self", "num_samples": 4, "seq_len": 64}}
    return make_recipe(made | fields)


DROPPING = [name for name, preset in PRESETS.items() if preset.fragment.get("length", {}).get("method") in DROP]


@pytest.mark.parametrize("preset", DROPPING)
def test_presets_that_drop_tokens_fold_under_a_budget(folder, tmp_path, preset):
    """What stands beside tokens is counted too, and would not fit beside all of them."""
    fields = {
        "model": str(folder),
        "out": str(tmp_path / "out"),
        "preset": preset,
        "kv_budget": 0.5,
        "context_len": 256,
    }
    made = make_recipe(fields | {"calibration": {"data": "self", "num_samples": 4, "seq_len": 64}})
    plan = kvfold.compress(made, run_dir=tmp_path / "run", device="cpu").plan
    assert plan.drops_tokens and 0.45 < plan.kv_budget <= 0.5


def test_damages_of_both_add():
    """Of plans by share, with a few that do not fit."""
    shapes = {1.0: 5.0, 3 / 4: 3.0, 1 / 2: 1.0, 3 / 8: 0.9, 1 / 4: 0.5, 3 / 16: 0.4}

    def made(share):
        if share not in shapes:
            raise BudgetError(f"{share} does not fit")
        return share

    assert best_of_shares(made, shapes.get, lambda share: 0.3 / share) == 1 / 2
    assert best_of_shares(made, shapes.get, lambda share: 0.0) == 3 / 16
    assert best_of_shares(made, lambda share: 0.0, lambda share: 0.0) == 1.0  # of equal ones the one that drops least
    with pytest.raises(BudgetError, match=r"0.01 does not fit"):
        best_of_shares(lambda share: made(share / 100), shapes.get, shapes.get)


def test_what_a_plan_is_expected_to_lose():
    source = [SourceLayer(num_attention_heads=4, num_kv_heads=2, head_dim=8)] * 2
    plan = dataclasses.replace(source_plan(source, "float32"), context_len=100)
    runs = TokenRuns(runs=(TokenRun(heads=(1,), share=0.25, least=7), TokenRun(heads=(0,), share=1.0)))
    caches = (dataclasses.replace(plan.caches[0], tokens=runs), plan.caches[1])
    plan = dataclasses.replace(plan, caches=caches)
    curve = torch.tensor([[8.0, 4.0, 0.0], [6.0, 2.0, 0.0]])
    assert lost_by_tokens(plan, lambda owner, spec: curve, (0.0, 0.5, 1.0)) == pytest.approx(4.0)
    keys, values = plan.caches[0].sides
    known = {(i, part): [(keys, 1.0 + i)] for i in range(2) for part in ("keys", "values")}
    assert lost_by_shapes(plan, ("keys", "values"), known) == 6.0 and keys == values


@pytest.mark.parametrize("kv_budget", [1 / 4, 1 / 12])
def test_one_budget_for_both(folder, tmp_path, kv_budget):
    """Asked for nothing but bytes, a fold keeps one of the shares, and is no larger."""
    folded = kvfold.compress(
        recipe(folder, tmp_path / "out", kv_budget=kv_budget), run_dir=tmp_path / "run", device="cpu"
    )
    assert folded.plan.kv_budget <= kv_budget * 1.001
    heads = sum(spec.num_kv_heads for spec in folded.plan.owned)
    kept = sum(spec.kept(200) * spec.num_kv_heads for spec in folded.plan.owned) / heads / 200
    assert any(abs(kept - share) < 0.03 for share in SHARES_TRIED)


def test_what_cannot_be_compared_is_refused(folder, tmp_path):
    for fields in ({"width": FISHER | {"method": "svd_a"}}, {"length": LENGTH | {"sharing": "equal"}}):
        with pytest.raises(RecipeError, match="say how many stay"):
            kvfold.compress(recipe(folder, tmp_path / "out", kv_budget=0.2, **fields), device="cpu")
