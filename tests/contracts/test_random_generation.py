"""Random families, plans, dtypes, batches, paddings, chunks, crops, beams: cached as uncached, identity as stock, bytes as
planned.

A case is its seed: pytest tests/contracts/test_random_generation.py::test_case[SEED] runs it again.
"""

from __future__ import annotations

import random

import pytest
import torch
from tiny import FAMILIES, FULL_ATTENTION, MODELS, in_steps, load, make_tiny, save_tiny, tokens

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.errors import BudgetError, PlanError, RecipeError
from kvfold.plan.cache_spec import round_up
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

CASES, RARE = 10, 60
TOLERANCE = {torch.float64: 1e-3, torch.float32: 2e-2, torch.bfloat16: 0.2}
"""A number that falls to the other side of a rounding moves by a step of its code, 2 bits at worst; in float64 none does."""
EXPERTS = {"experts_implementation": "eager"}
CALIBRATION = {"data": "self", "num_samples": 4, "seq_len": 160}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("random")

    def made(name):
        return root / name if (root / name).exists() else save_tiny(make_tiny(name), root / name)

    return made


def drawn_recipe(chance):
    """Of any kind whose result does not depend on the steps in which tokens come."""
    budget = chance.choice([0.9, 0.6, 0.4, 0.25, 0.15])
    window = {"length": {"method": "recency", "kept": chance.choice([0.3, 0.6]), "sinks": chance.choice([0, 2, 4])}}
    return chance.choice(
        [
            {"preset": "identity"},
            {"preset": chance.choice(["int8", "int4", "int3", "int2", "fp8", "int4_rotated", "turboquant_k8v4"])},
            {"preset": chance.choice(["svd_a", "svd_w", "fast", "small", "palu", "kq_svd"]), "kv_budget": budget},
            {"preset": "auto", "kv_budget": budget},
            {"preset": "auto", "kv_budget": budget, "prefer": chance.choice(["size", "speed"])},
            {
                "preset": "auto",
                "kv_budget": budget,
                "length": {"method": "recent", "tokens": chance.choice([1, 5, 17])},
            },
            {"preset": "kvtc", "kv_budget": budget},
            {"preset": chance.choice(["cla", "mlkv"]), "kv_budget": max(budget, 0.5)},
            {"preset": "int8"} | window,
            {"preset": "svd_a", "kv_budget": budget, "width": {"latent": "group"}},
        ]
    )


def folded(chance, source, out):
    """(name of the model, recipe, what was made): the first that this family and method allow."""
    while True:
        name, recipe = chance.choice([*MODELS, *FAMILIES]), drawn_recipe(chance)
        fields = {"model": str(source(name)), "out": str(out), "calibration": CALIBRATION, "context_len": 64} | recipe
        try:
            return name, recipe, kvfold.compress(make_recipe(fields), device="cpu")
        except (BudgetError, PlanError, RecipeError):  # a budget out of reach, a method that this family refuses
            continue


def cuts_of(chance, length):
    """Ends of steps, the last of which is the end."""
    count = chance.randint(1, 6)
    return sorted({*(chance.randint(1, length) for _ in range(count)), length})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.rare] * (n >= CASES), id=str(n)) for n in range(CASES + RARE)]
)
def test_case(source, tmp_path, seed):
    chance = random.Random(seed)
    name, recipe, made = folded(chance, source, tmp_path / "out")
    print(f"seed {seed}: {name} {recipe}")  # which pytest shows where it fails
    dtype = chance.choice([torch.float64, *TOLERANCE])
    options = {"dtype": dtype} | (EXPERTS if "experts" in name else {})
    network, close = load(made.out, **options), TOLERANCE[dtype]
    B, length = chance.randint(1, 4), chance.randint(6, 60)
    ids, mask = tokens(B, length, seed=seed), torch.ones(B, length, dtype=torch.long)
    for row in range(1, B):
        mask[row, : chance.randint(0, length // 2)] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = network(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cuts, seen = cuts_of(chance, length), mask.bool()
    if recipe["preset"] == "identity":
        stock = load(source(name), **options)
        with torch.no_grad():
            wanted = stock(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert_close(expected[seen], wanted[seen], tolerance=1e-6 if dtype == torch.float64 else close / 10)
    cache = FoldedCache(made.plan)
    found = in_steps(network, ids, mask, positions, cache, cuts)
    assert_close(found[seen], expected[seen], tolerance=close)
    if not made.plan.drops_tokens and length > 2:
        crop_and_go_on(chance, network, made.plan, (ids, mask, positions), expected, close)
    check_bytes(made.plan, cache, B, length, dtype)
    if dtype == torch.float64:  # elsewhere a rounding may decide between two tokens
        check_generation(chance, network, ids[:, -12:])


def crop_and_go_on(chance, network, plan, batch, expected, close):
    """Some tokens, others that are taken back, then the right ones."""
    ids, mask, positions = batch
    length = ids.shape[1]
    first, wrong = chance.randint(1, length - 2), chance.randint(1, 5)
    cache = FoldedCache(plan)
    in_steps(network, ids[:, :first], mask[:, :first], positions[:, :first], cache, [first])
    cache.activate_past_recording()
    drafts = tokens(len(ids), wrong, seed=3)
    longer = torch.cat([mask[:, :first], torch.ones_like(drafts)], 1)
    with torch.no_grad():
        at = positions[:, first - 1 : first] + 1 + torch.arange(wrong)
        network(drafts, attention_mask=longer, position_ids=at, past_key_values=cache)
        cache.crop(-wrong)
        rest = network(
            ids[:, first:], attention_mask=mask, position_ids=positions[:, first:], past_key_values=cache
        ).logits
    seen = mask[:, first:].bool()
    assert_close(rest[seen], expected[:, first:][seen], tolerance=close)


def check_bytes(plan, cache, B, length, dtype):
    if not plan.drops_tokens:
        stored = sum(spec.bytes_allocated(length, dtype.itemsize) for spec in plan.owned)
        assert cache.nbytes_allocated == B * (stored + plan.position_bytes * round_up(length))


def check_generation(chance, network, ids):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": chance.choice([1, 1, 2, 3])}
    with_cache = network.generate(ids, **options)
    assert torch.equal(with_cache, network.generate(ids, use_cache=False, **options))


def test_cases_are_of_many_kinds():
    """Families with windows among them, and those without."""
    assert set(FULL_ATTENTION) < set(MODELS) and len({*MODELS, *FAMILIES}) > 30
    drawn = {str(drawn_recipe(random.Random(seed)).get("preset")) for seed in range(CASES)}
    assert len(drawn) > 4
