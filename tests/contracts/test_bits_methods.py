"""What every bits method promises, over tiny models of every family. A new method is found by itself."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file
from tiny import FULL_ATTENTION, MODELS, check_gradients_through_a_cache, in_steps, load, logits, step, tokens

import kvfold
from kvfold import registry
from kvfold.checkpoint.source import load_plan
from kvfold.compression.recipe import make_recipe
from kvfold.evaluation.texts import evaluate_models
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import dispatch
from kvfold.runtimes.kernels import packed_tokens as packed
from kvfold.runtimes.kernels.attention import weighted
from kvfold.runtimes.kernels.codec import pack, unpack, unpack_scaled
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close, relative_rms

LATENT = {"method": "fisher", "multiple": 4}
CASES = {
    "integer": [
        ({"method": "identity"}, {"k_bits": 4, "v_bits": 4}),
        ({"method": "identity"}, {"k_bits": 4, "v_bits": 4, "scales": "affine"}),
        ({"method": "orthogonal"}, {"k_bits": 3, "v_bits": 5}),
        (LATENT, {"k_bits": 4, "v_bits": 4}),
        ({"method": "mla", "multiple": 4}, {"k_bits": 4}),
        ({"method": "palu", "multiple": 4}, {"k_bits": 4, "v_bits": 4}),
        ({"method": "svd_w", "latent": "group", "multiple": 4}, {"k_bits": 6, "v_bits": 6}),
        ({"method": "mean_pool"}, {"k_bits": 8, "v_bits": 8}),
        ({"method": "autoencoder", "hidden": 8, "steps": 5}, {"k_bits": 6, "v_bits": 6}),
    ],
    "fp8": [({"method": "identity"}, {}), (LATENT, {})],
    "kivi": [
        ({"method": "identity"}, {"k_bits": 4, "v_bits": 4, "block": 16}),
        (LATENT, {"k_bits": 4, "v_bits": 4, "block": 8}),
    ],
    "turboquant": [
        ({"method": "orthogonal", "sides": "keys"}, {}),
        ({"method": "identity"}, {"k_bits": 8}),
        ({"method": "palu", "multiple": 4}, {"k_bits": 3, "v_bits": 3, "norm_correction": False}),
    ],
    "mixed": [
        ({"method": "kvtc", "multiple": 4}, {}),
        (LATENT, {}),
        (LATENT | {"rope": "on_read"}, {}),
        ({"method": "mla", "multiple": 4}, {}),
        ({"method": "mla", "multiple": 4, "below": 0, "group_size": 1}, {}),
        ({"method": "logit"}, {"tiers": 2, "least": 2}),
    ],
}
WHOLE = ("identity", "orthogonal")
METHODS = [
    pytest.param(
        width, {"method": method, **fields}, id="-".join([width["method"], method, *map(str, fields.values())])
    )
    for method in registry.names("bits")
    if method != "identity"
    for width, fields in CASES[method]
]
ON_EVERY_MODEL = [pytest.param(model, *m.values, id=f"{m.id}-{model}") for m in METHODS for model in MODELS]
every_method = pytest.mark.parametrize(("model", "width", "bits"), ON_EVERY_MODEL)
every_method_on_llama = pytest.mark.parametrize(("width", "bits"), METHODS)


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    """fold(model, width, bits, kv_budget) -> the folded folder; the same call folds once."""
    root, done = tmp_path_factory.mktemp("bits"), {}

    def run(model, width, bits, kv_budget=None):
        key = f"{model} {width} {bits} {kv_budget}"
        if key not in done:
            fields = {"width": width, "bits": bits, "kv_budget": kv_budget, "out": str(root / f"{len(done)}")}
            calibration = {"data": "self", "num_samples": 8, "seq_len": 48}
            recipe = make_recipe(fields | {"model": str(tiny_dir / model), "calibration": calibration})
            done[key] = kvfold.compress(recipe, run_dir=root / "run", device="cpu")
        return done[key]

    return run


def small(width):
    return None if width["method"] in WHOLE else 0.25


def double(folder):
    """In float64 no code depends on how a product was rounded, so that equal means equal."""
    return load(folder, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_method
def test_real_bytes_are_planned_bytes(fold, model, width, bits):
    """After prefill and after decoding, batch 2, in the checkpoint's dtype."""
    plan = fold(model, width, bits, small(width)).plan
    network, cache, ids = load(fold(model, width, bits, small(width)).out), FoldedCache(plan), tokens(2, 50)
    assert plan.kv_budget < (0.6 if width["method"] in WHOLE else 0.25001)
    with torch.no_grad():
        for start, end in ((0, 37), *((i, i + 1) for i in range(37, 50))):
            network(ids[:, start:end], past_key_values=cache)
            assert cache.nbytes_allocated == plan.kv_bytes(end, batch_size=2)
            assert cache.nbytes <= cache.nbytes_allocated


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_method
def test_cached_equals_uncached(fold, model, width, bits):
    """Token by token = prefill + decode = chunks = no cache, with left padding, batch > 1 and after a crop."""
    folded = fold(model, width, bits, small(width))
    if folded.plan.depends_on_steps:
        pytest.skip("tokens of a block that is not full are exact; see test_blocks")
    network, ids = double(folded.out), tokens(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected, seen = logits(network, ids, attention_mask=mask, position_ids=positions), mask.bool()
    for cuts in ([*range(1, 31)], [17, *range(18, 31)], [20, 30], [30]):
        found = in_steps(network, ids, mask, positions, FoldedCache(folded.plan), cuts)
        # some families normalise in float32 whatever the dtype: now and then one code falls on the other side
        assert_close(found[seen], expected[seen], tolerance=1e-3, name=f"cuts {cuts[:3]}")
    if model in FULL_ATTENTION:  # a window that was passed cannot be rolled back
        cache = FoldedCache(folded.plan)
        step(network, ids, mask, positions, cache, 0, 20)
        step(network, ids.flip(1), mask, positions, cache, 20, 26)
        cache.crop(-6)
        assert_close(
            step(network, ids, mask, positions, cache, 20, 30), expected[:, 20:], tolerance=1e-3, name="after a crop"
        )


@pytest.mark.parametrize("model", FULL_ATTENTION)
def test_blocks(fold, model):
    """Whole blocks are quantized, the rest is exact; a crop into a block brings its tokens back; one prompt in one step is
    what no cache gives."""
    folded = fold(model, {"method": "identity"}, {"method": "kivi", "k_bits": 8, "v_bits": 8, "block": 8})
    network, ids = double(folded.out), tokens(2, 30)
    cache = FoldedCache(folded.plan)
    with torch.no_grad():
        assert_close(network(ids, past_key_values=cache).logits, logits(network, ids), tolerance=1e-6)
        layer = cache.owned[0].k
        assert (layer.blocks.end, layer.count) == (3, 6)
        cache.crop(-11)
        assert (layer.blocks.end, layer.count) == (2, 3)
        again = network(ids[:, 19:], past_key_values=cache).logits
        assert (layer.blocks.end, layer.count) == (3, 6)
    assert_close(again, logits(network, ids)[:, 19:], tolerance=2e-2)


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_method_on_llama
def test_beams_and_padding_under_generate(fold, width, bits):
    """Beam search reorders rows; a padded row is the row alone."""
    folded = fold("llama_mha", width, bits, small(width))
    network, ids = double(folded.out), tokens(2, 20)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    together = network.generate(ids, num_beams=3, **options)
    assert torch.equal(together[1:], network.generate(ids[1:], num_beams=3, **options))
    if folded.plan.depends_on_steps:  # padding moves the ends of blocks
        return
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(25) >= 5).long().expand(2, -1)
    alone, beside = network.generate(ids, **options), network.generate(padded, attention_mask=mask, **options)
    assert torch.equal(alone, beside[:, 5:])


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_method_on_llama
def test_a_decode_step_never_unpacks_the_whole_cache(fold, width, bits, monkeypatch):
    """Peak extra memory is what the plan states."""
    folded = fold("llama_mha", width, bits, small(width))
    network, ids, sizes = load(folded.out), tokens(2, 60), []
    monkeypatch.setattr("kvfold.plan.number_format.ELEMENTS_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("kvfold.plan.number_format.FEWEST_TOKENS", 16)
    monkeypatch.setattr("kvfold.runtimes.kernels.cpu_decode.serves", lambda *_: False)
    for module, name in ((dispatch, "unpack"), (packed, "unpack"), (packed, "unpack_scaled")):
        monkeypatch.setattr(module, name, functools.partial(_watched, getattr(module, name), sizes))
    cache = FoldedCache(folded.plan)
    with torch.no_grad():
        network(ids[:, :40], past_key_values=cache)
        for start, end in ((40, 41), (41, 59), (59, 60)):
            sizes.clear()
            network(ids[:, start:end], past_key_values=cache)
            stored = len(cache.owned[0].buffers)  # a latent of both is unpacked once
            assert len(sizes) > stored * len(cache.owned), "a step reads several pieces of each side"
            pieces = [sum(sides) for sides in zip(*(sizes[i::stored] for i in range(stored)), strict=True)]
            assert max(pieces) <= folded.plan.kv_workspace_bytes(batch_size=2)


def _watched(unpack, sizes, *args):
    made = unpack(*args)
    parts = [made] if isinstance(made, torch.Tensor) else [codes for codes, _ in made]
    sizes.append(sum(part.numel() * part.element_size() for part in parts))
    return made


def test_more_bits_lose_less(fold, tiny_dir):
    original = load(tiny_dir / "llama_yarn")
    expected = logits(original, tokens())
    for width in ({"method": "identity"}, {"method": "orthogonal"}, LATENT | {"kv_heads": 4}):
        lost = [
            relative_rms(
                logits(load(fold("llama_yarn", width, {"method": "integer", "k_bits": b, "v_bits": b}).out), tokens()),
                expected,
            )
            for b in (2, 4, 6, 8)
        ]
        assert lost == sorted(lost, reverse=True) and lost[-1] < 0.02


@pytest.mark.parametrize("model", MODELS)
def test_many_bits_are_nearly_the_original(fold, tiny_dir, model):
    """A full-width latent of 8 bits, centred, arranged and rotated, on every family."""
    width = LATENT | {"rope": "on_read", "kv_heads": MODELS[model][1].get("num_key_value_heads", 4)}
    folded = fold(model, width, {"method": "integer", "k_bits": 8, "v_bits": 8})
    assert_close(logits(load(folded.out), tokens()), logits(load(tiny_dir / model), tokens()), tolerance=0.05)


def test_mixed_bits_beat_equal_ones(fold, tiny_dir):
    """At the same bytes, on keys and values that lose energy quickly."""
    mixed = fold("llama_mha", LATENT, {"method": "mixed"}, 0.12)
    equal = fold("llama_mha", LATENT, {"method": "integer", "k_bits": 4, "v_bits": 4}, 0.12)
    base, windows = load(tiny_dir / "llama_mha"), tokens(8, 48)
    kl = [evaluate_models(load(f.out), base, windows, f.plan).kl for f in (mixed, equal)]
    assert kl[0] < kl[1] and mixed.plan.kv_budget <= 0.12


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_method_on_llama
def test_plans_round_trip_and_models_are_saved(fold, tmp_path, width, bits):
    folded = fold("llama_mha", width, bits, small(width))
    assert load_plan(folded.out)[0] == folded.plan
    network = load(folded.out)
    network.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), tokens()), logits(network, tokens()))


@pytest.mark.parametrize("rope", ["applied", "on_read"])
@pytest.mark.parametrize("model", MODELS)
def test_what_half_precision_stores_is_precise_enough(tiny_dir, tmp_path, model, rope):
    """Weights of latents in bfloat16: balancing small numbers must not cost more digits than there are. Several of these
    families have directions in which nothing varies."""
    source = load(tiny_dir / model, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "half")
    heads = MODELS[model][1].get("num_key_value_heads", 4)
    fields = {"model": str(tmp_path / "half"), "calibration": {"data": "self", "num_samples": 16, "seq_len": 64}}
    fields |= {"width": LATENT | {"rope": rope, "kv_heads": heads}}
    error = []
    for name, bits in (("plain", {"method": "identity"}), ("bits", {"method": "integer", "k_bits": 8, "v_bits": 8})):
        made = kvfold.compress(fields | {"out": str(tmp_path / name), "bits": bits}, device="cpu")
        found, expected = (
            logits(load(folder, dtype=torch.float32), tokens()) for folder in (made.out, tmp_path / "half")
        )
        error.append(relative_rms(found, expected))
    assert error[1] < max(6 * error[0], 0.03)


@pytest.mark.parametrize("method", [{"method": "logit"}, {"method": "mean_pool"}, {"method": "identity"}])
@pytest.mark.parametrize("bits", [{"method": "integer"}, {"method": "kivi", "block": 8}])
def test_layers_that_read_a_packed_cache(tiny_dir, tmp_path, method, bits):
    recipe = {"model": str(tiny_dir / "llama_mha"), "out": str(tmp_path / "out"), "width": method, "bits": bits}
    recipe |= {
        "depth": {"method": "explicit", "uses": "0,0,2"},
        "calibration": {"data": "self", "num_samples": 8, "seq_len": 48},
    }
    folded = kvfold.compress(recipe | {"kv_budget": 0.1 if method["method"] == "logit" else None}, device="cpu")
    network, ids, cache = double(folded.out), tokens(2, 24), FoldedCache(folded.plan)
    with torch.no_grad():
        out = [network(ids[:, :16], past_key_values=cache).logits, network(ids[:, 16:], past_key_values=cache).logits]
    assert_close(torch.cat(out, 1), logits(network, ids), tolerance=1e-5 if bits["method"] == "integer" else 0.2)
    assert len(cache.owned) == 2
    if bits["method"] == "integer":  # the exact tokens of the other are in float64 here
        assert cache.nbytes_allocated == folded.plan.kv_bytes(24, batch_size=2)


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_method_on_llama
def test_gradients_pass_through_a_cache(fold, width, bits):
    network = double(fold("llama_mha", width, bits, small(width)).out)
    check_gradients_through_a_cache(network, tokens(2, 24), tolerance=1e-6)


def test_assisted_decoding_over_packed_windows(fold):
    network = double(fold("qwen3_norm_window", LATENT, {"method": "mixed"}, 0.25).out)
    ids = tokens(1, 20)
    options = {"max_new_tokens": 16, "do_sample": False}
    plain = network.generate(ids, **options)
    assert torch.equal(network.generate(ids, prompt_lookup_num_tokens=3, **options), plain)


def test_keys_of_windows_keep_their_own_bits(fold):
    plan = fold("mistral_window", {"method": "identity"}, {"method": "kivi", "k_bits": 8, "v_bits": 2}).plan
    assert {(spec.k_bits.tiers[0][1], spec.v_bits.tiers[0][1]) for spec in plan.owned} == {(8, 2)}


def test_only_keys_are_turned(fold, tiny_dir):
    """By an orthogonal matrix, the same for every head."""
    out = fold("llama_mha", {"method": "orthogonal", "sides": "keys"}, {"method": "turboquant"}).out
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_dir / "llama_mha", out))
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn."
        assert torch.equal(after[f"{name}v_proj.weight"], before[f"{name}v_proj.weight"])
        assert torch.equal(after[f"{name}o_proj.weight"], before[f"{name}o_proj.weight"])
        turns = after[f"{name}k_a_proj.weight"]
        assert_close(turns[0] @ turns[0].T, torch.eye(len(turns[0])))
        assert turns[0].abs().max() < 0.9 and torch.equal(turns, turns[:1].expand_as(turns))


def test_latents_are_as_narrow_as_asked(fold):
    """A number of heads is a number of numbers, with mixed bits too."""
    plan = fold("llama_mha", LATENT | {"kv_heads": 2}, {"method": "mixed"}, 0.2).plan
    assert max(side.elements for spec in plan.owned for side in spec.sides) <= 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_times_small_scales_do_not_vanish(dtype):
    """A sink takes nearly all attention, values are small: half precision still adds up the tail."""
    format = NumberFormat(tiers=((16, 8),))
    torch.manual_seed(0)
    values = 0.02 * torch.randn(1, 1, 4096, 16)
    weights = torch.full((1, 1, 1, 4096), 0.01 / 4095)
    weights[..., 0] = 0.99
    rows = pack(values, format)
    exact = weights @ unpack(rows, format, torch.float32)
    found = weighted(weights, unpack_scaled(rows, format, dtype), dtype)
    assert_close(found, exact, tolerance=5e-3)
