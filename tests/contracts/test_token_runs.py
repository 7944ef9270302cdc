"""Heads that keep different tokens: whatever the steps in which tokens come, a query sees the same ones."""

from __future__ import annotations

import copy

import pytest
import torch
from dropped import CONTEXT, FORMS, folds
from tiny import FULL_ATTENTION, MODELS, in_steps, load, logits, step, tokens

from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

WINDOWED = ("mistral_window",)
"""All layers forget by themselves."""
CASES = [pytest.param(model, form, id=f"{form}-{model}") for form in FORMS for model in MODELS if model not in WINDOWED]
every_form = pytest.mark.parametrize(("model", "form"), CASES)


LENGTH = {"method": "recency", "kept": 0.6, "sinks": 2, "newest": 3}


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    return folds(tiny_dir, tmp_path_factory.mktemp("runs"), LENGTH)


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_cached_equals_uncached(fold, model, form, monkeypatch):
    """In float64, where codes do not depend on how a product was rounded; long prompts pass through in pieces."""
    monkeypatch.setattr("kvfold.runtimes.transformers.head_run.RUN_BLOCK", 9)
    monkeypatch.setattr("kvfold.runtimes.kernels.head_runs.QUERIES_AT_ONCE", 11)
    folded = fold(model, form)
    network, ids = load(folded.out, dtype=torch.float64), tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :23] = mask[2, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = network(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    seen = mask.bool()
    for cuts in ([*range(1, 61)], [37, *range(38, 61)], [8, 20, 45, 60], [60]):
        found = in_steps(network, ids, mask, positions, FoldedCache(folded.plan), cuts)
        assert_close(found[seen], expected[seen], tolerance=1e-3, name=f"cuts {cuts[:3]}")
    for row, begin in ((0, 23), (1, 0)):
        with torch.no_grad():
            alone = network(ids[row : row + 1, begin:]).logits
        assert_close(expected[row : row + 1, begin:], alone, tolerance=1e-3, name=f"row {row} alone")
    if model in FULL_ATTENTION:
        cache = FoldedCache(folded.plan)
        step(network, ids, mask, positions, cache, 0, 50)
        cache.activate_past_recording()
        step(network, ids.flip(1), mask, positions, cache, 50, 56)
        cache.crop(-6)
        again = step(network, ids, mask, positions, cache, 50, 60)
        assert_close(again[seen[:, 50:]], expected[:, 50:][seen[:, 50:]], tolerance=1e-3)


@pytest.mark.parametrize("sinks", [0, 1, 2, 4])
@pytest.mark.parametrize("method", ["recency", "scored", "foreseen"])
def test_a_batch_in_which_no_sequence_begins_at_once(fold, method, sinks):
    """Tokens that have yet to come behind the padding are not forgotten before."""
    folded = fold("llama_mha", method=method, sinks=sinks, sharing="equal")
    network, ids = load(folded.out, dtype=torch.float64), tokens(1, 60)
    for padding in (3, 35):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        for cuts in ([*range(1, 61)], [2, 8, 24, 40, 60], [padding, *range(padding + 1, 61)]):
            few = [cut for cut in cuts if cut > padding]
            found = in_steps(network, ids, mask, positions, FoldedCache(folded.plan), cuts)[:, padding:]
            alone = [part[:, padding:] for part in (ids, mask, positions)]
            expected = in_steps(network, *alone, FoldedCache(folded.plan), [cut - padding for cut in few])
            assert_close(found, expected, tolerance=1e-3, name=f"{padding} of padding, cuts {cuts[:3]}")


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_real_bytes_are_planned_bytes(fold, model, form):
    plan = fold(model, form).plan
    network, cache, ids = load(fold(model, form).out), FoldedCache(plan), tokens(2, 400)
    assert plan.drops_tokens and plan.context_len == CONTEXT
    with torch.no_grad():
        for start, end in ((0, 3), (3, 37), (37, 38), (38, 350), *((i, i + 1) for i in range(350, 354))):
            network(ids[:, start:end], past_key_values=cache)
            assert cache.nbytes_allocated == plan.kv_bytes(end, batch_size=2)


@pytest.mark.parametrize("model", FULL_ATTENTION)
def test_everything_kept_is_the_original(fold, tiny_dir, model):
    kept = fold(model, kept=1.0)
    assert torch.equal(logits(load(kept.out), tokens()), logits(load(tiny_dir / model), tokens()))
    assert kept.plan.kv_budget == 1


@pytest.mark.parametrize("sharing", ["equal", "classes", "measured"])
def test_the_mean_over_heads_is_what_was_asked_for(fold, sharing):
    plan = fold("llama_mha", sharing=sharing).plan
    assert 0.5 < plan.kv_budget <= 0.601
    sizes = {run.kept(CONTEXT) for spec in plan.owned for run in spec.tokens.runs}
    assert sizes == {24} if sharing == "equal" else min(sizes) == 5 and max(sizes) == CONTEXT
    if sharing == "classes":
        assert len(sizes) <= 3  # one head gets what is left


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_generation_with_a_cache_equals_generation_without(fold, model, form):
    """Greedy, beams that reorder rows, drafts that are taken back; of padded rows, past several drops."""
    network, ids = load(fold(model, form).out, dtype=torch.float64), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11], ids[0, :11] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    for beams in (1, 3):
        with_cache = network.generate(ids, num_beams=beams, **options)
        assert torch.equal(with_cache, network.generate(ids, num_beams=beams, use_cache=False, **options)), beams
    one = tokens(1, 20).repeat(1, 2)
    alone = network.generate(one, max_new_tokens=25, do_sample=False)
    assert torch.equal(network.generate(one, max_new_tokens=25, do_sample=False, prompt_lookup_num_tokens=3), alone)


@pytest.mark.parametrize("model", ["llama_mha", "bloom_alibi", "gemma2_softcap"])
def test_gradients_and_probabilities(fold, model):
    """Training sees the same tokens; probabilities of what is dropped are 0."""
    network, ids = load(fold(model).out, attn_implementation="eager"), tokens(2, 50)
    network.train()
    network(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in network.named_parameters() if "k_proj" in name or "query_key_value" in name]
    assert gradients and all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    network.eval()
    with torch.no_grad():
        whole = network(ids, output_attentions=True, use_cache=False).attentions
        cache = network(ids[:, :49], use_cache=True).past_key_values
        last = network(ids[:, 49:], past_key_values=cache, output_attentions=True).attentions
    for layer, (probs, cached) in enumerate(zip(whole, last, strict=True)):
        assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
        if (kept := fold(model).plan.caches[layer].tokens) is not None:  # no window of the source's
            assert_close(cached[:, :, 0], probs[:, :, -1], name=f"layer {layer}")
            group = probs.shape[1] // sum(len(run.heads) for run in kept.runs)
            for run in kept.runs:
                assert not probs[:, run.heads[0] * group, -1, 2 : kept.first_newest(run, 50)].any()


def test_a_crop_that_needs_what_is_gone_is_refused(fold):
    folded = fold("llama_mha")
    network, cache, ids = load(folded.out), FoldedCache(folded.plan), tokens(1, 60)
    with torch.no_grad():
        for start, end in ((0, 50), (50, 51), (51, 52)):
            network(ids[:, start:end], past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"have forgotten what would come back into sight. Call activate_past"):
        cache.crop(-20)
    assert cache.get_seq_length() == 52


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.parametrize("model", [*FULL_ATTENTION, "bloom_alibi", "gemma2_softcap"])
def test_a_prompt_that_is_read_whole(fold, tiny_dir, model):
    """The prompt's logits are the original's; what stays of it is what a masked plan keeps, and decoding goes on as there."""
    folded, masked, original = fold(model, prompt="whole"), fold(model), load(tiny_dir / model)
    assert folded.plan.depends_on_steps and not masked.plan.depends_on_steps
    network, ids = load(folded.out), tokens(2, 60)
    cache, stock = FoldedCache(folded.plan), FoldedCache(masked.plan)
    with torch.no_grad():
        assert_close(network(ids[:, :50], past_key_values=cache).logits, original(ids[:, :50]).logits)
        whole = original(ids[:, :50], use_cache=True).past_key_values
    for index, layer in enumerate(whole.layers):
        if folded.plan.caches[index].window is None:
            stock.layers[index].update(layer.keys, layer.values)
    for index, spec in enumerate(folded.plan.caches):
        for one, other in zip(cache.layers[index].runs, stock.layers[index].runs, strict=True):
            assert one.place == other.place
            assert_close(one.k.view(), other.k.view()) if spec.tokens else None
    assert cache.nbytes_allocated == folded.plan.kv_bytes(50, batch_size=2)
    with torch.no_grad():  # short steps are decoding
        together = network(ids[:, 50:60], past_key_values=copy.deepcopy(cache)).logits
        alone = [network(ids[:, i : i + 1], past_key_values=cache).logits for i in range(50, 60)]
    assert_close(torch.cat(alone, 1), together)
