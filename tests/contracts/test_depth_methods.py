"""What every depth method promises: valid layouts, readers that see the right keys, and one stored tensor per owner."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import MIXED_WINDOWS, MODELS, load, logits, make_tiny, rotation, save_tiny, tokens
from transformers import DynamicCache, GPTNeoXConfig

import kvfold
from kvfold import registry
from kvfold.architectures.base import architecture, empty_model
from kvfold.checkpoint.source import open_source, read_layer
from kvfold.compression.allocate import allocate, choose_layout
from kvfold.compression.presets import MLKV_PAPER
from kvfold.compression.recipe import make_recipe
from kvfold.compression.request import Axes, Request
from kvfold.errors import RecipeError
from kvfold.methods.bits.identity import Identity as Bits
from kvfold.methods.length.identity import Identity as Length
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.plan import CachePlan
from kvfold.runtimes import reference
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close, relative_rms

FIELDS = {
    "identity": {},
    "contiguous": {"owners": 2},
    "cla": {"factor": 2},
    "measured": {"owners": 2},
    "dissimilar": {"owners": 2},
}
LAYOUTS = [pytest.param({"method": name, **fields}, id=name) for name, fields in FIELDS.items()]
SHARING = [
    pytest.param(depth, width, id=f"{depth['method']}-{'-'.join(map(str, width.values()))}")
    for depth in (
        {"method": "contiguous", "owners": 1},
        {"method": "measured", "owners": 2, "layout": "any"},
    )
    for width in (
        {"method": "identity"},
        {"method": "mean_pool", "kv_heads": 2},
        {"method": "logit", "kv_heads": 1, "v_latent": "layer"},
        {"method": "svd_a", "latent": "group"},
        {"method": "svd_w", "v_latent": "layer"},
    )
]
every_model = pytest.mark.parametrize("model", MODELS)
every_sharing = pytest.mark.parametrize(("depth", "width"), SHARING)


@pytest.fixture(scope="session")
def shared(tiny_dir, tmp_path_factory):
    """shared(model, depth, width) -> the folded folder; the same call folds once."""
    root, done = tmp_path_factory.mktemp("shared"), {}

    def run(model, depth, width, source=None):
        key = f"{model} {depth} {width}"
        if key not in done:
            recipe = {
                "model": str(source or tiny_dir / model),
                "out": f"{root}/{len(done)}",
                "depth": depth,
                "width": width,
            }
            calibration = {"data": "self", "num_samples": 16, "seq_len": 64}
            done[key] = kvfold.compress(
                make_recipe(recipe | {"calibration": calibration}), run_dir=root / "run", device="cpu"
            )
        return done[key]

    return run


@pytest.fixture(scope="session")
def twelve(tmp_path_factory):
    """A GPT-NeoX of 12 layers x 12 heads, as Pythia-160M, 8 numbers per head."""
    network = make_tiny(
        "neox_partial", hidden_size=96, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12
    )
    return save_tiny(network, tmp_path_factory.mktemp("twelve") / "model")


def test_every_method_is_tried():
    assert {*FIELDS, "explicit"} == set(registry.names("depth"))


@every_model
@pytest.mark.parametrize("depth", LAYOUTS)
def test_readers_read_earlier_owners_with_the_same_window(shared, model, depth):
    """The plan's own validation refuses anything else, so a fold that succeeds is a valid layout."""
    plan = shared(model, depth, {"method": "identity"}).plan
    owners = [layer for layer in range(3) if plan.owner(layer) == layer]
    assert len(owners) == (3 if depth["method"] == "identity" else 2)


@every_model
@every_sharing
def test_cached_equals_uncached_equals_the_oracle(shared, model, depth, width):
    """Token by token = prefill + decode = no cache, with left padding; and the plain attention of reference.py."""
    if depth.get("owners") == 1 and model in MIXED_WINDOWS:
        depth = depth | {"owners": 2}
    if MODELS[model][1].get("num_key_value_heads", 4) % width.get("kv_heads", 1):
        width = width | {"kv_heads": 1}
    folded = shared(model, depth, width)
    network, ids = load(folded.out), tokens(3, 30)
    assert_close(logits(network, ids), logits_by_the_oracle(network, ids), name="oracle")
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = logits(network, ids, attention_mask=mask, position_ids=positions)
    for cuts in ([*range(1, 31)], [17, *range(18, 31)], [8, 20, 30]):
        for cache in (FoldedCache(folded.plan), DynamicCache(config=network.config)):
            if isinstance(cache, DynamicCache) and any(spec.window for spec in folded.plan.owned):
                continue
            start, out = 0, []
            for end in cuts:
                options = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                with torch.no_grad():
                    out.append(network(ids[:, start:end], past_key_values=cache, **options).logits)
                start = end
            assert_close(torch.cat(out, 1)[mask.bool()], expected[mask.bool()], name=f"cuts {cuts[:3]}")
            if isinstance(cache, FoldedCache):
                assert cache.nbytes_allocated == folded.plan.kv_bytes(30, batch_size=3)


@torch.no_grad()
def logits_by_the_oracle(network, ids):
    """The family's own forward, with every attention replaced by reference.py in float64, one sequence at a time."""
    arch, plan = network.architecture, network.kv_plan
    stored = {}

    def oracle(module, args, kwargs, out):
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = rotation(kwargs)
        weights = FoldedWeights.from_state_dict({name: t.double() for name, t in module.state_dict().items()})
        rows = []
        for row, hidden_TD in enumerate(hidden.double()):
            inputs = (module.layer, module.spec, weights, hidden_TD, cos, sin)
            if plan.owner(module.layer_idx) == module.layer_idx:
                stored[module.layer_idx, row] = reference.stored(*inputs)
            seen = reference.causal(len(hidden_TD), module.spec.window)
            cache = stored[plan.owner(module.layer_idx), row]
            rows.append(reference.folded_attention(*inputs, seen, cache))
        return torch.stack(rows).to(hidden.dtype) + (args[1] if len(args) > 1 else 0), None

    hooks = [module.register_forward_hook(oracle, with_kwargs=True) for module in arch.modules(network)]
    try:
        return logits(network, ids)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", MLKV_PAPER)
def test_the_nine_configurations_of_the_mlkv_paper(shared, twelve, name):
    """Cached = prefilled = uncached logits, which the published code misses by up to 14 %; one storage per owner."""
    fragment = MLKV_PAPER[name].fragment
    folded = shared(name, fragment["depth"], fragment["width"], source=twelve)
    network, ids, cache = load(folded.out), tokens(2, 40), FoldedCache(folded.plan)
    with torch.no_grad():
        prefilled = network(ids[:, :25], past_key_values=cache).logits
        parts = [network(ids[:, i : i + 1], past_key_values=cache).logits for i in range(25, 40)]
    assert_close(torch.cat([prefilled, *parts], 1), logits(network, ids), tolerance=1e-5)
    assert folded.plan.kv_bytes_per_token() == int(name.partition("-")[2]) * 2 * 8 * 4
    storages = {b.data.untyped_storage().data_ptr() for layer in cache.owned for b in (layer.k, layer.v)}
    assert len(storages) == 2 * fragment["depth"]["owners"] == 2 * len(cache.owned)
    assert len(cache.layers) == 12


KIB_PER_TOKEN = {
    "MHA-144": 36, "GQA-48": 12, "MLKV-48": 12, "MQA-12": 3, "MLKV-12": 3, "MLKV-6": 1.5, "MLKV-4": 1, "MLKV-2": 0.5,
    "MLKV-1": 0.25,
}  # fmt: skip
"""Pythia-160M in half precision (arXiv 2406.09297): 2 sides x owners x heads x 64 numbers x 2 bytes."""


@pytest.mark.parametrize("name", MLKV_PAPER)
def test_cache_bytes_of_pythia_160m_are_the_papers(name):
    """From the tensors that the cache allocates for a batch of 2 x 512 tokens at Pythia-160M's shape."""
    plan = pythia_160m_plan(name)
    cache = FoldedCache(plan)
    for layer in cache.owned:
        spec = layer.spec
        layer.update(
            torch.zeros(2, spec.num_kv_heads, 512, spec.head_dim, dtype=torch.float16),
            torch.zeros(2, spec.num_v_heads, 512, spec.v_head_dim, dtype=torch.float16),
        )
    assert cache.nbytes_allocated == 2 * 512 * KIB_PER_TOKEN[name] * 1024


def pythia_160m_plan(name) -> CachePlan:
    config = GPTNeoXConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, rotary_pct=0.25
    )
    arch = architecture("gpt_neox")
    layers = arch.describe(empty_model(arch, config))
    recipe = make_recipe({"model": "-", "out": "-", "preset": name})
    axes = Axes(depth=recipe.method("depth"), width=recipe.method("width"), bits=Bits(), length=Length())
    asked = Request(layers=layers, targets=(None,) * len(layers), axes=axes, dtype="float16")
    request = dataclasses.replace(asked, targets=choose_layout(asked, kv_budget=None, sample=None))
    return allocate(request, kv_budget=None, strategy="uniform", curves=dict)


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        (6, [0, 2, 4, 6, 8, 10]),
        (4, [0, 3, 6, 9]),
        (2, [0, 6]),
        (1, [0]),
        (5, [0, 2, 4, 7, 9]),
        (12, list(range(12))),
    ],
)
def test_the_published_index_formula(owners, expected):
    plan = pythia_160m_plan("MLKV-1")
    recipe = make_recipe({"model": "-", "out": "-", "depth": {"method": "contiguous", "owners": owners}})
    arch = architecture("gpt_neox")
    layers = arch.describe(empty_model(arch, GPTNeoXConfig(num_hidden_layers=12)))
    targets = recipe.method("depth").layouts(layers, None)[0]
    assert [layer for layer, target in enumerate(targets) if target is None] == expected
    assert plan.readers(0) == list(range(12))


def test_the_budget_chooses_owners_and_heads(twelve, tmp_path):
    """At the bytes of MQA: six owners of two heads, the fewest layers per cache."""
    recipe = {"model": str(twelve), "out": str(tmp_path / "out"), "preset": "mlkv", "kv_budget": "1/12"}
    plan = kvfold.compress(recipe, device="cpu").plan
    assert plan.kv_budget == pytest.approx(1 / 12)
    assert len(plan.owned) == 6 and plan.owned[0].num_kv_heads == 2
    with pytest.raises(RecipeError, match="--owners 6"):
        kvfold.compress(recipe | {"kv_budget": None, "out": str(tmp_path / "other")}, device="cpu")


def test_merging_is_the_arithmetic_mean(shared, twelve):
    """Of all heads of all layers of the group; pythia-mlkv's running half-and-half gives the top layer a half."""
    fragment = MLKV_PAPER["MLKV-4"].fragment
    folded = shared("MLKV-4", fragment["depth"], fragment["width"], source=twelve)
    merged, source = load(folded.out), open_source(twelve)
    heads = [read_layer(source.checkpoint, source.arch, layer) for layer in source.layers[3:6]]
    attention = network_attention(merged, 3)
    for name in ("k_proj", "v_proj", "k_bias", "v_bias"):
        expected = torch.stack([getattr(w, name).unflatten(0, (12, 8)) for w in heads]).mean((0, 1))
        projection = getattr(attention, name[:1] + "_proj")
        assert_close(projection.bias if name.endswith("bias") else projection.weight, expected)


def network_attention(network, layer):
    return network.architecture.modules(network)[layer]


def test_gradient_checkpointing_reaches_the_owner(shared, twelve):
    fragment = MLKV_PAPER["MLKV-2"].fragment
    network = load(shared("MLKV-2", fragment["depth"], fragment["width"], source=twelve).out).train()
    ids = tokens(2, 20)
    network(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in network.named_parameters()}
    assert expected["gpt_neox.layers.0.attention.k_proj.weight"].abs().sum() > 0
    network.zero_grad()
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network(ids, labels=ids).loss.backward()
    assert all(
        relative_rms(p.grad, expected[n]) < 1e-5 for n, p in network.named_parameters() if p.grad.abs().sum() > 0
    )
    with pytest.raises(ValueError, match="would silently lose the gradients"):
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize("model", ["llama_yarn", "neox_partial", "mistral_window"])
def test_generation_with_shared_caches(shared, model):
    """Beams, prompt look-up (which crops), and a padded row: the same tokens as without a cache or alone."""
    folded = shared(
        model, {"method": "contiguous", "owners": 1}, {"method": "logit", "kv_heads": 1, "v_latent": "layer"}
    )
    network, ids = load(folded.out), tokens(2, 14)
    for options in ({}, {"num_beams": 3}):
        cached = network.generate(ids, max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(
            cached, network.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, **options)
        )
    one = tokens(1, 8).repeat(1, 2)
    expected = network.generate(one, max_new_tokens=12, do_sample=False)
    assert torch.equal(network.generate(one, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), expected)
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 0
    alone = network.generate(ids[:1, 5:], max_new_tokens=12, do_sample=False)
    batch = network.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(batch[0, 5 : 5 + alone.shape[1]], alone[0])


def test_an_explicit_list_is_followed(shared):
    plan = shared("llama_mha", {"method": "explicit", "uses": "0,1,0"}, {"method": "identity"}).plan
    assert plan.kv_sharing_target_layer == (None, None, 0)


def test_a_part_of_a_sharing_model_says_why_it_cannot_run(shared):
    network = load(shared("llama_mha", {"method": "contiguous", "owners": 1}, {"method": "identity"}).out)
    with pytest.raises(ValueError, match=r"layer 1 reads the cache of layer 0.*whole"):
        network.model(tokens())


@pytest.mark.parametrize("model", ["bloom_alibi", "gpt2_conv"])
def test_gradient_checkpointing_in_families_that_drop_keywords(shared, model):
    network = load(
        shared(model, {"method": "contiguous", "owners": 1}, {"method": "mean_pool", "kv_heads": 2}).out
    ).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for attention in network.architecture.modules(network):
        attention.layer = dataclasses.replace(attention.layer, attention_dropout=0.0, output_dropout=0.0)
    ids = tokens(2, 20)
    network(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network(ids, labels=ids).loss.backward()
    assert all(
        relative_rms(p.grad, expected[n]) < 1e-4 for n, p in network.named_parameters() if p.grad.abs().sum() > 1e-6
    )
