"""What readers choose, against their definitions; sums over what is drawn are unbiased."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvfold.plan.number_format import NumberFormat
from kvfold.plan.reading import Reading
from kvfold.runtimes.kernels.codec import pack, unpack
from kvfold.runtimes.kernels.gathering import taken
from kvfold.runtimes.kernels.packed_tokens import PackedTokens
from kvfold.runtimes.readers import lsh
from kvfold.runtimes.readers.base import Asked
from kvfold.runtimes.readers.lead import Lead
from kvfold.runtimes.readers.lsh import Lsh, likely
from kvfold.runtimes.readers.pages import Pages
from kvfold.runtimes.readers.sampled import Sampled, likelihoods, picked
from kvfold.runtimes.transformers.buffers import GrowingBuffer
from kvfold.testing import assert_close

B, C, N, S, R, T = 2, 2, 4, 60, 8, 2
READING = {"share": 0.4, "least": 10, "sinks": 2, "newest": 4}
PADDING = (7, 0)


@pytest.fixture
def asked():
    """Two sequences, the first behind padding; two queries."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, heads, length, R, generator=generator) for heads, length in ((N, T), (C, S)))
    at = torch.arange(S)
    seen = (at <= torch.arange(S - T, S)[:, None]) & (at >= torch.tensor(PADDING)[:, None, None])
    hidden = torch.zeros(B, 1, T, S).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    return lambda keys=k, index=(): Asked(
        queries_BNTR=q, keys=keys, index=index, seen=hidden, groups=C, count=24, softcap=None
    )


def noted(reader, keys):
    """As a cache does it, in three steps of which one ends inside a page."""
    buffers, start = [GrowingBuffer(unit) for unit in reader.units], 0
    for end in (21, 22, S):
        reader.note(buffers, keys[:, :, :end], end - start, S)
        start = end
    return tuple(buffer.tensor() for buffer in buffers)


def group_attention(asked, b, c, scores_TS):
    """[S], the mean over the queries of a stored head."""
    return (scores_TS + asked.seen[b, 0]).softmax(-1).mean(0)


def always(b):
    return {*range(PADDING[b], PADDING[b] + 2), *range(S - 4, S)}


def test_lead_takes_the_best_by_leading_numbers(asked):
    reader, asked = Lead(Reading(rule="lead", leading=3, **READING)), asked()
    found = reader.choose(asked).index_BGn
    for b in range(B):
        for c in range(C):
            parts = [
                (asked.queries_BNTR[b, n, :, :3] @ asked.keys[b, c, :, :3].T + asked.seen[b, 0]).softmax(-1)
                for n in (2 * c, 2 * c + 1)
            ]
            worth = torch.cat(parts).mean(0)
            more = [s for s in worth.argsort(descending=True).tolist() if s not in always(b)]
            assert set(found[b, c].tolist()) == always(b) | set(more[: 24 - 6])


def test_leading_numbers_of_packed_keys(asked):
    """Are those that the whole rows hold."""
    format = NumberFormat(tiers=((3, 8), (5, 4)))
    keys = asked().keys
    rows = pack(keys, format)
    packed, numbers = PackedTokens(rows, format, torch.float32), unpack(rows, format, torch.float32)
    assert_close(asked(packed).leading(3), asked(numbers).leading(3))
    index = torch.stack([torch.stack([torch.randperm(S)[:9] for _ in range(C)]) for _ in range(B)])
    room = torch.zeros(B, C, 100, rows.shape[3], dtype=torch.uint8)
    room[:, :, 20 : 20 + S] = rows  # as part of a larger storage
    some = taken(PackedTokens(room[:, :, 20 : 20 + S], format, torch.float32), index)
    expected = numbers.gather(2, index[..., None].expand(-1, -1, -1, R))
    assert_close(some.read(0, 9), expected)
    assert torch.equal(taken(numbers, index), expected)


def test_pages_have_bounds(asked):
    """No score is above that of its page, and whole pages are read, those of the highest bounds."""
    reader = Pages(Reading(rule="pages", page=4, **READING))
    (bounds,) = noted(reader, asked().keys)
    asked = asked(index=(bounds,))
    for b in range(B):
        for c in range(C):
            tokens = asked.keys[b, c].unflatten(0, (-1, 4))
            assert torch.equal(bounds[b, c], torch.cat([tokens.amin(1), tokens.amax(1)], dim=-1))
            worth = []
            for n in (2 * c, 2 * c + 1):
                for t in range(T):
                    q = asked.queries_BNTR[b, n, t]
                    most = (torch.maximum(q * tokens.amin(1), q * tokens.amax(1))).sum(-1)
                    assert (most[:, None] >= tokens @ q - 1e-5).all()
                    worth.append(most + asked.seen[b, 0, t].view(-1, 4).amax(1))
            order = torch.stack(worth).softmax(-1).mean(0).argsort(descending=True).tolist()
            more = [
                s for page in order for s in range(4 * page, 4 * page + 4) if s not in always(b) and s >= PADDING[b]
            ]
            found = set(reader.choose(asked).index_BGn[b, c].tolist())
            assert found == always(b) | set(more[: 24 - 6])


def test_how_likely_signatures_collide():
    """By many planes."""
    reading = Reading(rule="lsh", bits=3, tables=6, **READING)
    q, k = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.2], [0.5, 1.0], [-1.0, 0.4], [-1.0, 0.0]])
    planes = torch.randn(20000, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    same = ((planes @ k.T > 0) == (planes @ q > 0)[..., None]).all(2)
    cosine = k @ q / k.norm(dim=1)
    assert torch.allclose(likely(cosine, reading), (same.sum(1) >= 2).float().mean(0), atol=0.012)


def test_sums_over_collisions_are_unbiased(asked, monkeypatch):
    """The estimate of a sum over all tokens, in the mean over many planes."""
    keys = asked().keys
    reading = Reading(rule="lsh", bits=2, tables=6, **{**READING, "share": 1.0})
    total, trials, read = 0.0, 200, []
    for seed in range(trials):
        monkeypatch.setattr(lsh, "_planes", lambda width, count, seed=seed: planes(width, count, seed))
        reader = Lsh(reading)
        one = asked(index=noted(reader, keys))
        choice = reader.choose(dataclasses.replace(one, count=S))
        total = total + estimate(one, choice) / trials
        read.append(float(choice.share))
    wanted = (one.scores(one.queries_BNTR, keys) + one.seen).exp().sum(-1)
    assert ((total - wanted).abs() / wanted).max() < 0.25 and sum(read) / trials < 0.95
    assert ((total - wanted) / wanted).mean().abs() < 0.03


def planes(width, count, seed):
    return torch.randn(width, count, generator=torch.Generator().manual_seed(seed))


def estimate(asked, choice):
    """[B, N, T]: the sum of exp(score) over what was read, as it weighs."""
    scores = asked.scores(asked.queries_BNTR, asked.keys) + asked.seen
    index = choice.index_BGn.repeat_interleave(N // C, dim=1)[:, :, None].expand(-1, -1, T, -1)
    return (scores.gather(3, index) + choice.added_BNTn).exp().sum(-1)


def test_likelihoods():
    worth = torch.tensor([[[0.5, 0.3, 0.1, 0.05, 0.05]], [[1.0, 0.0, 0.0, 0.0, 0.0]]]).double()
    u = likelihoods(worth, torch.tensor([[[3]], [[3]]]))
    assert torch.allclose(u[0, 0], torch.tensor([1, 1, 0.5, 0.25, 0.25]).double())
    assert u[1, 0].tolist() == [1, 0, 0, 0, 0]
    offsets = [(i + 0.5) / 400 for i in range(400)]
    drawn = torch.stack([picked(u, offset) for offset in offsets])
    assert torch.allclose(drawn.double().mean(0), u, atol=0.01)
    assert (drawn[:, 0, 0].sum(-1) == 3).all()


def test_likelihoods_are_those_of_shares_given_out_again_and_again():
    """What is above 1 goes to the others, until nothing is; of worths that differ by many orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    worth = (20 * torch.randn(40, 50, generator=generator, dtype=torch.float64)).exp()
    worth[20:, 12:] = 0
    for count in (0, 1, 7, 12, 13, 50):
        u = torch.zeros_like(worth)
        for _ in range(200):
            sure = u >= 1
            rest = worth.masked_fill(sure, 0)
            total = rest.sum(-1, keepdim=True)
            shared = (count - sure.sum(-1, keepdim=True)).clamp_min(0) * rest / torch.where(total > 0, total, 1.0)
            u = torch.where(sure, 1.0, shared.clamp_max(1))
        found = likelihoods(worth[None], torch.full((1, 40, 1), count))[0]
        assert torch.allclose(found, u, atol=1e-12)
        assert torch.allclose(found.sum(-1), torch.tensor([count] * 20 + [min(count, 12)] * 20).double())


def test_what_is_not_drawn_is_hidden(asked):
    """Where fewer tokens foretell anything than may be read, the others are masked."""
    reader, one = Sampled(Reading(rule="sampled", leading=2, **READING)), asked()
    keys = one.keys.clone()
    keys[:, :, :, :2] = torch.where(
        torch.arange(S)[:, None] < S - 6, -1e4, keys[:, :, :, :2]
    )  # nothing attends to these
    queries = one.queries_BNTR.clone()
    queries[..., :2] = queries[..., :2].abs() + 1
    choice = reader.choose(dataclasses.replace(one, keys=keys, queries_BNTR=queries))
    hidden = choice.added_BNTn == -torch.inf
    assert hidden.any() and not hidden.all() and choice.added_BNTn.max() < torch.inf


def test_sums_over_what_is_drawn_are_unbiased(asked, monkeypatch):
    """Whatever the leading numbers foretell."""
    reader, asked = Sampled(Reading(rule="sampled", leading=2, **READING)), asked()
    total, trials = 0.0, 400
    for i in range(trials):
        monkeypatch.setattr(reader, "_offset", lambda tokens, i=i: (i + 0.5) / trials)
        choice = reader.choose(asked)
        assert choice.index_BGn.shape == (B, C, 24)
        total = total + estimate(asked, choice) / trials
    wanted = (asked.scores(asked.queries_BNTR, asked.keys) + asked.seen).exp().sum(-1)
    assert ((total - wanted).abs() / wanted).max() < 0.02
