"""Steps that read some of the stored tokens: they see what was chosen and nothing else, whatever the reader."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny import in_steps, load, logits, step, tokens

import kvfold
from kvfold import registry
from kvfold.compression.recipe import make_recipe
from kvfold.errors import PlanError, RecipeError
from kvfold.runtimes.readers.base import Choice
from kvfold.runtimes.readers.lead import Lead
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.testing import assert_close

RULES = registry.names("readers")
LENGTH = {"share": 0.3, "least": 8, "sinks": 2, "newest": 3}
OPTIONS = {
    "lead": {"leading": 3},
    "sampled": {"leading": 3},
    "pages": {"page": 4},
    "lsh": {"hash_bits": 3, "tables": 10},
}
FORMS = {
    "plain": ({"method": "identity"}, {"method": "identity"}, None),
    "int4": ({"method": "identity"}, {"method": "integer"}, None),
    "ordered": (
        {"method": "kq_svd", "latent": "group", "v_latent": "layer", "group_size": 1, "multiple": 4},
        {"method": "integer"},
        0.25,
    ),
}


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    root, done = tmp_path_factory.mktemp("reading"), {}

    def fold(model, form="plain", rule="lead", **length):
        key = model, form, rule, *length.items()
        if key not in done:
            width, bits, budget = FORMS[form]
            fields = {"model": str(tiny_dir / model), "out": str(root / f"{len(done)}"), "width": width, "bits": bits}
            fields |= {"length": {"method": rule} | LENGTH | OPTIONS[rule] | length, "kv_budget": budget}
            fields |= {"calibration": {"data": "self", "num_samples": 4, "seq_len": 32}}
            done[key] = kvfold.compress(make_recipe(fields), run_dir=root / "run", device="cpu")
        return done[key]

    return fold


def read(network, plan, ids, mask, cuts):
    """Logits of all tokens, which come in steps that end at `cuts`, and the cache."""
    cache, positions = FoldedCache(plan), (mask.cumsum(1) - 1).clamp_min(0)
    return in_steps(network, ids, mask, positions, cache, cuts), cache


class Known:
    """Worth that is known beforehand, by stored head and column, and what scores get beside it."""

    worth_KS = torch.rand(8, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    added_NS = torch.randn(8, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @classmethod
    def choose(cls, reader, asked):
        B, N, T, _ = asked.queries_BNTR.shape
        K, S = asked.keys.shape[1:3]
        index = reader.best(cls.worth_KS[:K, :S].expand(B, K, S), asked)
        here = index.repeat_interleave(N // K, dim=1)[:, :, None].expand(-1, -1, T, -1)
        added = cls.added_NS[:N, :S][None, :, None].expand(B, N, T, S).gather(3, here)
        return Choice(index, added, asked.count / S)

    @classmethod
    def seen(cls, reading, begins, heads, group, cuts, length):
        """[B, N, length, length]: numbers to add, worked out token by token and head by head."""
        out = torch.full(
            (len(begins), heads * group, length, length), torch.finfo(torch.float64).min, dtype=torch.float64
        )
        for b, begin in enumerate(begins):
            for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
                every = end - start > 16 or reading.chosen(end) == end
                for n in range(heads * group):
                    order = sorted(range(begin, end), key=lambda s: -float(cls.worth_KS[n // group, s]))
                    always = {s for s in range(begin, end) if s < begin + reading.sinks or s >= end - reading.newest}
                    more = [s for s in order if s not in always][: reading.chosen(end) - len(always)]
                    for t in range(max(start, begin), end):
                        now = set(range(begin, end)) if every else always | set(more)
                        now = [s for s in now if s <= t]
                        out[b, n, t, now] = 0.0 if every else cls.added_NS[n, now]
        return out


@pytest.mark.parametrize("model", ["llama_mha", "llama_yarn", "neox_partial", "opt_learned"])
@pytest.mark.parametrize("cuts", [(40, *range(41, 61)), (20, 45, 50, 60), (8, 30, 31, 60)], ids=str)
def test_only_what_was_chosen_is_seen(fold, model, cuts, monkeypatch):
    """Beside the same model without a cache, of which masks hide what was not chosen: per head, with padding."""
    folded = fold(model)
    network, ids, begins = load(folded.out, dtype=torch.float64), tokens(3, 60), (23, 0, 2)
    K = folded.plan.owned[0].num_kv_heads
    mask = torch.stack([torch.arange(60) >= begin for begin in begins]).long()
    monkeypatch.setattr(Lead, "choose", lambda self, asked: Known.choose(self, asked))
    group = network.config.num_attention_heads // K
    hidden = Known.seen(folded.plan.owned[0].reading, begins, K, group, cuts, 60)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        expected = network(ids, attention_mask=hidden, position_ids=positions, use_cache=False).logits
    found, cache = read(network, folded.plan, ids, mask, cuts)
    assert_close(found[mask.bool()], expected[mask.bool()], tolerance=1e-9)
    assert cache.nbytes_allocated == 2 * folded.plan.kv_bytes(60, batch_size=3)  # which are of float32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:kv_budget")
def test_a_padded_batch_is_its_sequences(fold, rule, form):
    """Whose own places are what sinks and newest tokens are counted by; pages, and what signatures are of, go by columns."""
    for model in ("llama_mha", "qwen2_bias_tied", "bloom_alibi"):
        folded, padding = fold(model, form, rule), 24  # whole pages
        network, ids = load(folded.out, dtype=torch.float64), tokens(2, 64)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        found, cache = read(network, folded.plan, ids, mask, [56, *range(57, 65)])
        plan, itemsize = folded.plan, 8
        stored = sum(spec.bytes_allocated(64, itemsize) for spec in plan.owned)
        assert cache.nbytes_allocated == 2 * stored and cache.share_read < 1
        if rule in ("lead", "pages"):  # what is drawn differs from place to place
            alone, _ = read(network, plan, ids[:1, padding:], mask[:1, padding:], [32, *range(33, 41)])
            few = plan.owned[0].reading.chosen(64) == plan.owned[0].reading.chosen(40)
            assert not few, "the padded row reads as many as a row of its columns"
            wide = in_steps_with_count(network, plan, ids[:1, padding:], 64, padding)
            assert_close(found[:1, padding:], wide, tolerance=1e-6, name=f"{model} {rule}")
            assert alone.shape == wide.shape


def in_steps_with_count(network, plan, ids, columns, padding):
    """One sequence, of which every step reads as many tokens as one of `padding` more columns would."""
    cache, length = FoldedCache(plan), ids.shape[1]
    for layer in cache.owned:
        reading = layer.reader.reading
        layer.reader.reading = Wider(reading, padding)
    mask = torch.ones_like(ids)
    return in_steps(network, ids, mask, mask.cumsum(1) - 1, cache, [32, *range(33, length + 1)])


class Wider:
    """A reading of so many columns more."""

    def __init__(self, reading, beside):
        self.reading, self.beside = reading, beside

    def __getattr__(self, name):
        return getattr(self.reading, name)

    def chosen(self, context_len):
        return min(self.reading.chosen(context_len + self.beside), context_len)


@pytest.mark.parametrize("rule", RULES)
def test_reading_everything_is_the_original(fold, tiny_dir, rule):
    """Bit for bit; and a prompt in one step reads everything anyhow."""
    ids = tokens(2, 60)
    whole, some = fold("llama_mha", rule=rule, share=1.0), fold("llama_mha", rule=rule)
    found, cache = read(load(whole.out), whole.plan, ids, torch.ones_like(ids), [50, *range(51, 61)])
    base = kvfold.compress(
        make_recipe(
            {"model": str(tiny_dir / "llama_mha"), "out": str(whole.out) + "-base", "width": {"method": "identity"}}
        ),
        overwrite=True,
        device="cpu",
    )
    plain, _ = read(load(base.out), base.plan, ids, torch.ones_like(ids), [50, *range(51, 61)])
    assert torch.equal(found, plain) and cache.owned[0].reader.steps == 0
    assert_close(logits(load(some.out), ids), logits(load(base.out), ids))
    least, _ = read(load(some.out), some.plan, ids, torch.ones_like(ids), [50, *range(51, 61)])
    assert not torch.allclose(least[:, 50:], plain[:, 50:], atol=1e-2)


@pytest.mark.parametrize("rule", RULES)
def test_removed_tokens_leave_no_note(fold, rule):
    """After a crop inside a page, and after rows were chosen and repeated, everything goes on as if they had never been."""
    folded = fold("qwen2_bias_tied", rule=rule)
    network, ids = load(folded.out, dtype=torch.float64), tokens(2, 60)
    mask, positions = torch.ones_like(ids), torch.arange(60).expand(2, -1)
    cache = FoldedCache(folded.plan)
    for start, end in ((0, 20), (20, 50)):
        step(network, ids, mask, positions, cache, start, end)
    twin = copy.deepcopy(cache)
    twin.crop(-7)
    cropped = step(network, ids, mask, positions, twin, 43, 44)
    straight = FoldedCache(folded.plan)
    for start, end in ((0, 20), (20, 43)):
        step(network, ids, mask, positions, straight, start, end)
    assert_close(cropped, step(network, ids, mask, positions, straight, 43, 44), tolerance=1e-9)
    expected = step(network, ids, mask, positions, copy.deepcopy(cache), 50, 51)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    found = step(network, ids.flip(0), mask, positions, cache, 50, 51)
    assert_close(found, expected.flip(0), tolerance=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_generation(fold, rule):
    """Greedy, with beams, and with drafts that are taken back."""
    network, ids = load(fold("llama_mha", rule=rule).out), tokens(1, 40)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    assert network.generate(ids, **options).shape == network.generate(ids, num_beams=3, **options).shape == (1, 52)
    assert network.generate(ids, prompt_lookup_num_tokens=3, **options).shape == (1, 52)


def test_probabilities_are_of_all_tokens(fold):
    network, ids = load(fold("llama_mha").out, attn_implementation="eager"), tokens(1, 50)
    with torch.no_grad():
        cache = network(ids[:, :49], use_cache=True).past_key_values
        probs = network(ids[:, 49:], past_key_values=cache, output_attentions=True).attentions[0]
    assert probs.shape == (1, 8, 1, 50)
    assert_close(probs.sum(-1), torch.ones(1, 8, 1))
    assert ((probs > 0).sum(-1) == 15).all()  # 0.3 of 50


def test_capped_scores(fold):
    """The fused kernels cap none; what probabilities are asked for with is the same."""
    network, ids = load(fold("gemma2_softcap").out), tokens(1, 50)
    with torch.no_grad():
        cache = network(ids[:, :49], use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        found = network(ids[:, 49:], past_key_values=cache).logits
        expected = network(ids[:, 49:], past_key_values=twin, output_attentions=True).logits
    assert cache.share_read < 1
    assert_close(found, expected, tolerance=1e-5)


def test_bytes(fold):
    """What is stored to choose by counts, and what is read is less than what is stored."""
    plain = fold("llama_mha", share=1.0).plan
    for rule, beside in (("lead", 0), ("sampled", 0), ("pages", 2 * 8 * 4 / 4), ("lsh", 10)):
        plan = fold("llama_mha", rule=rule).plan
        assert plan.kv_bytes_per_token() == plain.kv_bytes_per_token() + 3 * 8 * beside, rule
        chosen, row = 300, 2 * 8 * 4
        leading = {"lead": 3 * 4, "sampled": 3 * 4}.get(rule, 0)
        read_bytes = 3 * 8 * (row * chosen + leading * 700 + beside * 1000)
        assert plan.kv_read_bytes(1000) == read_bytes


def test_what_is_refused(fold, tiny_dir):
    with pytest.raises(RecipeError, match="length.share is 0"):
        make_recipe({"model": "-", "out": "-", "length": {"method": "lead", "share": 0}})
    with pytest.raises(RecipeError, match="pages divide 256"):
        make_recipe({"model": "-", "out": "-", "length": {"method": "pages", "page": 24}})
    with pytest.raises(RecipeError, match="signatures have 1 to 15 bits"):
        make_recipe({"model": "-", "out": "-", "length": {"method": "lsh", "hash_bits": 16}})
    plan = fold("llama_mha").plan
    spec = plan.owned[0]
    for change, found in (
        ({"rule": "leed"}, "Did you mean 'lead'"),
        ({"leading": 9}, "which have 8"),
        ({"bits": 4}, "in one table or more"),
        ({"newest": 0}, "at least its sinks and newest"),
        ({"sinks": 0, "newest": 4}, "keep a sink"),
        ({"page": 2.5}, "no numbers of tokens"),
    ):
        broken = dataclasses.replace(spec, reading=dataclasses.replace(spec.reading, **change))
        with pytest.raises(PlanError, match=found):
            dataclasses.replace(plan, caches=(broken, *plan.caches[1:]))
    assert type(plan).from_dict(plan.to_dict()) == plan
