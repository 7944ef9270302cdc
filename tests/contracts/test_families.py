"""Families whose attention is like another one's: what each method makes of them, and what lies around attention."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXPERTS_IN_TURN, FAMILIES, in_steps, load, logits, make_tiny, rotation, save_tiny, step, tokens

import kvfold
from kvfold.architectures._refused import REFUSED
from kvfold.architectures.base import architecture, source_config
from kvfold.calibration.layerwise_model import StreamedModel
from kvfold.checkpoint.source import open_source, read_layer
from kvfold.compression.export_gqa import export_gqa
from kvfold.compression.recipe import make_recipe
from kvfold.errors import CheckpointError, PlanError, RecipeError
from kvfold.evaluation.inspection import inspect
from kvfold.methods.width._head_grouping import reordered_weights
from kvfold.runtimes import reference
from kvfold.runtimes.kernels.rotary import tables_of
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

CALIBRATION = {"data": "self", "num_samples": 4, "seq_len": 160}
METHODS = {
    "identity": {"preset": "identity"},
    "svd_a": {"preset": "svd_a", "kv_budget": 0.5},
    "full": {"preset": "svd_a", "kv_budget": 1.0},
    "int4": {"preset": "int4_rotated"},
    "auto": {"preset": "auto", "kv_budget": 0.25},
    "small": {"preset": "auto", "kv_budget": 0.25, "prefer": "size"},
    "shared": {"preset": "cla", "depth": {"owners": 2}},
}
NORMS = ("phi_norms", "stablelm_own_norms", "cohere_own_norms")
CASES = [pytest.param(model, method, id=f"{method}-{model}") for method in METHODS for model in FAMILIES]
of_every_family = pytest.mark.parametrize(("model", "method"), CASES)


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """folded(model, method) -> (the source's folder, what was made of it)."""
    root, done = tmp_path_factory.mktemp("families"), {}

    def make(model, method):
        if (root / model).exists() is False:
            save_tiny(make_tiny(model), root / model)
        if (model, method) not in done:
            fields = {"model": str(root / model), "out": str(root / f"{model}-{method}"), "calibration": CALIBRATION}
            run_dir = root / f"{model}.run"
            done[model, method] = kvfold.compress(make_recipe(fields | METHODS[method]), run_dir=run_dir, device="cpu")
        return root / model, done[model, method]

    return make


@pytest.mark.filterwarnings("ignore:kv_budget", "ignore:the plain cache")
@of_every_family
def test_folds(folded, model, method):
    """Cached as uncached and as each sequence alone, in steps and with padding, over drafts that are taken back; bytes as
    planned; with everything kept as the original."""
    source, made = folded(model, method)
    network, ids, plan = exact(made.out, model), tokens(3, 40), made.plan
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[2, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = network(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = network(ids[:1, 11:], use_cache=False).logits
    assert_close(expected[:1, 11:], alone, tolerance=1e-3)
    seen, cache = mask.bool(), FoldedCache(plan)
    found = in_steps(network, ids, mask, positions, cache, [23, *range(24, 41)])
    assert_close(found[seen], expected[seen], tolerance=1e-3)
    assert cache.nbytes_allocated == sum(spec.bytes_allocated(40, 8) for spec in plan.owned) * 3 + position_bytes(plan)
    if method in ("identity", "full"):
        assert_close(logits(load(made.out), ids), logits(load(source), ids), tolerance=1e-5)
    cache = FoldedCache(plan)
    step(network, ids, mask, positions, cache, 0, 30)
    cache.activate_past_recording()
    step(network, ids.flip(1), mask, positions, cache, 30, 36)
    cache.crop(-6)
    again = step(network, ids, mask, positions, cache, 30, 40)
    assert_close(again[seen[:, 30:]], expected[:, 30:][seen[:, 30:]], tolerance=1e-3)


def exact(folder, model):
    """In float64, where nothing depends on how a product was rounded."""
    network = load(folder, dtype=torch.float64, **(EXPERTS_IN_TURN if "experts" in model else {}))
    # tables in float32 depend on how many there are, and a last bit decides between two codes
    if "_vl_" in model or "llama4" in model:
        rotary = network.get_submodule(network.architecture.rotary)
        rotary.forward = functools.partial(complex_tables if "llama4" in model else tables_along_axes, rotary)
    return network


def complex_tables(rotary, hidden, positions):
    """The same of families with one table of complex numbers."""
    angles = positions[..., None].double() * rotary.inv_freq.double()
    return torch.polar(torch.ones_like(angles), angles)


def tables_along_axes(rotary, hidden, positions):
    """cos and sin as the family makes them, in float64."""
    angles = positions.expand(3, -1, -1)[..., None].double() * rotary.inv_freq.double()
    return rotary.recomposition_frequencies(angles.cos()), rotary.recomposition_frequencies(angles.sin())


def position_bytes(plan):
    return 3 * 256 * plan.position_bytes


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize(
    "model",
    [
        "cohere_interleaved",
        "glm_interleaved",
        "smollm3_nope",
        "phi_partial",
        "phi_norms",
        "cohere_own_norms",
        "gptj_partial",
        "mpt_alibi",
    ],
)
def test_latents_that_several_layers_fill(folded, tmp_path, model):
    """Rotated as the family does, at full width the original, however tokens come."""
    source, _ = folded(model, "identity")
    fields = {"model": str(source), "out": str(tmp_path / "out"), "calibration": CALIBRATION, "kv_budget": 1.0}
    uses = {"depth": {"method": "explicit", "uses": "0,0,0"}, "width": {"method": "cross_layer"}}
    made = kvfold.compress(make_recipe(fields | uses), run_dir=tmp_path / "run", device="cpu")
    network, ids, expected = load(made.out), tokens(2, 20), logits(load(source), tokens(2, 20))
    assert_close(logits(network, ids), expected, tolerance=2e-5)
    cache = FoldedCache(made.plan)
    with torch.no_grad():
        parts = [network(ids[:, :13], past_key_values=cache).logits, network(ids[:, 13:], past_key_values=cache).logits]
    assert_close(torch.cat(parts, 1), expected, tolerance=2e-5)


@pytest.mark.parametrize("model", FAMILIES)
def test_what_lies_around_attention_is_copied(folded, model):
    """Bit for bit, under the names that it has in files: experts one by one; or under current ones."""
    source, made = folded(model, "svd_a")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, made.out))
    arch = open_source(source).arch
    before, attention = {arch.current_name(name): tensor for name, tensor in before.items()}, arch.attention
    outside = [name for name in before if f".{attention}." not in name]
    assert outside and sorted(outside) == sorted(name for name in after if f".{attention}." not in name)
    assert all(torch.equal(before[name], after[name]) for name in outside)


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("model", FAMILIES)
def test_generation(folded, model):
    """With a cache as without, beams too; saved and loaded again it says the same."""
    _, made = folded(model, "int4")
    network, ids = exact(made.out, model), tokens(2, 12)
    for beams in (1, 2):
        options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
        assert torch.equal(network.generate(ids, **options), network.generate(ids, use_cache=False, **options))
    network.save_pretrained(made.out.with_name(f"{model}-saved"))
    again = exact(made.out.with_name(f"{model}-saved"), model)
    assert torch.equal(logits(again, ids), logits(network, ids))


@pytest.mark.parametrize(
    ("model", "changes", "named"),
    [
        ("olmo_plain", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe_experts", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mpt_alibi", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv"),
        ("mpt_alibi", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln"),
        ("gptj_partial", {"rotary_dim": 18}, "rotary_dim"),
    ],
)
def test_what_a_family_may_have_and_kvfold_does_not_know(tmp_path, model, changes, named):
    save_tiny(make_tiny(model, **changes), tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"config.json: {named}"):
        open_source(tmp_path / "source")


@pytest.mark.parametrize("model", [*NORMS, "gptj_partial", "codegen_partial", "mpt_alibi"])
def test_what_heads_pass_equals_the_oracle(folded, model):
    """Norms with weights (and biases) as the stock model keeps them, in any order of heads; rotation by whoever makes its
    tables. Statistics are of the same keys."""
    source, _ = folded(model, "identity")
    opened, network, ids = open_source(source), load(source).double(), tokens(1, 12)
    layer, found = opened.layers[0], {}
    module = opened.arch.modules(network)[0]
    module.register_forward_hook(
        lambda m, args, kwargs, out: found.update(kwargs, out=out[0], args=args), with_kwargs=True
    )
    logits(network, ids)
    hidden_1TD = found["args"][0] if found["args"] else found["hidden_states"]
    tables = tables_of(layer, hidden_1TD, found.get("position_embeddings"), found.get("position_ids"))
    cos, sin = rotation({"position_embeddings": tables})
    weights = read_layer(opened.checkpoint, opened.arch, layer)
    streamed, seen = StreamedModel(opened.checkpoint, opened.arch, "cpu"), []
    with torch.no_grad():
        streamed.advance(layer, streamed.embed(ids), seen.append)
    keys = reference.made_heads(layer, weights, "k", hidden_1TD[0], layer.head_dim)
    assert_close(seen[0].k[0].double(), torch.stack([reference.rotate(k, cos, sin) for k in keys]), tolerance=1e-5)
    others = [] if layer.alibi else [reordered_weights(layer, weights, [*range(1, layer.num_kv_heads), 0])]
    for same in (weights, *others):
        expected = reference.attention(layer, same, hidden_1TD[0], cos, sin, reference.causal(12))
        assert_close(found["out"][0], expected, tolerance=1e-5)


def test_tables_that_take_all_memory_are_refused(folded):
    """Which the family's own code would make before anything else is known."""
    source, _ = folded("gptj_partial", "identity")
    config = json.loads((source / "config.json").read_text())
    for name, other in (("n_positions", "max_position_embeddings"), ("max_position_embeddings", "n_positions")):
        fields = {field: value for field, value in config.items() if field != other} | {name: 2**28}
        with pytest.raises(CheckpointError, match="rotary tables"):
            source_config(architecture("gptj"), fields)


def test_buffers_of_old_files_are_left_out(folded, tmp_path):
    """Masks that gptj files carry, which end as biases do."""
    source, _ = folded("gptj_partial", "identity")
    tensors = load_file(source / "model.safetensors")
    for layer in range(3):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    assert set(open_source(tmp_path).checkpoint.tensors) == set(open_source(source).checkpoint.tensors)


def test_experts_that_are_missing_are_named(tmp_path):
    """One of many parts of one parameter."""
    source = save_tiny(make_tiny("mixtral_experts"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    gone = next(name for name in tensors if ".experts.2.w3." in name)
    del tensors[gone]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors.*{gone}"):
        open_source(source)


@pytest.mark.parametrize("model", FAMILIES)
def test_stock_exports(folded, tmp_path, model):
    """What `kvfold export` writes is the family's own, with fewer heads; or it says why it cannot be."""
    source, whole = folded(model, "identity")
    if reason := open_source(source).arch.no_stock_gqa:
        with pytest.raises(PlanError, match=reason.split(",")[0]):
            export_gqa(whole.out, tmp_path / "out")
        return
    recipe = {"model": str(source), "out": str(tmp_path / "half"), "preset": "gqa", "kv_budget": 0.5}
    if open_source(source).layers[0].own_norms:  # which no head can have in the place of two
        with pytest.raises(RecipeError, match="norms that heads have of their own"):
            kvfold.compress(make_recipe(recipe | {"preset": "procrustes"}), device="cpu")
        with pytest.raises(PlanError, match="only plans with all 4 heads"):
            export_gqa(kvfold.compress(make_recipe(recipe), device="cpu").out, tmp_path / "out")
        made, heads = whole.out, 4
    else:
        made, heads = kvfold.compress(make_recipe(recipe), device="cpu").out, 2
    assert export_gqa(made, tmp_path / "out") == heads
    assert_close(logits(load(tmp_path / "out"), tokens()), logits(load(made), tokens()), tolerance=1e-5)


IMAGES = [
    "gemma3_beside_vision",
    "mistral3_beside_vision",
    "llama4_beside_vision",
    *(name for name in FAMILIES if "_vl_" in name),
]


def with_image(model, network):
    """A text with an image in it, and what the model is given beside it."""
    ids, noise = tokens(1, 20), torch.Generator().manual_seed(0)
    ids[0, 3:7] = 3  # the image's
    if "_vl_" in model:
        ids[0, 2], ids[0, 7] = 5, 6  # where it begins and ends
        vision = network.config.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        image = {"pixel_values": torch.randn(16, values, generator=noise), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        return ids, image | {"mm_token_type_ids": (ids == 3).int()}
    size = 28 if "gemma3" in model else 56
    image = {"pixel_values": torch.randn(1, 3, size, size, generator=noise)}
    kinds = {"gemma3": {"token_type_ids": (ids == 3).long()}, "mistral3": {"image_sizes": torch.tensor([[size, size]])}}
    return ids, image | kinds.get(model.partition("_")[0], {})


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("method", ["identity", "int4", "auto", "small"])
@pytest.mark.parametrize("model", IMAGES)
def test_images_pass_beside_text(folded, model, method):
    """Kept whole as the original; otherwise cached as uncached, and as what the original makes of them."""
    source, made = folded(model, method)
    network, original = load(made.out), load(source)
    ids, image = with_image(model, original)
    found = logits(network, ids, **image)
    if method == "identity":  # a norm behind a rotation rounds otherwise than before it
        assert_close(found, logits(original, ids, **image), tolerance=1e-5 if "llama4" in model else 0)
    assert not torch.allclose(found, logits(network, ids), atol=0.1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | image
    with_cache = network.generate(ids, **options)
    assert torch.equal(with_cache, network.generate(ids, use_cache=False, **options))


NOT_IN_VLLM = [*IMAGES, *NORMS, "gpt_oss_experts", "falcon_groups", "bigcode_one_head", "gptj_partial", "llama4_chunks"]


@pytest.mark.parametrize("model", NOT_IN_VLLM)
def test_what_vllm_does_not_serve_is_refused_before_work(folded, tmp_path, model):
    """And the model's card and `kvfold inspect` say so."""
    source, made = folded(model, "identity")
    opened = open_source(source)
    reason = opened.arch.not_served_by_vllm(opened.checkpoint.config)
    recipe = make_recipe({"model": str(source), "out": str(tmp_path / "out"), "runtime": "vllm", "preset": "int8"})
    with pytest.raises(RecipeError, match=reason.split(";")[0]):
        kvfold.compress(recipe, device="cpu")
    assert reason in (made.out / "README.md").read_text()
    assert reason in inspect(made.out).to_json()["servable_by"]["vllm"]


@pytest.mark.parametrize("model_type", ["gpt_neo", "mllama", "mamba", "t5", "deepseek_v3"])
def test_what_is_not_folded_says_why(tmp_path, model_type):
    save_tiny(make_tiny("olmo_plain"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(CheckpointError, match=re.escape(REFUSED[model_type])):
        open_source(tmp_path)
