"""The transformers runtime against the oracle, for plans that no method makes yet, and under generate()."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import FULL_ATTENTION, MODELS, load, logits, make_tiny, rotation, tokens
from transformers import DynamicCache

from kvfold.architectures.base import architecture, source_config
from kvfold.checkpoint.source import load_plan
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.number_format import NumberFormat
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes import reference
from kvfold.runtimes.kernels.attention import chunked_attention, grouped_attention, prefill_attention
from kvfold.runtimes.kernels.codec import pack
from kvfold.runtimes.kernels.dispatch import decode_attention
from kvfold.runtimes.transformers.attention import attention_class
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.forward_state import ForwardState
from kvfold.testing import TOLERANCE, assert_close, relative_rms

SHAPES = [  # key heads, width, value heads, width, key projection, value projection; the source has 4 heads of 16
    (4, 16, 4, 16, False, False),
    (2, 16, 1, 16, False, False),
    (4, 8, 4, 8, True, False),
    (1, 40, 4, 16, True, False),
    (1, 40, 2, 24, True, True),
    (2, 24, 1, 40, True, True),
    (1, 40, 1, 40, True, True),
]


def folded_layer(shape, bias, rope="applied", implementation="sdpa", seed=0, **fields):
    """A random folded attention module of a qwen3 layer and its oracle weights in float64."""
    C, R, U, V, k_projection, v_projection = shape
    spec = CacheSpec(
        rope=rope,
        num_kv_heads=C, head_dim=R, num_v_heads=U, v_head_dim=V,
        k_projection=k_projection, v_projection=v_projection, output_bias=bias, **fields,
    )  # fmt: skip
    arch, model = architecture("qwen3"), make_tiny("qwen3_norm_window", use_sliding_window=False, layer_types=None)
    facts, old = arch.describe(model)[0], arch.modules(model)[0]
    config = copy.deepcopy(model.config)
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    module = attention_class(type(old))(config, facts, spec, arch.norms(old)).eval()
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    weights = FoldedWeights.from_state_dict({name: t.double() for name, t in module.state_dict().items()})
    return module, facts, spec, weights, model.model.rotary_emb


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rope", ["applied", "on_read"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_module_equals_the_oracle(shape, bias, rope, implementation, monkeypatch):
    _compare_with_the_oracle(monkeypatch, shape, bias, rope, implementation)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [{"k_offset": True}, {"k_offset": True, "hidden": 12}, {"k_offset": True, "fast_pairs": 3}],
    ids=["offset", "networks", "fast_pairs"],
)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1]], ids=str)
def test_what_is_rebuilt_on_read_equals_the_oracle(shape, fields, implementation, monkeypatch):
    _compare_with_the_oracle(monkeypatch, shape, True, "on_read", implementation, **fields)


@pytest.mark.parametrize("rope", ["applied", "on_read"])
@pytest.mark.parametrize("scales", ["exponent", "affine", "float8", "normal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_latents_equal_the_oracle(shape, scales, rope, monkeypatch):
    """In float64, so that both round to the same codes; the oracle reads the stored bytes bit by bit."""
    _, R, _, V, k_projection, _ = shape
    bits = (5, 3) if scales != "float8" else (8, 8)
    k_bits, v_bits = (_format(width, b, scales) for width, b in zip((R, V), bits, strict=True))
    fields = {"k_bits": k_bits, "v_bits": v_bits, "stored_bias": True, "k_offset": rope == "on_read" and k_projection}
    # norms are taken in float32 whatever the dtype: now and then one code falls on the other side
    _compare_with_the_oracle(monkeypatch, shape, True, rope, "sdpa", dtype=torch.float64, tolerance=1e-3, **fields)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rope", ["applied", "on_read"])
@pytest.mark.parametrize("quantized", [False, True], ids=["", "quantized"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recent_tokens_in_a_finer_form_equal_the_oracle(shape, quantized, rope, implementation, monkeypatch):
    _, R, _, V, k_projection, _ = shape
    own = (12, 12 if R == V else 20) if k_projection else (0, 0)
    more = own if k_projection else (R, V)
    fields = {"recent": 5, "recent_head_dim": own[0], "v_recent_head_dim": own[1]}
    if quantized:
        bits = ("k_bits", R, 3), ("v_bits", V, 3), ("k_recent_bits", more[0], 6), ("v_recent_bits", more[1], 6)
        fields |= {name: _format(width, b, "exponent") for name, width, b in bits}
        fields |= {"stored_bias": True, "k_offset": rope == "on_read" and k_projection}
    for file in ("aged_attention", "aged_prefill"):
        monkeypatch.setattr(f"kvfold.runtimes.kernels.{file}.QUERIES_AT_ONCE", 4)
    dtype, tolerance = (torch.float64, 1e-3) if quantized else (torch.float32, None)
    _compare_with_the_oracle(monkeypatch, shape, True, rope, implementation, dtype=dtype, tolerance=tolerance, **fields)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("quantized", [False, True], ids=["", "quantized"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] == shape[2]], ids=str)
def test_heads_that_keep_different_tokens_equal_the_oracle(shape, quantized, implementation, monkeypatch):
    C, R, _, V, *_ = shape
    runs = [TokenRun(heads=(0, 3), share=0.5, least=4), TokenRun(heads=(1, 2), share=0.0, least=6)]
    runs = runs if C == 4 else [TokenRun(heads=(0,), share=0.3, least=5)]
    fields = {"tokens": TokenRuns(runs=tuple(runs), sinks=2)}
    if quantized:
        fields |= {"k_bits": _format(R, 5, "exponent"), "v_bits": _format(V, 3, "exponent"), "stored_bias": True}
    monkeypatch.setattr("kvfold.runtimes.kernels.head_runs.QUERIES_AT_ONCE", 4)
    dtype, tolerance = (torch.float64, 1e-3) if quantized else (torch.float32, None)
    _compare_with_the_oracle(
        monkeypatch, shape, True, "applied", implementation, dtype=dtype, tolerance=tolerance, **fields
    )


def _compare_with_the_oracle(
    monkeypatch, shape, bias, rope, implementation, dtype=torch.float32, tolerance=None, **fields
):
    monkeypatch.setattr("kvfold.plan.number_format.ELEMENTS_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("kvfold.plan.number_format.FEWEST_TOKENS", 8)
    module, facts, spec, weights, rotary = folded_layer(shape, bias, rope, implementation, **fields)
    module, hidden = module.to(dtype), torch.randn(2, 21, facts.hidden_size, dtype=dtype)
    cos, sin = rotary(hidden, torch.arange(21)[None])
    seen = reference.causal(21)
    expected = []
    for row in hidden.double():
        inputs = (facts, spec, weights, row, cos[0].double(), sin[0].double())
        made = reference.stored(*inputs)
        far = tuple(
            [_stored_and_read(head[:, : side.width], side.format) for head in heads]
            for heads, side in zip(made, spec.sides, strict=True)
        )
        if spec.recent:
            near = tuple(
                [_stored_and_read(head[:, -side.width :], side.format) for head in heads]
                for heads, side in zip(made, spec.recent_sides, strict=True)
            )
            expected.append(reference.folded_attention_by_age(*inputs, seen, far, near))
        else:
            expected.append(reference.folded_attention(*inputs, seen, far))
    expected = torch.stack(expected)
    with torch.no_grad():
        assert_close(module(hidden, position_embeddings=(cos, sin))[0], expected, name="prefill", tolerance=tolerance)
        cache, out = FoldedCache(_one_layer_plan(spec)), []
        for i in range(21):
            rotation = (cos[:, i : i + 1], sin[:, i : i + 1])
            options = {"position_ids": torch.tensor([[i]]), "kv_state": ForwardState(rotary)}
            options |= {"position_embeddings": rotation, "past_key_values": cache}
            out.append(module(hidden[:, i : i + 1], **options)[0])
    assert_close(torch.cat(out, 1), expected, name="decode", tolerance=tolerance)


def _format(width, bits, scales):
    tiers = ((8, 6), (width - 8, bits)) if scales == "exponent" and width > 8 else ((width, bits),)
    return NumberFormat(tiers=tiers, scales=scales)


def _stored_and_read(head_TR, format):
    return head_TR if format is None else reference.decoded(pack(head_TR[None, None], format)[0, 0], format)


def _one_layer_plan(spec):
    from kvfold.plan.cache_spec import SourceLayer
    from kvfold.plan.plan import CachePlan

    source = SourceLayer(num_attention_heads=8, num_kv_heads=4, head_dim=16)
    return CachePlan(dtype="float32", source=(source,), caches=(spec,), kv_sharing_target_layer=(None,))


@pytest.mark.parametrize("model", MODELS)
def test_the_oracle_is_the_original_attention(model):
    """reference.attention in float64 against the stock module: facts, norms, windows, scaling, biases."""
    network = make_tiny(model)
    arch = architecture(network.config.model_type)
    captured = {}
    for index, module in enumerate(arch.modules(network)):
        module.register_forward_hook(
            lambda m, args, kwargs, out, index=index: captured.update({index: (args, kwargs, out[0])}), with_kwargs=True
        )
    logits(network, tokens(1, 30))
    state = network.state_dict()
    for facts in arch.describe(network):
        args, kwargs, expected = captured[facts.index]
        weights = arch.weights(lambda name, i=facts.index: state[arch.attention_prefix(i) + name].double(), facts)
        cos, sin = rotation(kwargs)
        hidden = (args[0] if args else kwargs["hidden_states"])[0].double()
        out = reference.attention(facts, weights, hidden, cos, sin, reference.causal(30, facts.window))
        residual = args[1][0].double() if facts.alibi else 0
        assert_close(expected[0], out + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 16, 4, 16), (1, 40, 4, 16), (2, 24, 1, 32)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_fast_attention_equals_grouped_attention(dtype, heads, padded, monkeypatch):
    C, R, U, V = heads
    torch.manual_seed(0)
    q, z, y = torch.randn(2, 8, 9, R), torch.randn(2, C, 9, R), torch.randn(2, U, 9, V)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[0, :, 3:, :3] = False
    half = [x.to(dtype) for x in (q, z, y)]
    tolerance = 2 * TOLERANCE[dtype]
    expected, _ = grouped_attention(*(x.double() for x in half), mask if padded else None, scale=0.25)
    rows = slice(3, None) if padded else slice(None)  # rows of padding hold nothing
    assert_close(
        prefill_attention(*half, mask if padded else None, scale=0.25)[:, rows], expected[:, rows], tolerance=tolerance
    )
    last = decode_attention(half[0][:, :, -1:], *half[1:], mask[:, :, -1:] if padded else None, scale=0.25)
    assert_close(last, expected[:, -1:], tolerance=tolerance)
    monkeypatch.setattr("kvfold.plan.number_format.ELEMENTS_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("kvfold.plan.number_format.FEWEST_TOKENS", 4)
    for few in (1, 5):
        masks = mask[:, :, -few:] if padded else None
        out = chunked_attention(
            half[0][:, :, -few:],
            lambda a, b: half[1][:, :, a:b],
            lambda a, b: half[2][:, :, a:b],
            9,
            masks,
            elements=1,
            scale=0.25,
        )
        assert_close(out, expected[:, -few:], tolerance=tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_generate_equals_the_original_at_full_width(fold, tiny_dir, model):
    """Greedy, sampled, beams, left padding, several returns, prompt look-up: token by token the original's."""
    folded, original = load(fold(model, "svd_a", kv_budget=1.0).out), load(tiny_dir / model)
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    ways = {
        "greedy": {},
        "sampled": {"do_sample": True, "temperature": 0.8},
        "beams": {"num_beams": 3},
        "beams returned": {"num_beams": 4, "num_return_sequences": 2},
        "sampled beams": {"do_sample": True, "num_beams": 2},
        "without cache": {"use_cache": False},
    }
    for name, options in ways.items():
        out = []
        for network in (original, folded):
            torch.manual_seed(3)
            out.append(network.generate(ids, attention_mask=mask, max_new_tokens=24, **{"do_sample": False} | options))
        assert torch.equal(*out), name
    one = tokens(1, 16).repeat(1, 2)
    expected = original.generate(one, max_new_tokens=24, do_sample=False)
    assert torch.equal(folded.generate(one, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(folded.generate(one, max_new_tokens=24, do_sample=False, assistant_model=original), expected)
    assert torch.equal(folded.generate(one, max_new_tokens=24, do_sample=False, assistant_early_exit=1), expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_padded_row_is_the_row_alone(fold, model):
    network = load(fold(model, "svd_a", kv_budget=0.5).out)
    ids = tokens(2, 12)
    alone = network.generate(ids[:1, 5:], max_new_tokens=20, do_sample=False)
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 0
    batch = network.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(batch[0, 5 : 5 + alone.shape[1]], alone[0])


@pytest.mark.parametrize("model", MODELS)
def test_generate_uses_the_folded_cache_and_holds_planned_bytes(fold, model):
    folded = fold(model, "svd_a", kv_budget=0.5)
    out = load(folded.out).generate(
        tokens(4, 20), max_new_tokens=30, min_new_tokens=30, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values, FoldedCache)
    assert out.past_key_values.nbytes_allocated == folded.plan.kv_bytes(49, batch_size=4)


@pytest.mark.parametrize("model", MODELS)
def test_source_bytes_are_those_of_the_stock_cache(tiny_dir, model):
    plan, folded = load_plan(tiny_dir / model)
    network = load(tiny_dir / model)
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        for i in range(40):
            network(tokens(2, 40)[:, i : i + 1], past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == plan.source_kv_bytes(40, batch_size=2) and not folded


def test_growing_never_copies_the_whole_cache_per_token(fold):
    """The storage stays where it is within a block of 256 tokens."""
    folded = fold("llama_mha", "svd_a", kv_budget=0.5)
    network, cache = load(folded.out), FoldedCache(folded.plan)
    places = []
    with torch.no_grad():
        for i in range(300):
            network(tokens(1, 300)[:, i : i + 1], past_key_values=cache)
            places.append(cache.layers[1].k.data.data_ptr())
    assert len(set(places[:256])) == 1 and len(set(places[256:])) == 1


@pytest.mark.parametrize("model", FULL_ATTENTION)
def test_a_stock_cache_works_too(fold, model):
    network = load(fold(model, "svd_a", kv_budget=0.5).out)
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        parts = [network(tokens()[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
    assert_close(torch.cat(parts, 1), logits(network, tokens()))


def test_attentions_can_be_recorded(fold, tiny_dir):
    outs = []
    for folder in (tiny_dir / "llama_mha", fold("llama_mha", "svd_a", kv_budget=1.0).out):
        network = load(folder, attn_implementation="eager")
        with torch.no_grad():
            outs.append(network(tokens(), output_attentions=True, use_cache=False).attentions)
    assert all(relative_rms(a, b) < 1e-4 for a, b in zip(*outs, strict=True))


def test_models_and_caches_can_be_copied(fold):
    folded = fold("llama_mha", "svd_a", kv_budget=0.5)
    network = load(folded.out)
    with torch.no_grad():
        cache = network(tokens(1, 10), use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        a = network(tokens(1, 1), past_key_values=cache).logits
        b = pickle.loads(pickle.dumps(network))(tokens(1, 1), past_key_values=twin).logits
    assert torch.equal(a, b)


def test_unknown_caches_are_refused(fold):
    network = load(fold("llama_mha", "svd_a", kv_budget=0.5).out)
    with pytest.raises(ValueError, match="cache_implementation='static' cannot hold a folded cache"):
        network.generate(tokens(), max_new_tokens=2, cache_implementation="static")
    other = FoldedCache(fold("llama_mha", "svd_a", kv_budget=0.25).plan)
    with pytest.raises(ValueError, match="made for another model"):
        network(tokens(), past_key_values=other)


def test_a_window_that_was_passed_cannot_be_rolled_back(fold):
    folded = fold("mistral_window", "svd_a", kv_budget=0.5)
    network, cache = load(folded.out), FoldedCache(folded.plan)
    with torch.no_grad():
        network(tokens(1, 8), past_key_values=cache)
        cache.crop(-3)
        network(tokens(1, 20)[:, 5:], past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)


def test_config_objects_hold_the_plan(fold):
    folded = fold("qwen2_bias_tied", "svd_a", kv_budget=0.5)
    network = load(folded.out)
    assert network.kv_plan == folded.plan
    config = source_config(architecture("qwen2"), network.config.to_dict() | {"model_type": "qwen2"})
    assert config.num_key_value_heads == 4
