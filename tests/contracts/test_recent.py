"""The newest tokens in a finer form: whatever the steps in which tokens come, a query sees each by its age."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import FULL_ATTENTION, MODELS, check_gradients_through_a_cache, in_steps, load, step, tokens
from transformers import DynamicCache

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.errors import DataError, PlanError, RecipeError
from kvfold.runtimes.kernels import cpu_maps, native
from kvfold.runtimes.kernels.aged_attention import Aged, aged_attention, aged_attention_by_masks
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close, relative_rms

MIXED = {"method": "mixed", "multiple": 4}
FORMS = {
    "mla-mixed": ({"method": "mla", "multiple": 4}, MIXED),
    "mla_groups-mixed": ({"method": "mla", "multiple": 4, "below": 0, "group_size": 1}, MIXED),
    "on_read-mixed": ({"method": "fisher", "multiple": 4, "rope": "on_read"}, MIXED),
    "banded-mixed": ({"method": "fisher", "multiple": 4, "rope": "banded"}, MIXED),
    "applied-mixed": ({"method": "fisher", "multiple": 4}, MIXED),
    "absorbed-mixed": ({"method": "fisher", "multiple": 4, "v_latent": "layer", "kv_heads": 1}, MIXED),
    "logit-mixed": ({"method": "logit", "multiple": 4}, MIXED),
    "groups-int": (
        {"method": "svd_w", "latent": "group", "multiple": 4},
        {"method": "integer", "k_bits": 3, "v_bits": 3},
    ),
    "int4": ({"method": "identity"}, {"method": "integer"}),
}
ABSORBING = ("bloom_alibi", "opt_learned", "gpt2_conv")
"""Without rotation q_proj takes in the way back from latents that are at most a head wide."""
PARTIAL = ("neox_partial", "phi3_partial")
"""Keys that are rotated in part, and stored after rotation, are made in two ways: no finer form of them."""


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    root, done = tmp_path_factory.mktemp("recent"), {}

    def run(model, form, tokens=6):
        if (model, form, tokens) not in done:
            width, bits = FORMS[form]
            fields = {"model": str(tiny_dir / model), "out": str(root / f"{len(done)}"), "width": width, "bits": bits}
            fields |= {"length": {"method": "recent", "tokens": tokens}, "allocate": "greedy"}
            fields |= {"kv_budget": None if form == "int4" else 0.08 if form == "mla-mixed" else 0.2}
            calibration = {"data": "self", "num_samples": 8, "seq_len": 48}
            recipe = make_recipe(fields | {"calibration": calibration})
            done[model, form, tokens] = kvfold.compress(recipe, run_dir=root / "run", device="cpu")
        return done[model, form, tokens]

    return run


CASES = [
    pytest.param(model, form, id=f"{form}-{model}")
    for form in FORMS
    for model in MODELS
    if not (model in PARTIAL and form in ("applied-mixed", "logit-mixed", "groups-int"))
    and (form != "absorbed-mixed" or model in ABSORBING)
]
every_form = pytest.mark.parametrize(("model", "form"), CASES)


@pytest.fixture
def with_kernel(monkeypatch):
    """Leaves the kernel out or takes it in; other tests have it again."""

    def set_to(setting):
        monkeypatch.setenv("KVFOLD_NATIVE", setting)
        native.library.cache_clear()
        cpu_maps._layout.cache_clear()

    before = os.environ.get("KVFOLD_NATIVE", "1")
    yield set_to
    set_to(before)


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("form", FORMS)
def test_without_a_compiler_torch_does_the_same(fold, form, with_kernel):
    """In float32, which the kernel would take."""
    folded, ids = fold("bloom_alibi" if form == "absorbed-mixed" else "llama_mha", form), tokens(2, 24)
    mask, positions, found = torch.ones_like(ids), torch.arange(24).expand(2, -1), []
    for setting in ("1", "0"):
        with_kernel(setting)
        network = load(folded.out, dtype=torch.float32)
        with torch.no_grad():
            found.append(in_steps(network, ids, mask, positions, FoldedCache(folded.plan), [17, *range(18, 25)]))
    assert_close(*found, tolerance=1e-2, name="torch")  # a code may fall to the other side of a rounding


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_cached_equals_uncached(fold, model, form):
    """In float64, where codes do not depend on how a product was rounded."""
    folded = fold(model, form)
    network, ids = load(folded.out, dtype=torch.float64), tokens(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = network(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    seen = mask.bool()
    for cuts in ([*range(1, 31)], [17, *range(18, 31)], [8, 20, 30], [30]):
        found = in_steps(network, ids, mask, positions, FoldedCache(folded.plan), cuts)
        assert_close(found[seen], expected[seen], tolerance=1e-3, name=f"cuts {cuts[:3]}")
    if model in FULL_ATTENTION:
        cache = FoldedCache(folded.plan)
        step(network, ids, mask, positions, cache, 0, 20)
        cache.activate_past_recording()
        step(network, ids.flip(1), mask, positions, cache, 20, 26)
        cache.crop(-6)
        assert_close(
            step(network, ids, mask, positions, cache, 20, 30)[seen[:, 20:]],
            expected[:, 20:][seen[:, 20:]],
            tolerance=1e-3,
        )


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_real_bytes_are_planned_bytes(fold, model, form):
    plan = fold(model, form).plan
    network, cache, ids = load(fold(model, form).out), FoldedCache(plan), tokens(2, 60)
    assert any(spec.recent for spec in plan.owned)
    assert form == "int4" or plan.kv_budget <= 0.2 * 1.001
    with torch.no_grad():
        for start, end in ((0, 3), (3, 37), *((i, i + 1) for i in range(37, 60))):
            network(ids[:, start:end], past_key_values=cache)
            assert cache.nbytes_allocated == plan.kv_bytes(end, batch_size=2)


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("model", ABSORBING)
def test_absorbed_queries_meet_each_form_with_columns_of_its_own(fold, model):
    plan = fold(model, "absorbed-mixed").plan
    assert not any(spec.k_projection for spec in plan.owned) and any(spec.recent_head_dim for spec in plan.owned)


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model", ["llama_mha", "gemma2_softcap", "opt_learned"])
def test_half_precision(fold, model, implementation):
    ids, form = tokens(2, 30), "absorbed-mixed" if model in ABSORBING else "mla-mixed"
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        network = load(fold(model, form).out, dtype=dtype, attn_implementation=implementation)
        cache = FoldedCache(fold(model, form).plan)
        with torch.no_grad():
            parts = [network(ids[:, i:j], past_key_values=cache).logits for i, j in ((0, 20), (20, 21), (21, 30))]
        found.append(torch.cat(parts, 1))
    assert relative_rms(*found) < 0.1


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_whole_plans_are_measured(tiny_dir, tmp_path):
    """Where a plan's KL decides: a KL to stay under, and a budget that the plain cache in 8 bits fits as well."""
    recipe = {"model": str(tiny_dir / "llama_mha"), "width": {"method": "mla", "multiple": 4}, "bits": MIXED}
    recipe |= {"length": {"method": "recent", "tokens": 6}, "allocate": "greedy"}
    recipe |= {"calibration": {"data": "self", "num_samples": 8, "seq_len": 48}}
    small = kvfold.compress(recipe | {"target_kl": 0.01, "out": str(tmp_path / "a")}, device="cpu").plan
    large = kvfold.compress(recipe | {"kv_budget": 0.7, "out": str(tmp_path / "b")}, device="cpu").plan
    assert small.kv_budget < 0.5 and all(spec.recent == 6 for spec in small.owned)
    assert small.kv_budget < large.kv_budget <= 0.7


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_a_crop_that_fails_leaves_all_layers_as_they_were(tiny_dir, tmp_path):
    recipe = {"model": str(tiny_dir / "llama_mha"), "width": {"method": "mla", "leading": 8}, "bits": MIXED}
    recipe |= {"kv_budget": 0.5}
    recipe |= {"length": {"method": "recent", "tokens": 6}, "allocate": "greedy", "keep_layers": [0]}
    recipe |= {"calibration": {"data": "self", "num_samples": 8, "seq_len": 48}, "out": str(tmp_path / "a")}
    folded = kvfold.compress(recipe, device="cpu")
    network, cache = load(folded.out), FoldedCache(folded.plan)
    with torch.no_grad():
        network(tokens(1, 30), past_key_values=cache)
    with pytest.raises(RuntimeError, match="finer form"):
        cache.crop(-9)
    assert {layer.length for layer in cache.owned} == {30}


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_another_cache_is_refused(fold):
    with pytest.raises(ValueError, match="kvfold's own cache"):
        load(fold("llama_mha", "int4").out)(tokens(1, 9), past_key_values=DynamicCache())


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("form", [form for form in FORMS if form != "absorbed-mixed"])  # whose finer form is as narrow
def test_it_loses_less(fold, tiny_dir, form):
    """With half of the tokens recent what is left is mostly the finer form's loss."""
    ids = tokens(4, 40)
    with torch.no_grad():
        original = load(tiny_dir / "llama_mha")(ids).logits
        lost = [
            relative_rms(load(fold("llama_mha", form, n).out)(ids, use_cache=False).logits, original) for n in (1, 20)
        ]
    assert lost[0] > lost[1]


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("form", ["mla-mixed", "logit-mixed"])
def test_gradients_pass(fold, form):
    network = load(fold("llama_mha", form).out, dtype=torch.float64)
    check_gradients_through_a_cache(network, tokens(2, 24), tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_generation_with_beams_and_lookup(fold):
    network, ids = load(fold("llama_mha", "mla-mixed").out, dtype=torch.float64), tokens(2, 20)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        network.generate(ids, **options, num_beams=3), network.generate(ids, **options, num_beams=3, use_cache=False)
    )
    one = ids[:1]
    assert torch.equal(network.generate(one, prompt_lookup_num_tokens=3, **options), network.generate(one, **options))


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_what_is_no_longer_fine_cannot_come_back(fold):
    plan = fold("llama_mha", "mla-mixed").plan
    network, cache = load(fold("llama_mha", "mla-mixed").out), FoldedCache(plan)
    with torch.no_grad():
        network(tokens(1, 60), past_key_values=cache)
    with pytest.raises(RuntimeError, match="finer form of the newest 6"):
        cache.crop(-2)
    cache.crop(-60)
    assert cache.get_seq_length() == 0


@pytest.mark.filterwarnings("ignore:kv_budget")
def test_a_cache_that_records_keeps_what_may_come_back_until_it_is_cropped(fold):
    plan = fold("llama_mha", "mla-mixed").plan
    network, cache, ids = (
        load(fold("llama_mha", "mla-mixed").out, dtype=torch.float64),
        FoldedCache(plan),
        tokens(1, 60),
    )
    plain = FoldedCache(plan)
    with torch.no_grad():
        expected = network(ids, past_key_values=plain).logits[:, 30:]
        network(ids[:, :20], past_key_values=cache)
        cache.activate_past_recording()
        network(ids[:, 20:].flip(1), past_key_values=cache)
        assert cache.nbytes_allocated > plain.nbytes_allocated
        cache.crop(-40)
        again = network(ids[:, 20:], past_key_values=cache).logits[:, 10:]
    assert_close(again, expected, tolerance=1e-5)
    cache.crop(-1)
    assert cache.owned[0].recent[0].rows.shape[2] == 6


@pytest.mark.parametrize("recent", [5, 16, 64, 100])
@pytest.mark.parametrize(("B", "T", "S"), [(6, 600, 600), (64, 1, 700), (2, 3, 130), (1, 300, 310)])
def test_pieces_of_any_size_are_what_masks_choose(B, T, S, recent, monkeypatch):
    """Rounded sizes of pieces leave nothing out, and count nothing twice."""
    monkeypatch.setattr("kvfold.plan.number_format.ELEMENTS_AT_ONCE", {"cpu": B * 16 * 100})
    parts = [torch.randn(B, 2, S, 8, dtype=torch.float64) for _ in range(4)]
    keys, values = (
        Aged(lambda i, j, x=far: x[:, :, i:j], lambda i, j, x=near: x[:, :, i:j], S, S, recent)
        for far, near in (parts[:2], parts[2:])
    )
    q = torch.randn(B, 4, T, 8, dtype=torch.float64)
    found = aged_attention((q, q), keys, values, None, 8, elements=16, scale=0.3)
    wanted, _ = aged_attention_by_masks((q, q), keys, values, None, 8, scale=0.3)
    torch.testing.assert_close(found, wanted)


def test_calibration_text_must_reach_far_enough(tiny_dir, tmp_path):
    recipe = {"model": str(tiny_dir / "llama_mha"), "out": str(tmp_path / "o"), "kv_budget": 0.5}
    recipe |= {"width": {"method": "mla"}, "bits": MIXED, "allocate": "greedy"} | {
        "length": {"method": "recent", "tokens": 40}
    }
    with pytest.raises(DataError, match="at least --seq-len 80"):
        kvfold.compress(recipe | {"calibration": {"data": "self", "num_samples": 4, "seq_len": 48}}, device="cpu")


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("model", ["llama_yarn", *PARTIAL])
def test_speed_keeps_recent_tokens_finely_where_that_can_be(tiny_dir, tmp_path, model):
    fields = {"model": str(tiny_dir / model), "out": str(tmp_path / "out"), "prefer": "speed", "kv_budget": 0.25}
    fields |= {"length": {"tokens": 6}, "calibration": {"data": "self", "num_samples": 8, "seq_len": 48}}
    recipe = make_recipe(fields | {"preset": "auto"})
    if model not in PARTIAL:
        plan = kvfold.compress(recipe, device="cpu").plan
        assert all(spec.recent == 6 and spec.rope == "applied" for spec in plan.owned)
        return
    with pytest.warns(UserWarning, match="rotated in part have no finer form"):
        assert not any(spec.recent for spec in kvfold.compress(recipe, device="cpu").plan.owned)


def test_mistakes(tiny_dir, tmp_path):
    recipe = {"model": str(tiny_dir / "neox_partial"), "out": str(tmp_path / "o"), "kv_budget": 0.5}
    recipe |= {"width": {"method": "svd_w"}, "length": {"method": "recent"}}
    with pytest.raises(PlanError, match="k_partial"):
        kvfold.compress(recipe | {"bits": {"method": "integer"}}, device="cpu")
    fisher = {"width": {"method": "fisher", "v_latent": "group"}, "bits": MIXED, "calibration": {"data": "self"}}
    with pytest.raises(RecipeError, match="choose greedy"):
        make_recipe(recipe | fisher | {"allocate": "uniform"})
    with pytest.raises(RecipeError, match=r"length\.tokens must be at least 1"):
        make_recipe(recipe | {"length": {"method": "recent", "tokens": 0}})
