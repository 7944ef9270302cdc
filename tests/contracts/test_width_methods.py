"""What every width method promises, over tiny models of every family. A new method or model is found by itself."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    FULL_ATTENTION,
    MODELS,
    copy_heads,
    in_attention,
    in_steps,
    kv_heads,
    load,
    logits,
    make_tiny,
    save_tiny,
    step,
    tokens,
)

import kvfold
from kvfold import registry
from kvfold.checkpoint.source import load_plan, open_source, read_layer
from kvfold.compression.recipe import make_recipe
from kvfold.linalg.eigen import Moment
from kvfold.methods.width.base import LayerGroup
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close, relative_rms

VARIANTS = {
    "autoencoder": [{"hidden": 8, "steps": 5}],
    "fisher": [
        {},
        {"rope": "on_read"},
        {"rope": "banded"},
        {"latent": "group", "v_latent": "group", "grouping": "similar"},
    ],
    "logit": [{}, {"latent": "group"}, {"v_latent": "layer"}],
    "orthogonal": [{}, {"sides": "keys"}],
    "procrustes": [{}, {"grouping": "similar"}, {"merge": "align"}],
    "svd_a": [{}, {"latent": "group"}, {"v_latent": "layer"}],
    "svd_w": [{}, {"latent": "group"}, {"v_latent": "layer"}],
}
LOW_RANK = ("autoencoder", "eigen_attention", "fisher", "kq_svd", "kvtc", "logit", "mla", "palu", "svd_a", "svd_w")
METHODS = [
    pytest.param(method, fields, id="-".join([method, *map(str, fields.values())]))
    for method in registry.names("width")
    if not registry.load("width", method).joint  # steps see their own tokens exactly: tests/contracts/test_joint.py
    for fields in VARIANTS.get(method, [{}])
]
WHOLE = ("identity", "orthogonal")
"""They store every number."""
HALVING = [m for m in METHODS if m.values[0] not in WHOLE]

ALSO_KEEPS_QUERIES = "eigen_attention"
"""Its basis holds queries as well, so that it loses something of keys that alone would fit."""

NOT_POSSIBLE = {("procrustes", "olmo2_flat_norm")}
"""A norm over all heads of a token leaves no ordinary grouped-query form; the method says so."""


def pairs(methods):
    """Every method with every model that it can fold."""
    return [
        pytest.param(model, *method.values, id=f"{method.id}-{model}")
        for method in methods
        for model in MODELS
        if (method.values[0], model) not in NOT_POSSIBLE
    ]


every_method = pytest.mark.parametrize(("model", "method", "fields"), pairs(METHODS))
every_halving_method = pytest.mark.parametrize(("model", "method", "fields"), pairs(HALVING))
halving_on_qwen2 = pytest.mark.parametrize(("method", "fields"), HALVING)


def asked(model, method, fields, heads):
    """As many numbers as `heads` of the source's have, as a budget; or as heads, where positions are stored beside them."""
    if method in ("autoencoder", "mla", "palu", "eigen_attention", "kvtc") or fields.get("rope") in (
        "on_read",
        "banded",
    ):
        return {"kv_budget": None}, fields | {"kv_heads": heads}
    return {"kv_budget": heads / kv_heads(model)}, fields


@every_method
def test_full_size_gives_the_original_logits(fold, tiny_dir, model, method, fields):
    budget, fields = asked(model, method, fields, kv_heads(model))
    folded = fold(model, method, **budget, **fields)
    assert folded.plan.kv_bytes_per_token() == folded.plan.source_kv_bytes_per_token() + folded.plan.position_bytes
    assert_close(logits(load(folded.out), tokens()), logits(load(tiny_dir / model), tokens()), tolerance=1e-5)


@pytest.mark.parametrize(
    ("model", "method", "fields"), pairs([m for m in HALVING if m.values[0] != ALSO_KEEPS_QUERIES])
)
def test_planted_rank_is_folded_without_loss(tmp_path, model, method, fields):
    """All heads are copies of one (scaled, where the method can tell): one head's worth of numbers holds everything."""
    heads = kv_heads(model)
    budget, fields = asked(model, method, fields, 1)
    scales = (
        [1.0] * heads if method in ("mean_pool", "procrustes") else [1.0, -0.5, 2.0, 0.7, 1.3, -1.1, 0.4, 0.9][:heads]
    )
    original = copy_heads(make_tiny(model), scales)
    source = save_tiny(original, tmp_path / "source")
    folded = kvfold.compress(
        make_recipe(
            {
                "model": str(source),
                "out": str(tmp_path / "out"),
                **budget,
                "width": {"method": method, **fields} | ({"multiple": 4} if method in LOW_RANK else {}),
                "calibration": {"data": "self", "num_samples": 16, "seq_len": 64},
            }
        ),
        device="cpu",
    )
    expected = folded.plan.source_kv_bytes_per_token() / heads + folded.plan.position_bytes
    assert folded.plan.kv_bytes_per_token() == pytest.approx(expected)
    assert_close(logits(load(folded.out), tokens()), logits(original, tokens()), tolerance=1e-4)


@every_method
def test_more_numbers_never_mean_more_expected_distortion(tiny_dir, model, method, fields):
    source = open_source(tiny_dir / model)
    layer = source.layers[1]
    width = registry.load("width", method)(**fields)
    moments, K, F = {}, layer.num_kv_heads, layer.num_kv_heads * layer.head_dim
    for name in width.needs:
        wide = 2 * F if name.endswith("keys_and_values") else F
        size = {"queries": (K, F // K), "metric": (1, wide)}.get(name.partition("_")[0], (wide,))
        moments[name] = Moment.zeros(*size)
        moments[name].update(torch.randn(500, *size).cumsum(-1))
    group = LayerGroup(
        layers=(layer,),
        weights=lambda i: read_layer(source.checkpoint, source.arch, layer),
        moments=lambda i: moments,
        cross=lambda i: {name: moments[name].second_FF for name in width.needs_cross},
    )
    for part in width.parts:
        shapes = width.shapes(part, layer)
        assert [s.elements for s in shapes] == sorted({s.elements for s in shapes})
        assert shapes[-1].elements == 2 * F // len(width.parts)
        curve = width.distortion(part, group, shapes)
        assert curve[-1] == pytest.approx(0, abs=1e-12)
        # mean_pool's groups need not nest, and low-rank groups of different sizes do not either
        assert curve[0] == max(curve) or len({s.num_heads for s in shapes}) > 1
        one_grouping = [d for d, s in zip(curve, shapes, strict=True) if s.num_heads == shapes[-1].num_heads]
        assert one_grouping == sorted(one_grouping, reverse=True)


@every_halving_method
@pytest.mark.filterwarnings("ignore:kv_budget 0.6 was asked for")
@pytest.mark.parametrize("allocate", ["uniform", "greedy"])
def test_budget_is_kept(tiny_dir, tmp_path, model, method, fields, allocate):
    folded = kvfold.compress(
        make_recipe(
            {
                "model": str(tiny_dir / model),
                "out": str(tmp_path / "out"),
                "kv_budget": 0.6,
                "allocate": allocate,
                "width": {"method": method, **fields},
                "calibration": {"data": "self", "num_samples": 8, "seq_len": 32},
            }
        ),
        device="cpu",
    )
    assert 0.3 < folded.plan.kv_budget <= 0.6
    assert load_plan(folded.out)[0] == folded.plan


@every_method
def test_real_bytes_are_planned_bytes(fold, model, method, fields):
    """After prefill and after 100 decoded tokens, batch 4: storage allocated == plan, and nothing is stored twice."""
    folded = fold(model, method, kv_budget=1.0 if method in WHOLE else 0.5, **fields)
    network = load(folded.out)
    cache = FoldedCache(folded.plan)
    ids = tokens(4, 230)
    with torch.no_grad():
        network(ids[:, :130], past_key_values=cache)
        assert cache.nbytes_allocated == folded.plan.kv_bytes(130, batch_size=4)
        for i in range(130, 230):
            network(ids[:, i : i + 1], past_key_values=cache)
            assert cache.nbytes_allocated == folded.plan.kv_bytes(i + 1, batch_size=4)
    windows = [spec.window for spec in folded.plan.owned]
    kept = [230 if window is None else window - 1 for window in windows]
    live = sum(4 * 4 * s.elements_per_token * n for s, n in zip(folded.plan.owned, kept, strict=True))
    live += 4 * 230 * folded.plan.position_bytes
    assert cache.nbytes == live
    storages = {b.data.untyped_storage().data_ptr() for layer in cache.owned for b in layer.buffers}
    assert len(storages) == sum(len(layer.buffers) for layer in cache.owned)


@every_method
def test_cached_equals_uncached(fold, model, method, fields):
    """Token by token = prefill + decode = chunks = no cache, with left padding, batch > 1 and after a crop."""
    folded = fold(model, method, kv_budget=1.0 if method in WHOLE else 0.5, **fields)
    network, ids = load(folded.out), tokens(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = logits(network, ids, attention_mask=mask, position_ids=positions)
    for cuts in ([*range(1, 31)], [17, *range(18, 31)], [8, 20, 30], [30]):
        found = in_steps(network, ids, mask, positions, FoldedCache(folded.plan), cuts)
        seen = mask.bool()
        assert_close(found[seen], expected[seen], name=f"cuts {cuts[:3]}")
    if model not in FULL_ATTENTION:  # a window that was passed cannot be rolled back
        return
    cache = FoldedCache(folded.plan)
    step(network, ids.flip(1), mask, positions, cache, 0, 25)
    cache.crop(-25)
    step(network, ids, mask, positions, cache, 0, 20)
    step(network, ids.flip(1), mask, positions, cache, 20, 26)
    cache.crop(-6)
    assert_close(step(network, ids, mask, positions, cache, 20, 30), expected[:, 20:])


@every_halving_method
def test_everything_outside_attention_is_copied_bit_for_bit(fold, tiny_dir, model, method, fields):
    folded = fold(model, method, kv_budget=0.5, **fields)
    before, after = load_file(tiny_dir / model / "model.safetensors"), load_file(folded.out / "model.safetensors")
    current_name = open_source(tiny_dir / model).arch.current_name
    before = {current_name(name): tensor for name, tensor in before.items() if not in_attention(name)}
    assert set(before) == {name for name in after if not in_attention(name)}
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_halving_method
def test_same_seed_same_bytes(fold, tiny_dir, tmp_path, model, method, fields):
    folded = fold(model, method, kv_budget=0.5, **fields)
    again = kvfold.compress(
        make_recipe(
            {
                "model": str(tiny_dir / model),
                "out": str(tmp_path / "again"),
                "kv_budget": 0.5,
                "width": {"method": method, **fields},
                "calibration": {"data": "self", "num_samples": 16, "seq_len": 64},
            }
        ),
        device="cpu",
    )
    assert _digest(folded.out) == _digest(again.out)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_fresh_process_gives_the_same_logits(fold, tmp_path):
    """`import kvfold` and stock transformers are enough; save_pretrained round-trips."""
    folders = [fold(model, "svd_a", kv_budget=0.5).out for model in MODELS]
    folders.append(fold("llama_mha", "mean_pool", kv_budget=0.5).out)
    for folder in folders:
        torch.save(logits(load(folder), tokens()), tmp_path / f"{folder.name}.pt")
    script = """
import sys, torch, kvfold, tiny
for folder in sys.argv[2:]:
    expected = torch.load(f"{sys.argv[1]}/{folder.split('/')[-1]}.pt")
    model = tiny.load(folder)
    assert torch.equal(tiny.logits(model, tiny.tokens()), expected), folder
    model.save_pretrained(f"{sys.argv[1]}/saved", max_shard_size="100KB")
    again = tiny.load(f"{sys.argv[1]}/saved")
    assert torch.equal(tiny.logits(again, tiny.tokens()), expected), folder
    assert again.config.kv_compression_config == model.config.kv_compression_config
"""
    path = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{script}", tmp_path, *map(str, folders)],
        check=True,
    )


@halving_on_qwen2
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(fold, method, fields, dtype):
    """The same weights in half precision stay near the float32 result, cached and uncached."""
    folded = fold("qwen2_bias_tied", method, kv_budget=0.5, **fields)
    expected = logits(load(folded.out), tokens())
    network = load(folded.out, dtype=dtype)
    # many roundings add up over three layers of random weights
    tolerance = 5e-2 if dtype == torch.bfloat16 else 8e-3
    assert_close(logits(network, tokens()).float(), expected, tolerance=tolerance)
    cache = FoldedCache(folded.plan)
    with torch.no_grad():
        parts = [network(tokens()[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
    assert_close(torch.cat(parts, 1).float(), expected, tolerance=tolerance)
    assert cache.nbytes_allocated == folded.plan.kv_bytes(40, batch_size=3, dtype=str(dtype).removeprefix("torch."))


def test_low_rank_beats_pooling(fold, tiny_dir):
    """The order of the paper on a model with random, hence unrelated, heads."""
    expected = logits(load(tiny_dir / "llama_mha"), tokens())
    error = {
        m: relative_rms(logits(load(fold("llama_mha", m, kv_budget=0.5).out), tokens()), expected)
        for m in ("svd_a", "svd_w", "mean_pool")
    }
    assert error["svd_a"] < error["svd_w"] < error["mean_pool"]
