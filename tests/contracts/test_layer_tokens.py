"""Layers with one latent, of which all heads keep the same tokens: recent ones in a finer form, keys rotated on read."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_scored_tokens import Known, read, stays, with_known_worth
from tiny import load, logits, tokens

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.errors import PlanError
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.head_run import HeadRun
from kvfold.testing import assert_close

WIDTHS = {
    "on_read": {"method": "mla", "multiple": 4, "rope": "on_read"},
    "banded": {"method": "mla", "multiple": 4, "rope": "banded"},
    "applied": {"method": "fisher", "latent": "layer", "v_latent": "layer", "multiple": 4},
}
MODELS = ("llama_sink", "qwen3_sink", "neox_partial", "bloom_alibi")
LENGTH = {"method": "scored", "rule": "observed", "kept": 0.6, "recent": 5, "newest": 5, "sinks": 2}


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    root, done = tmp_path_factory.mktemp("layers"), {}

    def fold(model, width, **length):
        key = model, width, *length.items()
        if key not in done:
            fields = {"model": str(tiny_dir / model), "out": str(root / f"{len(done)}"), "width": WIDTHS[width]}
            fields |= {"bits": {"method": "mixed"}, "allocate": "greedy", "kv_budget": 0.2, "context_len": 40}
            fields |= {"length": LENGTH | length, "calibration": {"data": "self", "num_samples": 4, "seq_len": 64}}
            done[key] = kvfold.compress(make_recipe(fields), run_dir=root / "run", device="cpu")
        return done[key]

    return fold


@pytest.mark.parametrize("model", ["llama_sink", "qwen3_sink", "neox_partial"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("cuts", [(40, *range(41, 61)), (20, 45, 50, 60)], ids=str)
@pytest.mark.filterwarnings("ignore:kv_budget")
def test_only_what_stays_is_seen(fold, model, width, cuts, monkeypatch):
    """Beside the same model with a cache of every token, of which masks hide what was dropped, with padding."""
    skip_if_partial(model, width)
    folded = fold(model, width)
    network, ids, begins = load(folded.out, dtype=torch.float64), tokens(3, 60), (23, 0, 2)
    run = TokenRun(heads=(0,), share=0.3, least=7)
    runs = TokenRuns(runs=(run,), rule="observed", sinks=2, newest=5, prompt="whole")
    plans = [
        dataclasses.replace(
            folded.plan, caches=tuple(dataclasses.replace(spec, tokens=chosen) for spec in folded.plan.caches)
        )
        for chosen in (None, runs)
    ]
    mask = torch.stack([torch.arange(60) >= begin for begin in begins]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = torch.stack([stays(runs, 1, 60, begin, cuts, Known.worth_KS) for begin in begins])
    expected, cache = [], FoldedCache(plans[0])
    with_plan(network, plans[0])
    with torch.no_grad():
        for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
            options = {"attention_mask": hidden[:, :, start:end, :end], "position_ids": positions[:, start:end]}
            expected.append(network(ids[:, start:end], past_key_values=cache, **options).logits)
    monkeypatch.setattr(HeadRun, "choose", with_known_worth(HeadRun.choose))
    with_plan(network, plans[1])
    found, cache = read(network, plans[1], ids, mask, cuts)
    assert_close(found[mask.bool()], torch.cat(expected, dim=1)[mask.bool()], tolerance=1e-7)
    whole = FoldedCache(plans[0])
    assert cache.nbytes_allocated < 3 * plans[0].kv_bytes(60, dtype="float32") and whole.nbytes == 0


def skip_if_partial(model, width):
    """Heads that are rotated in part have no finer form of recent tokens after rotation."""
    if (model, width) == ("neox_partial", "applied"):
        pytest.skip("refused, with the reason (test_recent.py)")


def with_plan(network, plan):
    for module in network.modules():
        if hasattr(module, "spec"):
            module.spec = plan.caches[module.layer_idx]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.filterwarnings("ignore:kv_budget")
def test_a_padded_batch_is_its_sequences(fold, model, width):
    """With what the scorer says; and storage is what the plan says."""
    skip_if_partial(model, width)
    folded = fold(model, width)
    network, ids = load(folded.out, dtype=torch.float64), tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :23] = mask[2, :2] = 0
    found, cache = read(network, folded.plan, ids, mask, [50, *range(51, 61)])
    assert cache.nbytes_allocated == folded.plan.kv_bytes(60, batch_size=3)
    assert all(one.place.early_B is not None for layer in cache.owned for one in layer.runs if not one.run.keeps_all)
    alone, cache = read(network, folded.plan, ids[:1, 23:], mask[:1, 23:], [27, *range(28, 38)])
    assert cache.nbytes_allocated == folded.plan.kv_bytes(37)
    assert_close(found[:1, 23:], alone, tolerance=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.filterwarnings("ignore:kv_budget")
def test_a_prompt_is_read_whole(fold, width):
    """With a cache or without; what is dropped changes what comes behind it."""
    folded, ids = fold("llama_sink", width), tokens(1, 60)
    network = load(folded.out, dtype=torch.float64)
    found, _ = read(network, folded.plan, ids, torch.ones_like(ids), [50, *range(51, 61)])
    whole = logits(network, ids)
    assert_close(found[:, :50], whole[:, :50], tolerance=1e-6)
    assert not torch.allclose(found[:, 50:], whole[:, 50:], atol=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.filterwarnings("ignore:kv_budget")
def test_copies_and_rows_go_on(fold, width):
    """Repeated, chosen, and with beams."""
    folded, ids = fold("llama_sink", width), tokens(2, 60)
    network, cache = load(folded.out), FoldedCache(folded.plan)
    with torch.no_grad():
        network(ids[:, :50], past_key_values=cache)
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        twin.reorder_cache(torch.tensor([3, 0]))
        found = network(ids[:, 50:51].flip(0), past_key_values=twin).logits
        expected = network(ids[:, 50:51], past_key_values=cache).logits
    assert_close(found, expected.flip(0), tolerance=1e-5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert network.generate(ids, num_beams=3, **options).shape == (2, 68)


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_what_is_refused(fold):
    plan = fold("llama_sink", "on_read").plan
    spec = plan.owned[0]
    for rule in ("kvzip", "repeated"):  # whose second reading would become recent
        again = dataclasses.replace(
            spec, rope="none", k_offset=False, tokens=dataclasses.replace(spec.tokens, rule=rule)
        )
        network = load(fold("llama_sink", "on_read").out)
        network.config.kv_compression_config = dataclasses.replace(plan, caches=(again, *plan.caches[1:])).to_dict()
        with pytest.raises(PlanError, match="no finer form of recent tokens"):
            network._replace_attention()
    changes = {"newest": 4}, {"rule": "recency", "prompt": "masked"}, {"matched": True}
    for change in changes:
        broken = dataclasses.replace(spec, tokens=dataclasses.replace(spec.tokens, **change))
        with pytest.raises(PlanError, match="where a layer has one latent, a scorer chooses"):
            dataclasses.replace(plan, caches=(broken, *plan.caches[1:]))
