"""Attention whose softmax has a score of its own for every head (gpt-oss): every way of reading, and its checkpoints."""

import functools
import json

import pytest
import torch
from packed_forms import numbers
from safetensors.torch import load_file, save_file
from tiny import EXPERTS_IN_TURN, in_steps, load, logits, make_tiny, save_tiny, tokens

import kvfold
from kvfold.checkpoint.quantized import FLOAT4
from kvfold.checkpoint.source import open_source, read_layer
from kvfold.compression.recipe import make_recipe
from kvfold.errors import CheckpointError, PlanError
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes import reference
from kvfold.runtimes.kernels import aged_kernels, cpu_decode
from kvfold.runtimes.kernels.aged_attention import attend_by_age
from kvfold.runtimes.kernels.aged_prefill import prefill_by_biases, prefill_by_log_sums
from kvfold.runtimes.kernels.attention import chunked_attention, grouped_attention, kernel_attention, prefill_attention
from kvfold.runtimes.kernels.cpu_layer import LayerReader
from kvfold.runtimes.kernels.dispatch import Way, decode_attention, pack
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, PackedTokens
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close, relative_rms

MODEL = "gpt_oss_experts"
CALIBRATION = {"data": "self", "num_samples": 4, "seq_len": 160}
SINKS = torch.tensor([-30.0, -1.0, 0.5, 4.0])
"""Of four heads: nothing, a little, about half, nearly all."""


def expected(q, k, v, seen, scale=0.3):
    """[B, T, N, V], by a token in front of all."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).double(), v.repeat_interleave(groups, 1).double()
    scores = (q.double() @ k.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
    sink = SINKS.double()[:, None, None].expand(*scores.shape[:3], 1)
    probs = torch.cat([sink, scores], -1).softmax(-1)[..., 1:]
    return (probs @ v).transpose(1, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("T", [1, 3, 11])
def test_every_way_of_reading(T, padded):
    """Of as many tokens as queries and of more, with padding and without."""
    B, N, K, S, H = 2, 4, 2, 11, 16
    q, k, v = numbers(B, N, T, H), numbers(B, K, S, H, seed=1), numbers(B, K, S, H, seed=2)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None].repeat(B, 1, 1, 1)
    if padded:
        seen[0, :, :, :4] = False
    mask, sizes = seen if padded or 1 < T < S else None, {"scale": 0.3, "sinks": SINKS}
    wanted = expected(q, k, v, seen)
    shown = seen.any(-1)[:, 0]  # what stands in padding sees nothing, and nobody reads it
    ways = {
        "grouped": lambda m: grouped_attention(q, k, v, m, **sizes)[0],
        "pieces": lambda m: chunked_attention(
            q, lambda a, b: k[:, :, a:b], lambda a, b: v[:, :, a:b], S, m, elements=1 << 24, **sizes
        ),
        "fused": lambda m: prefill_attention(q, k, v, m, **sizes),
    }
    if T < S:
        ways |= {way.name: lambda m, way=way: decode_attention(q, k, v, m, way=way, **sizes) for way in few_ways(T)}
    lowest = torch.finfo(torch.float32).min
    added = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, lowest)
    for name, attend in ways.items():
        for form in (mask, added):
            assert_close(attend(form)[shown].double(), wanted[shown], tolerance=1e-5, name=name)
    probs = grouped_attention(q, k, v, mask, **sizes)[1]
    summed = probs.sum(-1).transpose(1, 2)[shown]
    assert summed[:, 0].min() > 0.999 and summed[:, 3].max() < 0.95


def few_ways(T):
    return [Way.CPU, Way.GROUPED, *([Way.ONE_QUERY, Way.PRODUCTS] if T == 1 else [])]


def test_packed_tokens_by_the_kernel():
    form = NumberFormat(tiers=((16, 8),))
    q, z, y = numbers(2, 4, 1, 16), numbers(2, 2, 40, 16, seed=1), numbers(2, 2, 40, 16, seed=2)
    packed = [PackedTokens(pack(x, form), form, torch.float32) for x in (z, y)]
    assert cpu_decode.serves(q, *packed)
    found = kernel_attention(q, *packed, None, scale=0.3, sinks=SINKS)
    plain = [x.read(0, 40) for x in packed]
    assert_close(found.double(), expected(q, *plain, torch.ones(1, 40, dtype=torch.bool)), tolerance=1e-5)


@pytest.mark.parametrize("T", [1, 12])
def test_tokens_of_two_forms(T):
    """By the kernel, in pieces, by masks and by torch's fused kernel."""
    S, recent = 30, 6
    q, far, near = numbers(2, 4, T, 16), numbers(2, 2, S, 16, seed=1), numbers(2, 2, S, 16, seed=2)
    age = torch.arange(S - T, S)[:, None] - torch.arange(S)
    wanted = torch.stack(
        [
            expected(
                q[:, :, t : t + 1], *[torch.where((age[t] < recent)[:, None], near, far)] * 2, age[t : t + 1] >= 0
            )[:, 0]
            for t in range(T)
        ],
        1,
    )
    z = AgedTokens(far, near, recent)
    sizes = {"scale": 0.3, "sinks": SINKS}
    ways = {
        by_masks: functools.partial(
            attend_by_age, (q, q), z, z, None, keys=None, width=16, by_masks=by_masks, elements=1 << 20, **sizes
        )
        for by_masks in (False, True)
    }
    for name, attend in ways.items():
        assert_close(attend()[0].double(), wanted, tolerance=1e-5, name=str(name))
    both = (far, near), (far, near)
    assert_close(prefill_by_log_sums(q, *both, recent=recent, **sizes).double(), wanted, tolerance=1e-5)
    assert_close(prefill_by_biases(q, *both, None, recent=recent, **sizes).double(), wanted, tolerance=1e-5)
    if T == 1:
        assert aged_kernels.serves((q, q), z, z)
        assert_close(aged_kernels.attend((q, q), z, z, None, 16, **sizes).double(), wanted, tolerance=1e-5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(make_tiny(MODEL), tmp_path_factory.mktemp("sinks") / "source")


def fold(source, out, **fields):
    return kvfold.compress(
        make_recipe({"model": str(source), "out": str(out), "calibration": CALIBRATION} | fields), device="cpu"
    )


@torch.no_grad()
def test_the_oracle_knows_sinks(source):
    """Its layer is the family's own."""
    stock, opened = load(source, dtype=torch.float64, **EXPERTS_IN_TURN), open_source(source)
    hidden, T = numbers(1, 20, 64).double(), 20
    cos, sin = stock.model.rotary_emb(hidden, torch.arange(T)[None])
    for layer in opened.layers:
        seen = reference.causal(T, layer.window)
        mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(~seen, float("-inf"))[None, None]
        wanted = stock.model.layers[layer.index].self_attn(hidden, (cos, sin), mask)[0][0]
        tables = (torch.cat([table[0]] * 2, -1) for table in (cos, sin))
        found = reference.attention(layer, read_layer(opened.checkpoint, opened.arch, layer), hidden[0], *tables, seen)
        assert_close(found, wanted, tolerance=1e-6)


@pytest.mark.filterwarnings("ignore:kv_budget", "ignore:the plain cache")
@pytest.mark.parametrize(
    "recipe",
    [
        {"preset": "int8"},
        {"preset": "auto", "kv_budget": 0.25},
        {"preset": "auto", "kv_budget": 0.25, "prefer": "size"},
        {"preset": "svd_a", "kv_budget": 0.5, "width": {"method": "svd_a", "grouping": "similar"}},
    ],
    ids=["int8", "auto", "size", "similar"],
)
def test_steps_by_the_cpu_s_kernel(source, tmp_path, monkeypatch, recipe):
    """In float32: what it gives step by step is what a forward without a cache does, but for a sixteenth of what the
    fold loses where queries are turned."""
    asked, real = [], LayerReader.__call__
    monkeypatch.setattr(LayerReader, "__call__", lambda *args: asked.append(1) or real(*args))
    network, ids = load(fold(source, tmp_path / "out", **recipe).out), tokens(2, 100)
    mask = torch.ones_like(ids)
    found = in_steps(network, ids, mask, mask.cumsum(1) - 1, FoldedCache(network.kv_plan), [80, *range(81, 101)])
    assert len(asked) >= 40
    wanted, original = (logits(model, ids)[:, 80:] for model in (network, load(source)))
    turned = any(spec.fast_pairs for spec in network.kv_plan.owned)
    assert_close(found[:, 80:], wanted, tolerance=relative_rms(wanted, original) / 16 if turned else 2e-3)


@pytest.mark.parametrize("preset", ["streaming_llm", "quest", "xkv"])
def test_what_does_not_know_sinks_is_refused_before_work(source, tmp_path, preset):
    with pytest.raises(PlanError, match="has a score of its own for every head"):
        fold(source, tmp_path / "out", preset=preset, kv_budget=None if preset == "quest" else 0.5)
    assert not (tmp_path / "out").exists()


def in_float4(tensor_Eio):
    """Blocks and scales as files have them, and what they mean."""
    grouped = tensor_Eio.transpose(1, 2).unflatten(2, (-1, 32))
    exponent = (grouped.abs().amax(-1) / FLOAT4[-1]).log2().ceil()
    values = torch.tensor([*FLOAT4, *(-x for x in FLOAT4)])
    codes = (grouped * torch.exp2(-exponent)[..., None]).unsqueeze(-1).sub(values).abs().argmin(-1)
    meant = (values[codes] * torch.exp2(exponent)[..., None]).flatten(2).transpose(1, 2)
    low, high = codes.unflatten(3, (-1, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8), (exponent + 127).to(torch.uint8), meant.contiguous()


@pytest.fixture
def in_mxfp4(source, tmp_path):
    """(a folder as gpt-oss is published, one with what its experts mean)"""
    folders = tmp_path / "packed", tmp_path / "plain"
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    scheme = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    packed, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"], plain[name] = in_float4(tensor)
        else:
            packed[name] = plain[name] = tensor.bfloat16()
    for folder, tensors, more in zip(folders, (packed, plain), ({"quantization_config": scheme}, {}), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | more))
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folders


def test_experts_in_mxfp4(in_mxfp4, tmp_path):
    """As gpt-oss is published: attention is folded, experts are the same bytes, transformers' own quantizer reads them."""
    packed, plain = in_mxfp4
    opened, meant = open_source(packed).checkpoint, load_file(plain / "model.safetensors")
    names = [name for name in meant if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(names) == 6 and all(torch.equal(opened.read(name), meant[name]) for name in names)
    recipe = {"preset": "svd_a", "kv_budget": 0.5}
    out, other = fold(packed, tmp_path / "out", **recipe).out, fold(plain, tmp_path / "other", **recipe).out
    before, found, expected = (load_file(folder / "model.safetensors") for folder in (packed, out, other))
    outside = [name for name in before if ".self_attn." not in name]
    assert any(name.endswith("_blocks") for name in outside) and all(torch.equal(before[n], found[n]) for n in outside)
    for name in (name for name in found if ".self_attn." in name):
        assert_close(found[name].float(), expected[name].float(), tolerance=1e-2, name=name)
    ids = tokens()
    assert_close(logits(load(out), ids).float(), logits(load(other), ids).float(), tolerance=5e-2)


def test_a_scale_that_is_missing_is_named(in_mxfp4):
    file = in_mxfp4[0] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.down_proj lacks scales"):
        open_source(in_mxfp4[0])
