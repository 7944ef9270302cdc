"""What forgetting costs a head, against its definition; and who gets the tokens that a budget leaves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import make_tiny, save_tiny

import kvfold
from kvfold.architectures.base import architecture
from kvfold.calibration.forgetting import SHARES, Choice, costs, forgetting, with_repetition
from kvfold.checkpoint.source import open_source
from kvfold.compression.recipe import make_recipe
from kvfold.compression.share_tokens import MOST_RUNS, share_tokens
from kvfold.errors import BudgetError, DataError, PlanError, RecipeError
from kvfold.methods.length.recency import Recency
from kvfold.methods.length.scored import Scored
from kvfold.plan.plan import CachePlan, source_layer, source_plan
from kvfold.runtimes import reference
from kvfold.testing import assert_close

SINKS = 3


def kept(share, context, t):
    """The tokens that query t still has, of a context that is followed by itself."""
    newest = max(int(share * context) - SINKS, 0) if share < 1 else context
    end = min(t + 1, context)
    return [s for s in range(t + 1) if s < SINKS or s >= context or s >= end - newest]


@pytest.mark.parametrize("model", ["llama_mha", "bloom_alibi", "gemma2_softcap", "llama_sink"])
def test_costs_are_those_of_the_definition(model):
    network = make_tiny(model)
    arch = architecture(network.config.model_type)
    layer = dataclasses.replace(arch.describe(network)[0], window=None)
    N, K, H, S = layer.num_attention_heads, layer.num_kv_heads, layer.head_dim, 48
    torch.manual_seed(0)
    q, g = torch.randn(2, N, 2 * S, H, dtype=torch.float64)
    k, v = torch.randn(2, K, 2 * S, H, dtype=torch.float64)
    found = costs(layer, q, k, v, g, SINKS)
    expected = torch.zeros(2, K, len(SHARES), dtype=torch.float64)
    for half, queries in enumerate((range(S // 2, S), range(S, 2 * S))):
        for i, share in enumerate(SHARES):
            for t in queries:
                felt = torch.zeros(K, dtype=torch.float64)
                for n in range(N):
                    c = n * K // N
                    outs = [out_of(layer, n, q[n, t], k[c], v[c], seen) for seen in (kept(share, S, t), range(t + 1))]
                    felt[c] += g[n, t] @ (outs[0] - outs[1])
                expected[half, :, i] += felt.square() / 2 / len(queries)
    assert_close(found, expected, tolerance=1e-6)
    assert not found[..., -1].any() and found[..., 0].all()


@pytest.mark.parametrize("model", ["llama_mha", "bloom_alibi", "llama_sink"])
def test_costs_of_a_choice_are_those_of_the_definition(model):
    """What is chosen when a prompt ends is what all later queries have of it."""
    network = make_tiny(model)
    arch = architecture(network.config.model_type)
    layer = dataclasses.replace(arch.describe(network)[0], window=None)
    N, K, H, S, newest = layer.num_attention_heads, layer.num_kv_heads, layer.head_dim, 48, 5
    torch.manual_seed(0)
    q, g = torch.randn(2, N, 2 * S, H, dtype=torch.float64)
    k, v = torch.randn(2, K, 2 * S, H, dtype=torch.float64)
    found = costs(layer, q, k, v, g, SINKS, Choice("knorm", newest), lambda: None)
    expected = torch.zeros(3, K, len(SHARES), dtype=torch.float64)
    longest = k[:, :S].float().norm(dim=-1).double().max()
    for part, (prompt, end) in enumerate(((S // 2, S), (S, 2 * S))):
        for c in range(K):
            late, length = prompt - newest, k[c].float().norm(dim=-1)
            order = [*reversed(range(late, prompt)), *sorted(range(SINKS, late), key=lambda t: length[t])]
            for i, share in enumerate(SHARES):
                stays = order[: max(int(share * prompt) - SINKS, 0)] if share < 1 else order
                for t in range(prompt, end):
                    seen = [*range(SINKS), *stays, *range(prompt, t + 1)]
                    felt = torch.zeros((), dtype=torch.float64)
                    for n in (n for n in range(N) if n * K // N == c):
                        outs = [out_of(layer, n, q[n, t], k[c], v[c], some) for some in (seen, range(t + 1))]
                        felt += g[n, t] @ (outs[0] - outs[1])
                    expected[part, c, i] += felt.square() / 2 / (end - prompt)
                if part:  # of the whole context
                    expected[2, c, i] = sum(longest - length[t].double() for t in order[len(stays) :])
    assert_close(found, expected, tolerance=1e-6)


def out_of(layer, head, q_H, k_TH, v_TH, seen):
    """One query's output over some tokens, by the oracle."""
    mask = torch.zeros(1, len(k_TH), dtype=torch.bool)
    mask[0, list(seen)] = True
    return reference._attend(layer, head, q_H[None], k_TH, v_TH, mask)[0]


def test_curves_are_kept_and_fall(tmp_path):
    source = open_source(save_tiny(make_tiny("llama_sink"), tmp_path / "model"))
    tokens = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    found = forgetting(source, tokens, run_dir=tmp_path / "run", device="cpu", sinks=2)
    again = forgetting(source, tokens, run_dir=tmp_path / "run", device="cpu", sinks=2)
    assert torch.equal(found.nats_LCn(4.0), again.nats_LCn(4.0))
    nats_LCn = found.nats_LCn(4.0)
    assert nats_LCn.shape == (3, 3, len(SHARES))
    assert (nats_LCn.diff(dim=-1) <= 0).all() and not nats_LCn[..., -1].any() and nats_LCn.any()
    assert torch.equal(nats_LCn, found.ordinary_LCn + 4 * found.repeated_LCn)


def test_what_is_foreseen(tmp_path, monkeypatch):
    """The curves are those of a scorer that says what the map says; the map is kept beside them."""
    source = open_source(save_tiny(make_tiny("llama_sink"), tmp_path / "model"))
    tokens = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    choice = Choice("foreseen", 5)
    found = forgetting(source, tokens, run_dir=tmp_path / "run", device="cpu", sinks=2, choice=choice)
    assert found.worth_LCD.shape == (3, 3, source.layers[0].hidden_size) and found.worth_LCD.any(-1).all()
    again = forgetting(source, tokens, run_dir=tmp_path / "run", device="cpu", sinks=2, choice=choice)
    assert torch.equal(again.worth_LCD, found.worth_LCD) and torch.equal(again.repeated_LCn, found.repeated_LCn)
    best = forgetting(source, tokens, run_dir=tmp_path / "run", device="cpu", sinks=2, choice=Choice("repeated", 5))
    worst = forgetting(source, tokens, run_dir=tmp_path / "run", device="cpu", sinks=2, choice=Choice("knorm", 5))
    assert best.repeated_LCn.sum() < found.repeated_LCn.sum() < worst.repeated_LCn.sum()


def test_costs_of_a_known_worth_are_those_of_a_scorer_that_says_it():
    network = make_tiny("llama_mha")
    layer = architecture(network.config.model_type).describe(network)[0]
    torch.manual_seed(0)
    q, g = torch.randn(2, layer.num_attention_heads, 96, layer.head_dim, dtype=torch.float64)
    k, v = torch.randn(2, layer.num_kv_heads, 96, layer.head_dim, dtype=torch.float64)
    by_norm = costs(layer, q, k, v, g, SINKS, Choice("knorm", 5), lambda: None)
    worth_KS = -k[:, :48].float().norm(dim=-1)
    assert torch.equal(costs(layer, q, k, v, g, SINKS, Choice("foreseen", 5), lambda: None, worth_KS), by_norm)


def plan_of(context=1024):
    """Three layers of four heads."""
    layers = architecture("llama").describe(make_tiny("llama_mha", num_attention_heads=4, num_key_value_heads=4))
    plan = source_plan([source_layer(layer) for layer in layers], "float32")
    method = Recency(sharing="measured")
    caches = tuple(method.apply(layer, spec) for layer, spec in zip(layers, plan.caches, strict=True))
    return dataclasses.replace(plan, caches=caches, context_len=context)


def tokens_of(plan: CachePlan):
    return torch.tensor(
        [
            [next(run.kept(plan.context_len) for run in spec.tokens.runs if head in run.heads) for head in range(4)]
            for spec in plan.owned
        ]
    )


def test_tokens_go_to_heads_that_need_them():
    nats = torch.full((3, 4, len(SHARES)), 1e-6, dtype=torch.float64)
    nats[1, 2] = torch.tensor([2.0, 1.9, 1.8, 1.7, 1.5, 1.2, 0.8, 0.5, 0.2, 0.0])
    nats[2, 0] = nats[1, 2] / 2
    nats[..., -1] = 0
    made = share_tokens(plan_of(), Recency(), 0.25, lambda owner, spec: nats[owner], SHARES)
    kept = tokens_of(made)
    assert kept[1, 2] == 1024 and kept[2, 0] > 512 and kept.sum() <= 0.25 * 12 * 1024
    assert kept.min() == 36 and made.kv_budget <= 0.2501
    assert all(len(spec.tokens.runs) <= MOST_RUNS for spec in made.owned)


def test_heads_that_compete_keep_what_one_ranking_of_their_tokens_keeps():
    """As Ada-KV does: of the mean of a layer each keeps a part, the rest goes to what is worth most in all its heads."""
    context, mean, floor = 1024, 256, round(0.2 * 256)
    torch.manual_seed(0)
    steepness = torch.tensor([[0.5, 1.0, 2.0, 8.0], [1.0, 1.0, 1.0, 1.0], [0.2, 0.2, 4.0, 4.0]], dtype=torch.float64)
    worth_LCT = (-steepness[..., None] * torch.arange(context) / 100).exp()
    curves = torch.stack([worth_LCT[..., round(share * context) :].sum(-1) for share in SHARES], dim=-1)
    method = Scored(rule="snapkv", sharing="ada", kept=mean / context)
    kept = tokens_of(share_tokens(plan_of(), method, None, lambda owner, spec: curves[owner], SHARES))
    assert (kept.double().mean(1) <= mean).all() and (kept.double().mean(1) > 0.97 * mean).all()
    assert kept.min() >= floor and (kept[1] == mean).all()
    for layer, worth_CT in enumerate(worth_LCT):
        above = worth_CT.clone()
        above[:, :floor] = torch.inf
        chosen = above.flatten().topk(4 * mean).indices // context
        assert (kept[layer] - chosen.bincount(minlength=4)).abs().max() <= context / 16, (layer, kept[layer])


@pytest.mark.parametrize(("context", "kept"), [(32768, 0.01), (16384, 0.013), (1024, 0.04)])
def test_heads_that_compete_for_few_tokens_keep_no_more(context, kept):
    curves = torch.rand(3, 4, len(SHARES), dtype=torch.float64).flip(-1).cumsum(-1).flip(-1)
    method = Scored(rule="snapkv", sharing="ada", kept=kept)
    made = tokens_of(share_tokens(plan_of(context), method, None, lambda owner, spec: curves[owner], SHARES))
    assert (made.double().mean(1) <= kept * context).all() and made.min() >= 36


def test_equal_shares_ask_for_no_curves():
    kept = tokens_of(share_tokens(plan_of(), Recency(sharing="equal", kept=0.5), None, None, SHARES))
    assert (kept == 512).all()


def test_a_budget_that_every_head_exceeds_is_refused():
    with pytest.raises(BudgetError, match="every head keeps 36 of 1,024 tokens at least, 0.0352"):
        share_tokens(plan_of(), Recency(), 0.03, lambda owner, spec: torch.zeros(4, len(SHARES)), SHARES)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"length": {"method": "recency"}}, RecipeError, "say how many tokens stay"),
        ({"length": {"method": "recency", "kept": 1.5}}, RecipeError, "length.kept is 1.5"),
        (
            {"length": {"method": "recency", "sharing": "fair"}},
            RecipeError,
            "one of equal, pyramid, ada, classes, measured",
        ),
        ({"length": {"method": "recency", "kept": 0.5, "sharing": "ada"}}, RecipeError, "length.method=scored"),
        ({"length": {"method": "foreseen", "kept": 0.5, "sharing": "ada"}}, RecipeError, "length.method=scored"),
        (
            {"preset": "windows", "kv_budget": 0.5, "calibration": {"data": None}},
            DataError,
            "length? needs|needs calib",
        ),
        (
            {"length": {"method": "recency", "kept": 0.5}, "kv_budget": 0.5, "width": {"method": "mla"}},
            PlanError,
            "shared_latent",
        ),
        ({"preset": "svd_a", "kv_budget": 0.5, "length": {"method": "recency"}}, RecipeError, "length.kept=0.5"),
        ({"preset": "windows", "kv_budget": 0.5, "context_len": 0}, RecipeError, "context_len is 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_takes_long(tmp_path, fields, error, said):
    model = save_tiny(make_tiny("llama_mha"), tmp_path / "model")
    with pytest.raises(error, match=said):
        kvfold.compress(make_recipe({"model": str(model), "out": str(tmp_path / "out")} | fields), device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_context_is_repeated_passage_by_passage():
    contexts = torch.arange(160).view(2, 80)
    both = with_repetition(contexts)
    assert torch.equal(both[:, :80], contexts) and torch.equal(both[:, 80:].sort(dim=1).values, contexts)
    assert (both[:, 80:].diff(dim=1) == 1).sum() >= 2 * (79 - 2)


@pytest.mark.parametrize(
    ("mean", "first", "last"), [(256.0, 476, 36), (600.0, 1024, 176), (40.0, 44, 36), (1024.0, 1024, 1024)]
)
def test_a_pyramid_keeps_the_mean(mean, first, last):
    """Linear from the first layer to the last, between what every head keeps and the whole context."""
    method = Recency(sharing="pyramid")
    kept = method.spread(mean, 30, 1024)
    assert (kept[0], kept[-1]) == (first, last) and not method.weighs_heads
    assert sum(kept) <= 30 * mean < sum(kept) + 30
    assert kept == sorted(kept, reverse=True)


def test_equal_shares_keep_what_was_asked_for():
    """Though 0.6 * 1,000 tokens are less by what products of bytes were rounded by."""
    assert Recency().spread(600 * (1 - 2e-16), 2, 1000) == [600] * 2
    assert Recency(sharing="pyramid").spread(58.85, 12, 2048)[-1] == 36


def test_queries_that_lose_everything_they_see_cost_a_number():
    """Where all that stays is too far below what went."""
    network = make_tiny("llama_mha")
    layer = architecture(network.config.model_type).describe(network)[0]
    torch.manual_seed(0)
    q, g = 12 * torch.randn(2, layer.num_attention_heads, 128, layer.head_dim)
    k, v = 12 * torch.randn(2, layer.num_kv_heads, 128, layer.head_dim)
    assert costs(layer, q, k, v, g, SINKS).isfinite().all()
