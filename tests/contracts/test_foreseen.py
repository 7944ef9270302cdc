"""Tokens that stay for what the layer's input says of them: whatever the steps in which they come, the same ones do."""

from __future__ import annotations

import pytest
import torch
from dropped import CONTEXT, FORMS, folds
from tiny import FULL_ATTENTION, MODELS, in_steps, load, logits, tokens

from kvfold.plan.token_runs import FORESEEN, TokenRun, TokenRuns
from kvfold.runtimes.kernels.attention import grouped_attention
from kvfold.runtimes.kernels.head_runs import _prompt
from kvfold.runtimes.kernels.packed_tokens import RunPlace, RunTokens
from kvfold.runtimes.kernels.seen_tokens import columns, not_gone
from kvfold.runtimes.kernels.survival import NEVER, gone_at
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.foreseen_run import marked
from kvfold.testing import assert_close

CASES = [
    pytest.param(model, form, id=f"{form}-{model}") for form in FORMS for model in MODELS if model != "mistral_window"
]
every_form = pytest.mark.parametrize(("model", "form"), CASES)
LENGTH = {"method": "foreseen", "kept": 0.6, "sinks": 2, "newest": 5}
BLOCK = 9


@pytest.fixture(scope="module")
def fold(tiny_dir, tmp_path_factory):
    return folds(tiny_dir, tmp_path_factory.mktemp("foreseen"), LENGTH)


@pytest.fixture
def often(monkeypatch):
    """Tokens are dropped at every ninth."""
    monkeypatch.setattr("kvfold.runtimes.kernels.head_runs.SURVIVING", 16)
    for module in ("kernels.survival", "transformers.foreseen_run", "transformers.head_run"):
        monkeypatch.setattr(f"kvfold.runtimes.{module}.RUN_BLOCK", BLOCK)


@pytest.mark.filterwarnings("ignore:kv_budget")
@pytest.mark.usefixtures("often")
@every_form
def test_steps_and_padding_change_nothing(fold, model, form):
    """In float64, where codes do not depend on how a product was rounded."""
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


def dropped_one_by_one(run, tokens, worth_S, length):
    """{token: the length at which it goes}, by the definition."""
    gone, held = {}, []
    for at in range(1, length + 1):
        held.append(at - 1)
        if at % BLOCK == 0:
            while len(held) > run.kept(at):
                old = [s for s in held if tokens.sinks <= s < at - tokens.newest]
                worst = min(old, key=lambda s: (float(worth_S[s]), s))
                gone[worst] = at
                held.remove(worst)
    return gone


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(("share", "least"), [(0.0, 11), (0.4, 9), (0.7, 9)])
def test_the_least_worth_are_dropped(share, least):
    """Ties by age; a sequence that begins later loses the same ones later."""
    run = TokenRun(heads=(0, 1), share=share, least=least)
    tokens = TokenRuns(runs=(run,), rule=FORESEEN, sinks=3, newest=4)
    worth_BCS = torch.randint(0, 9, (2, 2, 70), generator=torch.Generator().manual_seed(0)).float()
    begin_B1 = torch.tensor([[0], [13]])
    worth_BCS[0, :, :3] = worth_BCS[1, :, 13:16] = torch.inf
    own_BS = torch.arange(70) - begin_B1
    gone = gone_at(run, tokens, worth_BCS, own_BS, [(0, 70), (0, 57)], whole=False)
    for b, begin in enumerate((0, 13)):
        for c in range(2):
            expected = dropped_one_by_one(run, tokens, worth_BCS[b, c, begin:], 70 - begin)
            found = {s: int(at) for s, at in enumerate(gone[b, c, begin:]) if at != NEVER}
            assert found == expected and len(expected) > 5
    assert (gone[1, :, :13] == NEVER).all()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("prompt", ["masked", "whole"])
def test_prompts_meet_what_is_left(prompt):
    """Behind tokens that were chosen before: what masks of all tokens say."""
    run, made = TokenRun(heads=(0, 1), share=0.3, least=20), torch.Generator().manual_seed(0)
    tokens = TokenRuns(runs=(run,), rule=FORESEEN, sinks=2, newest=5, prompt=prompt)
    place, length, T = RunPlace(195, 40, torch.full((2,), 40)), 370, 170
    held = RunTokens((), (), length, tokens)
    column_1S = columns(place, length, torch.zeros(1, 1, dtype=torch.long))[:1]
    worth = torch.rand(2, 2, column_1S.shape[1], generator=made)
    gone = gone_at(run, tokens, worth, column_1S.expand(2, -1), [(200, 370)] * 2, whole=prompt == "whole")
    place = place._replace(gone_BCS=gone)
    k, v = torch.randn(2, 2, 2, column_1S.shape[1], 16, generator=made)
    q = torch.randn(2, 4, T, 16, generator=made)
    seen = not_gone(held, place, None, q, slice(0, T))
    wanted, _ = grouped_attention(q, k, v, seen.repeat_interleave(2, dim=1) if seen.shape[1] > 1 else seen, scale=0.25)
    assert_close(_prompt(q, k, v, run, held, place, None, 0.25), wanted)


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_real_bytes_are_planned_bytes(fold, model, form):
    plan = fold(model, form).plan
    network, cache, ids = load(fold(model, form).out), FoldedCache(plan), tokens(2, 400)
    assert plan.drops_tokens and plan.context_len == CONTEXT and not plan.depends_on_steps
    with torch.no_grad():
        for start, end in ((0, 3), (3, 37), (37, 38), (38, 350), *((i, i + 1) for i in range(350, 386))):
            network(ids[:, start:end], past_key_values=cache)
            assert cache.nbytes_allocated == plan.kv_bytes(end, batch_size=2)


@pytest.mark.parametrize("model", FULL_ATTENTION)
def test_everything_kept_is_the_original(fold, tiny_dir, model):
    kept = fold(model, kept=1.0)
    assert torch.equal(logits(load(kept.out), tokens()), logits(load(tiny_dir / model), tokens()))


@pytest.mark.filterwarnings("ignore:kv_budget")
@every_form
def test_generation_with_a_cache_equals_generation_without(fold, model, form):
    """Greedy and beams that reorder rows, of padded rows, past several drops."""
    network, ids = load(fold(model, form).out, dtype=torch.float64), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11], ids[0, :11] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    for beams in (1, 3):
        with_cache = network.generate(ids, num_beams=beams, **options)
        assert torch.equal(with_cache, network.generate(ids, num_beams=beams, use_cache=False, **options)), beams


@pytest.mark.parametrize("model", ["llama_mha", "bloom_alibi"])
def test_a_prompt_that_is_read_whole(fold, tiny_dir, model):
    """Its logits are the original's, and what stays of it is the worthiest of all of it."""
    folded, original, ids = fold(model, prompt="whole"), load(tiny_dir / model), tokens(2, 64)
    network, cache = load(folded.out), FoldedCache(folded.plan)
    with torch.no_grad():
        assert_close(network(ids, past_key_values=cache).logits, original(ids).logits)
        whole = original(ids, use_cache=True).past_key_values
    assert folded.plan.depends_on_steps and cache.nbytes_allocated == folded.plan.kv_bytes(64, batch_size=2)
    for layer, spec in enumerate(folded.plan.caches):
        for one in cache.layers[layer].runs:
            kept = one.run.kept(64)
            keys = whole.layers[layer].keys[:, list(one.run.heads)]
            places = torch.cdist(one.k.view(), keys).argmin(-1).sort(-1).values
            if one.columns is not None:  # equal tokens have equal keys in layers below
                places = one.columns.view()[..., 0]
            assert places.shape[2] == kept and spec.tokens.foreseen
            assert (places[..., :2] == torch.arange(2)).all() and (places[..., -5:] == torch.arange(59, 64)).all()


def test_what_cannot_be_right_is_refused(fold):
    folded = fold("llama_mha")
    network, cache, ids = load(folded.out), FoldedCache(folded.plan), tokens(1, 70)
    with torch.no_grad():
        for start, end in ((0, 60), (60, 66)):
            network(ids[:, start:end], past_key_values=cache)
    cache.crop(-2)
    with pytest.raises(RuntimeError, match="have forgotten what would come back into sight"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match="drafts cannot be taken back"):
        cache.activate_past_recording()
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="need kvfold's own cache"):
        network(ids, past_key_values=DynamicCache())


def test_the_map_is_the_ridge_regression(tiny_dir):
    """Against the normal equations, and on a worth that is linear in the input."""
    from tiny import make_tiny

    from kvfold.architectures.base import architecture
    from kvfold.calibration.foresight import RIDGE, Foresight

    network = make_tiny("llama_mha")
    layer = architecture(network.config.model_type).describe(network)[0]
    torch.manual_seed(0)
    hidden, truth = torch.randn(2, 400, layer.hidden_size) + 1, torch.randn(layer.num_kv_heads, layer.hidden_size) / 9
    foresight = Foresight(layer)
    for hidden_TD in hidden:
        foresight.see(hidden_TD, (truth @ hidden_TD.T - 2).exp())
    found = foresight.gather()
    x = hidden.flatten(0, 1).double()
    x, y = x - x.mean(0), (x @ truth.T.double())
    gram = x.T @ x / len(x)
    expected = torch.linalg.solve(
        gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double(), x.T @ (y - y.mean(0))
    )
    assert_close(found, expected.T / len(x), tolerance=1e-5)
    assert_close(found, truth.double(), tolerance=0.2)


def test_what_a_token_is_worth_fits_two_bytes():
    """The first ones stay before whatever else a layer's input says."""
    runs = TokenRuns(runs=(TokenRun(heads=(0,), share=0.5, least=6),), rule="foreseen", sinks=2, newest=4)
    worth = torch.tensor([[[0.0, 1.0, 7e4, torch.inf, torch.nan, -torch.inf, -7e4, 2.0]]])
    found = marked(runs, worth, 8, None)
    assert found.isfinite().tolist() == [[[False] * 2 + [True] * 6]]
    assert found[0, 0, 2:].tolist() == [65504.0, 65504.0, 0.0, -65504.0, -65504.0, 2.0]


def test_tokens_of_which_nobody_said_what_they_are_worth_leave_the_newest(fold):
    """Such as random numbers by which speed is measured."""
    plan = fold("llama_mha", "plain").plan
    cache, run, K = FoldedCache(plan), plan.owned[0].tokens.runs[0], plan.owned[0].num_kv_heads
    states = torch.arange(64.0).view(1, 1, 64, 1).expand(1, K, 64, 8)
    for index in range(len(plan.caches)):
        cache.update(states, states, index)
    kept, sinks = cache.layers[0].runs[0].k.view()[0, 0, :, 0], plan.owned[0].tokens.sinks
    assert kept.tolist() == [*range(sinks), *range(64 - run.kept(64) + sinks, 64)]
