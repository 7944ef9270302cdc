"""Tokens of a prompt that a scorer chooses: what is read afterwards is what was kept, byte for byte, and nothing else."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from dropped import folds
from tiny import exact_tables, in_steps, load, logits, tokens

import kvfold
from kvfold import registry
from kvfold.compression.recipe import make_recipe
from kvfold.errors import PlanError, RecipeError
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes.kernels.packed_tokens import read_all
from kvfold.runtimes.scorers.knorm import KNorm
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.head_runs import HeadRun
from kvfold.testing import assert_close

RULES = registry.names("scorers")
LENGTH = {"method": "scored", "kept": 0.6, "sinks": 2, "newest": 3}


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    return folds(tiny_dir, tmp_path_factory.mktemp("scored"), LENGTH)


class Known:
    """Worth that is known beforehand, by stored head and column."""

    worth_KS = torch.rand(8, 100, generator=torch.Generator().manual_seed(0))
    added_KS = torch.randint(-8, 8, (8, 100), generator=torch.Generator().manual_seed(1)) / 8.0
    """Of tokens that stand for others as well."""


def read(network, plan, ids, mask, cuts):
    """Logits of all tokens, which come in steps that end at `cuts`, and the cache."""
    cache, positions = FoldedCache(plan), (mask.cumsum(1) - 1).clamp_min(0)
    return in_steps(network, ids, mask, positions, cache, cuts), cache


def stays(runs, heads, length, begin, cuts, worth_KS):
    """[heads, length, length]: what queries see of columns, as numbers to add, worked out token by token and head by head."""
    seen = torch.full((heads, length, length), torch.finfo(torch.float64).min, dtype=torch.float64)
    for run in runs.runs:
        for head in run.heads:
            chosen, start, added = None, 0, torch.zeros(length, dtype=torch.float64)
            for end in cuts:
                held = visible(runs, run, chosen, start + 1, begin) - {start}
                long = end - start > 16
                for t in range(max(start, begin), end):
                    now = (
                        held | set(range(max(start, begin), t + 1))
                        if long
                        else visible(runs, run, chosen, t + 1, begin)
                    )
                    seen[head, t, list(now)] = added[list(now)]
                if long:
                    held |= set(range(max(start, begin), end))
                    free = sorted(c for c in held if c < end - runs.newest)
                    first = {c for c in free if c < begin + runs.sinks}
                    order = sorted(free, key=lambda c: (c not in first, -float(worth_KS[head, c])))
                    chosen = set(order[: max(run.kept(end - begin) - runs.newest, 0)])
                    if runs.matched:
                        kept = [*chosen, *range(max(end - runs.newest, 0), end)]
                        added[:] = 0
                        added[kept] = Known.added_KS[head, kept].double()
                start = end
    return seen


def visible(runs, run, chosen, length, begin):
    """Of what is kept of a sequence of which `length` columns were seen, those that its last query sees."""
    early = set(range(begin, begin + runs.sinks)) if chosen is None else chosen
    newest = max(run.kept(length - begin) - (runs.sinks if chosen is None else len(chosen)), 0)
    return {c for c in early if c < length} | set(range(max(length - newest, begin), length))


@pytest.mark.parametrize("model", ["llama_mha", "llama_yarn", "neox_partial", "opt_learned"])
@pytest.mark.parametrize("cuts", [(40, *range(41, 61)), (20, 45, 50, 60), (8, 30, 31, 60), (60,)], ids=str)
@pytest.mark.parametrize("matched", [False, True])
def test_only_what_stays_is_seen(tiny_dir, tmp_path, model, cuts, matched, monkeypatch):
    """Beside the same model with a cache of everything, of which masks hide what was dropped: per head, with padding."""
    recipe = {"model": str(tiny_dir / model), "out": str(tmp_path / "out"), "width": {"method": "identity"}}
    folded = kvfold.compress(make_recipe(recipe), device="cpu")
    network, ids, begins = load(folded.out, dtype=torch.float64), tokens(3, 60), (23, 0, 2)
    K = folded.plan.owned[0].num_kv_heads
    few = TokenRun(heads=(0, K - 1), share=0.3, least=5)
    runs = TokenRuns(
        runs=(few, TokenRun(heads=tuple(range(1, K - 1)), share=0.55, least=6)),
        rule="knorm",
        sinks=2,
        newest=3,
        prompt="whole",
        matched=matched,
    )
    group = network.config.num_attention_heads // K
    mask = torch.stack([torch.arange(60) >= begin for begin in begins]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = torch.stack([stays(runs, K, 60, begin, cuts, Known.worth_KS) for begin in begins])
    hidden = hidden.repeat_interleave(group, dim=1)
    with torch.no_grad():
        expected = network(ids, attention_mask=hidden, position_ids=positions, use_cache=False).logits
    plan = dataclasses.replace(
        folded.plan, caches=tuple(dataclasses.replace(spec, tokens=runs) for spec in folded.plan.caches), context_len=60
    )
    for module in network.modules():
        if hasattr(module, "spec"):
            module.spec = plan.caches[module.layer_idx]
    monkeypatch.setattr(HeadRun, "choose", with_known_worth(HeadRun.choose))
    found, cache = read(network, plan, ids, mask, cuts)
    assert_close(found[mask.bool()], expected[mask.bool()], tolerance=1e-9)
    assert cache.nbytes_allocated == 3 * sum(spec.bytes_allocated(60, 8) for spec in plan.owned)


def with_known_worth(choose):
    """Columns are told from the stored keys by nothing, so they are written down as they are chosen."""

    def chosen(self, worth_BCS, length, begin_B, match):
        B = len(worth_BCS)
        begin_B1 = torch.zeros(B, 1, dtype=torch.long) if begin_B is None else begin_B[:, None]
        held = getattr(self, "held", None)  # columns of early rows, [B, C, E]
        C, S = worth_BCS.shape[1:]
        if self.place.first is None:
            column = torch.arange(S).expand(B, C, S)
        else:
            sinks = (begin_B1 + torch.arange(self.place.early))[:, None].expand(B, C, -1)
            newest = torch.arange(self.place.first, length).expand(B, C, -1)
            column = torch.cat([sinks if held is None else held, newest], dim=2)
        assert column.shape == worth_BCS.shape
        heads = torch.tensor(self.run.heads)
        worth = Known.worth_KS[heads[None, :, None].expand_as(column), column.clamp_max(99)].double()
        free, sink = self._candidates(length, begin_B1, self.tokens.newest)
        choose(self, worth, length, begin_B, None)
        order = worth.masked_fill(sink[:, None], torch.inf).masked_fill(~free[:, None], -torch.inf)
        best = order.topk(self.place.early).indices
        unused = (torch.arange(self.place.early) >= self.place.early_B[:, None])[:, None]
        best = best.gather(2, best.masked_fill(unused, -1).argsort(stable=True))
        self.held = column.gather(2, best)
        if self.added is not None:
            newest = torch.arange(length - min(self.tokens.newest, length), length).expand(B, C, -1)
            kept = torch.cat([self.held, newest], dim=2)
            added = Known.added_KS[heads[None, :, None].expand_as(kept), kept.clamp_max(99)]
            self.added.replace(added[..., None].half(), torch.ones(B, dtype=torch.bool))

    return chosen


@pytest.mark.parametrize("model", ["bloom_alibi", "llama_mha"])
def test_chosen_tokens_stand_where_they_stood(fold, model, monkeypatch):
    """Where later tokens are worth more the newest stay, and all is as where nothing but these can."""

    def later(self, prompt):
        return torch.arange(prompt.keys_BCSR.shape[2]).expand(prompt.keys_BCSR.shape[:3])

    monkeypatch.setattr(KNorm, "score", later)
    folded = fold(model, rule="knorm", sharing="equal")
    plan = folded.plan
    network, ids = load(folded.out, dtype=torch.float64), tokens(2, 50)
    recent = (
        dataclasses.replace(spec, tokens=dataclasses.replace(spec.tokens, rule="recency", newest=0))
        for spec in plan.owned
    )
    said = []
    for one in (plan, dataclasses.replace(plan, caches=tuple(recent))):
        for module in network.modules():
            if hasattr(module, "spec"):
                module.spec = one.caches[module.layer_idx]
        cache = FoldedCache(one)
        with torch.no_grad():
            network(ids[:, :49], past_key_values=cache)
            said.append(network(ids[:, 49:], past_key_values=cache).logits)
    assert_close(said[0], said[1], tolerance=1e-9)


@pytest.mark.parametrize("rule", [*RULES, "matched"])
@pytest.mark.parametrize("form", ["plain", "int4", "latents"])
@pytest.mark.filterwarnings("ignore:kv_budget")
def test_a_padded_batch_is_its_sequences(fold, rule, form):
    """And a repeated one; decoding goes on behind what was chosen."""
    for model in ("llama_mha", "qwen2_bias_tied", "bloom_alibi"):
        folded = fold(model, form, **({"matched": True} if rule == "matched" else {"rule": rule}))
        network, ids = exact_tables(load(folded.out, dtype=torch.float64)), tokens(3, 60)
        mask = torch.ones_like(ids)
        mask[0, :23] = mask[2, :2] = 0
        for cuts in ([50, *range(51, 61)], [20, 45, 48, 60]):
            found, cache = read(network, folded.plan, ids, mask, cuts)
            planned = sum(spec.bytes_allocated(60, 4 if form == "int4" else 8) for spec in folded.plan.owned)
            assert cache.nbytes_allocated == 3 * planned
            for row, begin in ((0, 23), (1, 0)):
                own = [end - begin for end in cuts if end > begin]
                if len(own) == len(cuts):
                    alone, _ = read(network, folded.plan, ids[row : row + 1, begin:], mask[row : row + 1, begin:], own)
                    assert_close(
                        found[row : row + 1, begin:], alone, tolerance=1e-6, name=f"{model} row {row} {cuts[:2]}"
                    )


@pytest.mark.parametrize("rule", RULES)
def test_dropping_changes_what_is_said(fold, rule):
    folded, ids = fold("llama_mha", rule=rule, kept=0.5), tokens(1, 60)
    found, _ = read(load(folded.out), folded.plan, ids, torch.ones_like(ids), [50, 60])
    whole = logits(load(folded.out), ids)  # a prompt in one step
    assert torch.allclose(found[:, :50], whole[:, :50], atol=1e-4) and not torch.allclose(
        found[:, 50:], whole[:, 50:], atol=1e-2
    )


def test_generation(fold):
    """Greedy and with beams, of padded rows; drafts are refused."""
    network, ids = load(fold("llama_mha").out), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :11], ids[0, :11] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    whole = network.generate(ids, **options)
    alone = network.generate(ids[:1, 11:], max_new_tokens=12, do_sample=False)
    assert torch.equal(whole[0, 40:], alone[0, 29:])
    assert network.generate(ids, num_beams=3, **options).shape == (2, 52)
    with pytest.raises(RuntimeError, match="drafts cannot be taken back"):
        network.generate(ids[1:], max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=3)


def test_a_copy_of_a_cache_goes_on_alone(fold):
    """As questions are asked of one."""
    folded, ids = fold("llama_mha", "int4"), tokens(1, 60)
    network, cache = load(folded.out), FoldedCache(folded.plan)
    with torch.no_grad():
        network(ids[:, :50], past_key_values=cache)
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(3)
        found = network(ids[:, 50:].expand(3, -1), past_key_values=twin).logits
        expected = network(ids[:, 50:], past_key_values=cache).logits
    assert_close(found, expected.expand(3, -1, -1), tolerance=1e-5)


def test_what_is_refused(fold):
    with pytest.raises(RecipeError, match="there is no scorer 'snapvk'. Did you mean 'snapkv'"):
        make_recipe({"model": "-", "out": "-", "length": {"method": "scored", "rule": "snapvk"}})
    plan = fold("llama_mha").plan
    spec = plan.owned[0]
    for change, found in (
        ({"prompt": "masked"}, "chooses when a prompt was read"),
        ({"rule": "snap"}, "Did you mean 'snapkv'"),
    ):
        broken = dataclasses.replace(spec, tokens=dataclasses.replace(spec.tokens, **change))
        with pytest.raises(PlanError, match=found):
            dataclasses.replace(plan, caches=(broken, *plan.caches[1:]))
    network, ids = load(fold("llama_mha").out, attn_implementation="eager"), tokens(1, 50)
    with torch.no_grad():
        cache = network(ids[:, :49], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="attentions cannot be shown"):
            network(ids[:, 49:], past_key_values=cache, output_attentions=True)


def test_a_prompt_that_nobody_scored_leaves_its_newest(fold):
    """Such as random numbers by which speed is measured."""
    plan = fold("llama_mha", sharing="equal").plan
    cache, run = FoldedCache(plan), plan.owned[0].tokens.runs[0]
    states = torch.arange(50.0).view(1, 1, 50, 1).expand(1, 8, 50, 8)
    for index in range(3):
        cache.update(states, states, index)
        cache.layers[index].settle_runs()
    kept = cache.layers[0].runs[0].k.view()[0, 0, :, 0]
    assert kept.tolist() == [0, 1, *range(50 - run.kept(50) + 2, 50)]
    assert cache.nbytes_allocated == plan.kv_bytes(50)


def test_tokens_stand_for_ever_more(fold):
    """What is added to their scores adds up over prompts; rows of the batch of which nothing is dropped stay as they were."""
    spec = fold("llama_mha", "int4", matched=True, sharing="equal").plan.owned[0]
    one, begin_B = HeadRun(spec.tokens.runs[0], spec.tokens, spec), torch.tensor([0, 39])
    z_BCTR = torch.randn(2, 8, 40, 8, generator=torch.Generator().manual_seed(0))

    def match(index_BCn, counts_Bn):
        return torch.ones(index_BCn.shape), torch.zeros(*index_BCn.shape, 8)

    one.add(z_BCTR, z_BCTR, 40, begin_B, keep_all=False)
    stored_BCTR = read_all(one.pending[1])
    one.choose(-torch.arange(40.0).expand(2, 8, -1), 40, begin_B, match)
    added_BCn, values_BCnV = one.added.tensor()[..., 0], read_all(one.v.view())
    assert (added_BCn[0] == 1).all() and (added_BCn[1] == 0).all()
    assert values_BCnV[0].abs().max() < 1e-4 and torch.equal(values_BCnV[1, :, -1], stored_BCTR[1, :, -1])
    one.add(z_BCTR[:, :, :20], z_BCTR[:, :, :20], 60, begin_B, keep_all=False)
    shown = one.pending[0].shape[2]
    one.choose(-torch.arange(float(shown)).expand(2, 8, -1), 60, begin_B, match)
    added_Cn, kept = one.added.tensor()[0, ..., 0], one.run.kept(40)
    assert (added_Cn[:, :kept] == 2).all() and (added_Cn[:, kept:] == 1).all() and kept < added_Cn.shape[1] < 60


def test_padding_between_two_readings_moves_windows(fold):
    """So that a batch would not be its sequences."""
    network, ids = load(fold("qwen3_norm_window", rule="kvzip").out), tokens(2, 40)
    network(ids, attention_mask=torch.ones_like(ids))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with pytest.raises(ValueError, match="read twice .* cannot be padded where layers have windows"):
        network(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)


@pytest.mark.parametrize("model", ["llama_mha", "llama_yarn", "neox_partial", "bloom_alibi"])
def test_a_second_reading(fold, tiny_dir, model, monkeypatch):
    """What it says is what the original attends to when it reads the prompt twice; nothing of it is stored, nor of a prompt
    that is read before anything is chosen of it."""
    folded, ids = fold(model, rule="kvzip"), tokens(2, 40)
    network, original = load(folded.out), load(tiny_dir / model, attn_implementation="eager")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    twice = torch.cat([mask, mask], dim=1)
    with torch.no_grad():
        probs = original(
            ids.repeat(1, 2),
            attention_mask=twice,
            position_ids=(twice.cumsum(1) - 1).clamp_min(0),
            output_attentions=True,
        ).attentions
    said = {}
    choose = HeadRun.choose

    def spied(self, worth_BCS, *args):
        said.setdefault(id(self), (self, worth_BCS))
        choose(self, worth_BCS, *args)

    monkeypatch.setattr(HeadRun, "choose", spied)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        out = network(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        plain = original(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(out.logits[mask.bool()], plain[mask.bool()], tolerance=1e-4)
    layers = out.past_key_values.owned
    assert [layer.length for layer in layers] == [40] * 3 and said
    for layer, attention in zip(layers, probs, strict=True):
        K = layer.spec.num_kv_heads
        most = (attention * twice[:, None, :, None])[:, :, 40:, :40].amax(2).unflatten(1, (K, -1)).amax(2)
        for run in layer.runs:
            if id(run) in said and run.run.kept(40) < 40:
                found = said[id(run)][1]
                assert_close(found, most[:, list(run.run.heads)] * mask[:, None], tolerance=1e-4)
    assert out.past_key_values.nbytes_allocated == folded.plan.kv_bytes(40, batch_size=2)
