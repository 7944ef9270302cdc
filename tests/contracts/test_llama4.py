"""What Llama 4 alone does: chunks of positions, norms behind the rotation, queries that grow with their position."""

from __future__ import annotations

import resource

import pytest
import torch
from tiny import in_steps, load, logits, make_tiny, rotation, save_tiny, step, tokens
from transformers import DynamicCache
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, apply_rotary_emb

import kvfold
from kvfold.architectures.base import architecture, empty_model, source_config
from kvfold.checkpoint.source import open_source, read_layer
from kvfold.compression.recipe import make_recipe
from kvfold.errors import CheckpointError
from kvfold.runtimes import reference
from kvfold.runtimes.kernels.rotary import apply_rotary, tables_of
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

CALIBRATION = {"data": "self", "num_samples": 4, "seq_len": 128}
CHUNK = 9
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """folded(recipe, **changes of the tiny model) -> (the source's folder, what was made of it)."""
    root, done = tmp_path_factory.mktemp("llama4"), {}

    def make(recipe, **changes):
        source = root / str(abs(hash(str(changes))))
        if not source.exists():
            save_tiny(make_tiny("llama4_chunks", **changes), source)
        key = (source.name, str(recipe))
        if key not in done:
            out = root / f"{source.name}-{len(done)}"
            fields = {"model": str(source), "out": str(out), "calibration": CALIBRATION}
            done[key] = kvfold.compress(make_recipe(fields | recipe), run_dir=root / f"{source.name}.run", device="cpu")
        return source, done[key]

    return make


def test_a_norm_before_the_rotation_is_that_behind_it():
    """Of every head, since a rotation keeps its length; in the order of numbers that folded layers have."""
    stock = make_tiny("llama4_chunks")
    arch, attention = architecture("llama4_text"), stock.model.layers[0].self_attn
    layer, (norm, _) = arch.describe(stock)[0], arch.norms(attention)
    assert layer.qk_norm and not arch.describe(stock)[1].qk_norm
    x_BTNH, positions = torch.randn(2, 30, 4, 16) * torch.logspace(-3, 2, 4)[:, None], torch.arange(30)[None]
    table = stock.model.rotary_emb(x_BTNH, positions)
    expected = Llama4TextL2Norm(1e-6)(apply_rotary_emb(x_BTNH, x_BTNH, table)[0])
    order = list(layer.order_of_numbers)
    turned = apply_rotary(norm(x_BTNH)[..., order].transpose(1, 2), *tables_of(layer, x_BTNH, table, positions))
    assert_close(turned.transpose(1, 2), expected[..., order], tolerance=1e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_layers_equal_the_oracle(folded, index):
    """One with chunks, rotation and norms; one with queries that grow."""
    source, _ = folded({"preset": "identity"})
    opened, network, found = open_source(source), load(source), {}
    layer = opened.layers[index]
    opened.arch.modules(network)[index].register_forward_hook(
        lambda m, args, kwargs, out: found.update(kwargs, out=out[0]), with_kwargs=True
    )
    logits(network, tokens(1, 30))
    hidden_1TD = found["hidden_states"].double()
    cos, sin = rotation({"position_embeddings": tables_of(layer, hidden_1TD, found["position_embeddings"], None)})
    chunk, weights = torch.arange(30) // CHUNK, read_layer(opened.checkpoint, opened.arch, layer)
    seen = reference.causal(30) & (layer.window is None or chunk == chunk[:, None])
    expected = reference.attention(layer, weights, hidden_1TD[0], cos, sin, seen)
    assert_close(found["out"][0].double(), expected, tolerance=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", [1, 8, 9, 10, 20])
def test_steps_cross_edges_as_in_the_original(folded, prompt, implementation):
    """And a cache holds as many tokens as transformers' own does."""
    source, made = folded({"preset": "identity"})
    original = load(source, attn_implementation=implementation)
    network, ids = load(made.out, attn_implementation=implementation), tokens(2, 40)
    cuts = [prompt, *range(prompt + 1, 26), 31, 40]
    nothing, positions = torch.ones_like(ids), torch.arange(40).expand(2, -1)
    own, stock = FoldedCache(made.plan), DynamicCache(config=original.config)
    expected = in_steps(original, ids, nothing, positions, stock, cuts)
    assert_close(in_steps(network, ids, nothing, positions, own, cuts), expected, tolerance=1e-5)
    assert_close(logits(network, ids), expected, tolerance=1e-5)
    stored = [layer.spec.window or 40 for layer in own.layers]
    assert [layer.keys.shape[2] for layer in stock.layers] == [min(40, n - 1) if n < 40 else 40 for n in stored]
    assert [layer.live()[0].shape[2] for layer in own.layers] == [layer.keys.shape[2] for layer in stock.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe", [{"preset": "svd_a", "kv_budget": 0.5}, {"preset": "int8"}, {"preset": "auto", "kv_budget": 0.25}]
)
def test_kernels_obey_the_mask(folded, recipe, dtype):
    """Steps under the CPU's kernels as a pass without a cache, of a padded batch too, up to rounding: codes may differ by
    one. What another chunk's tokens do when they are seen is far more."""
    _, made = folded(recipe)
    network, ids = load(made.out, dtype=dtype), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    positions, seen = (mask.cumsum(1) - 1).clamp_min(0), mask.bool()
    exact = load(made.out, dtype=torch.float64)
    expected = logits(exact, ids, attention_mask=mask, position_ids=positions)[seen]
    found = in_steps(network, ids, mask, positions, FoldedCache(made.plan), [23, *range(24, 41)])[seen].double()
    assert (found - expected).norm() < (2e-3 if dtype == torch.float32 else 0.1) * expected.norm()


def test_padding_does_not_warm_queries(folded):
    """Positions are those of a sequence alone, where the original counts columns."""
    source, made = folded({"preset": "identity"})
    network, ids = load(made.out), tokens(1, 30)
    padded, mask = torch.cat([torch.zeros(1, 13).long(), ids], 1), torch.ones(1, 43).long()
    mask[:, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    alone, beside = logits(network, ids), {"attention_mask": mask, "position_ids": positions}
    assert_close(logits(network, padded, **beside)[:, 13:], alone, tolerance=1e-5)
    assert not torch.allclose(logits(load(source), padded, **beside)[:, 13:], alone, atol=1e-2)
    generated = network.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)
    expected = network.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(generated[:, 43:], expected[:, 30:])


def test_drafts_are_taken_back_over_an_edge(folded):
    _, made = folded({"preset": "identity"})
    network, ids = load(made.out), tokens(2, 40)
    nothing, positions, cache = torch.ones_like(ids), torch.arange(40).expand(2, -1), FoldedCache(made.plan)
    step(network, ids, nothing, positions, cache, 0, 25)
    cache.activate_past_recording()
    step(network, ids.flip(1), nothing, positions, cache, 25, 30)  # 27 begins a chunk
    cache.crop(-5)
    again = step(network, ids, nothing, positions, cache, 25, 40)
    assert_close(again, logits(network, ids)[:, 25:], tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_latents_that_layers_without_chunks_fill_together(folded):
    changes = {"layer_types": ["full_attention"] * 3}
    uses = {"depth": {"method": "explicit", "uses": "0,0,0"}, "width": {"method": "cross_layer"}, "kv_budget": 1.0}
    source, made = folded(uses, **changes)
    network, ids, expected = load(made.out), tokens(2, 20), logits(load(source), tokens(2, 20))
    assert_close(logits(network, ids), expected, tolerance=2e-5)
    found = in_steps(network, ids, torch.ones_like(ids), torch.arange(20)[None], FoldedCache(made.plan), [13, 14, 20])
    assert_close(found, expected, tolerance=2e-5)


def test_gradients_of_recomputed_layers(folded):
    """Which ask for positions long after the forward."""
    _, made = folded({"preset": "svd_a", "kv_budget": 0.5})
    grads = []
    for checkpointing in (False, True):
        network, ids = load(made.out).train(), tokens(2, 30)
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        positions = torch.arange(30).expand(2, -1) + torch.tensor([[0], [7]])
        network(ids, position_ids=positions, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        grads.append(network.model.layers[1].self_attn.q_proj.weight.grad)
    assert_close(*grads, tolerance=1e-6)


def test_tables_that_are_scaled(folded):
    """Are those of the original where no norm stands behind them; else they are refused by the field."""
    source, made = folded({"preset": "identity"}, rope_parameters=YARN, use_qk_norm=False)
    assert_close(logits(load(made.out), tokens()), logits(load(source), tokens()), tolerance=1e-5)
    with pytest.raises(CheckpointError, match="config.json: rope_parameters .* use_qk_norm"):
        folded({"preset": "identity"}, rope_parameters=YARN)


def test_rope_of_llama3(folded):
    """As Scout has it."""
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    changes = {"rope_parameters": scaled | {"original_max_position_embeddings": 64}}
    source, made = folded({"preset": "svd_a", "kv_budget": 1.0}, **changes)
    assert_close(logits(load(made.out), tokens()), logits(load(source), tokens()), tolerance=1e-5)


def test_facts_of_maverick_take_no_memory():
    """Of which one layer's experts are 64 GB."""
    arch, peak = architecture("llama4"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False}
    layers = arch.describe(empty_model(arch, source_config(arch, {"model_type": "llama4", "text_config": text})))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # kilobytes
    assert [layer.window for layer in layers] == [8192, 8192, 8192, None] * 12
    assert [layer.rotary_dim for layer in layers] == [128, 128, 128, 0] * 12
    assert [layer.temperature for layer in layers] == [None, None, None, (0.1, 8192)] * 12


@pytest.mark.parametrize("field", [{"attention_chunk_size": None}, {"attention_chunk_size": 0}, {"floor_scale": 0}])
def test_sizes_that_are_none_are_refused(field):
    arch, config = architecture("llama4_text"), make_tiny("llama4_chunks").config.to_dict() | field
    with pytest.raises(CheckpointError, match=f"config.json: {next(iter(field))} is "):
        arch.describe(empty_model(arch, source_config(arch, config)))
