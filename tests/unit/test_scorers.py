"""What scorers say of a prompt's tokens, against their definitions."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from tiny import make_tiny

from kvfold import registry
from kvfold.architectures.base import architecture
from kvfold.runtimes.kernels.rotary import apply_rotary
from kvfold.runtimes.scorers import _matching, base, expected_attention, snapkv
from kvfold.runtimes.scorers._matching import matched
from kvfold.runtimes.scorers.base import Prompt
from kvfold.testing import assert_close

T, D = 40, 24


@pytest.fixture(params=["llama_sink", "neox_partial"])
def prompt(request):
    """A prompt of two sequences, the first behind 7 tokens of padding, and its queries and keys before rotation."""
    torch.manual_seed(0)
    network = make_tiny(request.param)
    layer = architecture(network.config.model_type).describe(network)[0]
    N, K, H = layer.num_attention_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = (torch.randn(2, heads, T, H, dtype=torch.float64) for heads in (N, K, K))
    first_B = torch.tensor([7, 0])
    at_T = torch.arange(T)
    seen = (at_T <= at_T[:, None]) & (at_T >= first_B[:, None, None])
    output = torch.randn(D, N, H, dtype=torch.float64)
    made = Prompt(
        layer=layer, queries_BnTH=rotated(layer, q, at_T), absorb=lambda x: x,
        keys_BCSR=rotated(layer, k, at_T), values_BCSV=v, seen=lambda rows: seen[:, None, rows], first_B=first_B,
        output=lambda: output,
    )  # fmt: skip
    return made, q


def rotated(layer, x, at_T):
    angles = (at_T.double()[:, None] * torch.tensor(layer.rotary_speeds, dtype=torch.float64)).repeat(1, 2)
    return apply_rotary(x, angles.cos()[None], angles.sin()[None])


def score(name, prompt):
    return registry.load("scorers", name)().score(prompt)


def attention(prompt, b, n, q_H, tokens):
    """Probabilities over some tokens, and the output in the residual stream."""
    group = prompt.queries_BnTH.shape[1] // prompt.keys_BCSR.shape[1]
    keys, values = (x[b, n // group][tokens] for x in (prompt.keys_BCSR, prompt.values_BCSV))
    probs = (keys @ q_H * prompt.layer.scaling).softmax(0)
    return probs, prompt.output()[:, n] @ (probs @ values)


def real(prompt, b):
    return list(range(int(prompt.first_B[b]), T))


def test_an_effect_is_what_the_loss_of_a_token_does(prompt):
    prompt, _ = prompt
    probs = prompt.probabilities(slice(T - 1, T))
    found = prompt.effects(probs)[:, :, 0]
    for b in range(2):
        tokens = real(prompt, b)
        for n in range(found.shape[1]):
            q_H = prompt.queries_BnTH[b, n, -1]
            whole = attention(prompt, b, n, q_H, tokens)[1]
            for s in tokens[::5]:
                less = attention(prompt, b, n, q_H, [t for t in tokens if t != s])[1]
                assert_close(found[b, n, s], (less - whole).square().sum(), tolerance=1e-4)


def test_effects_of_all_queries_together(prompt):
    probs = prompt[0].probabilities(slice(T - 8, T))
    assert_close(prompt[0].effect(probs), prompt[0].effects(probs).sum(2), tolerance=1e-4)


def test_effects_where_one_token_gets_almost_everything(prompt):
    """In float32, where 1 - p of it, and v - o, have lost their digits."""
    prompt, (N, Q) = prompt[0], (prompt[0].queries_BnTH.shape[1], 24)
    scores = torch.randn(2, N, Q, T, dtype=torch.float64) * torch.linspace(1, 24, Q).double()[:, None]
    single = dataclasses.replace(
        prompt, queries_BnTH=prompt.queries_BnTH.float(), keys_BCSR=prompt.keys_BCSR.float(),
        values_BCSV=prompt.values_BCSV.float(), output=lambda: prompt.output().float(),
    )  # fmt: skip
    probs = scores.softmax(-1)
    values = prompt.values_BCSV.repeat_interleave(N // prompt.values_BCSV.shape[1], dim=1)
    without = torch.stack([scores.index_fill(3, torch.tensor(s), -torch.inf).softmax(-1) for s in range(T)], dim=3)
    moved = torch.einsum(
        "dnv,bnqsv->bnqsd", prompt.output(), without @ values[:, :, None] - (probs @ values)[:, :, :, None]
    )
    expected = moved.square().sum(-1)
    assert probs.max() > 1 - 1e-8
    assert_close(single.effects(probs.float()), expected.float(), tolerance=1e-4)
    assert ((single.effect(probs.float()) - expected.sum(2)).abs() < 1e-3 * expected.sum(2)).all()


@pytest.mark.parametrize("rounds", [1, 3])
def test_observed(prompt, rounds, monkeypatch):
    """Queries before rotation, turned to where they are asked again; of longer prompts more of them."""
    monkeypatch.setattr(base, "TOKENS", {1: 33, 3: 10}[rounds])  # the other sequence has 1 or 4
    prompt, before = prompt
    found, (b, n) = score("observed", prompt), (0, 1)
    group = before.shape[1] // found.shape[1]
    expected = torch.zeros(T, dtype=torch.float64)
    tokens = real(prompt, b)
    count = base.QUERIES * rounds
    for j in range(count):
        at = 7 + int((T - 7) * (j + 0.5) / count)
        asked = (j - rounds // 2) % rounds * base.QUERIES + j // rounds
        beyond = T - 1 + asked * base.STRIDE % base.AHEAD + 1
        for head in range(n * group, (n + 1) * group):
            q_H = rotated(prompt.layer, before[b, head, at][None, None, None], torch.tensor([beyond]))[0, 0, 0]
            probs, whole = attention(prompt, b, head, q_H, tokens)
            for i, s in enumerate(tokens):
                value = prompt.output()[:, head] @ prompt.values_BCSV[b, n, s]
                expected[s] += (probs[i] / (1 - probs[i])).square() * (whole - value).square().sum()
    assert_close(found[b, n, 7:], expected[7:], tolerance=1e-4)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova"])
def test_attention_that_tokens_get(prompt, name, monkeypatch):
    monkeypatch.setattr(snapkv, "WINDOW", 11)
    monkeypatch.setattr(base, "AT_ONCE", 9)
    prompt, _ = prompt
    found = score(name, prompt)
    N, K = prompt.queries_BnTH.shape[1], found.shape[1]
    for b in range(2):
        got = torch.zeros(N, T, dtype=torch.float64)
        first = {"snapkv": T - 11, "h2o": int(prompt.first_B[b]), "tova": T - 1}[name]
        for t in range(first, T):
            tokens = list(range(int(prompt.first_B[b]), t + 1))
            for n in range(N):
                got[n, tokens] += attention(prompt, b, n, prompt.queries_BnTH[b, n, t], tokens)[0]
        expected = got.mean(0).expand(K, -1) if name == "tova" else got.unflatten(0, (K, -1)).sum(1)
        if name == "snapkv":
            around = torch.nn.functional.pad(expected, (2, 2)) / 11
            expected = torch.stack([around[:, i : i + T] for i in range(5)]).mean(0)
        assert_close(found[b][:, int(prompt.first_B[b]) :], expected[:, int(prompt.first_B[b]) :], tolerance=1e-5)


def test_keys_alone(prompt):
    prompt, _ = prompt
    lengths, likeness = score("knorm", prompt), score("keydiff", prompt)
    keys = prompt.keys_BCSR[0, 0, 7:]
    assert_close(lengths[0, 0, 7:], -keys.square().sum(-1).sqrt(), tolerance=1e-5)
    mean = (keys / keys.norm(dim=-1, keepdim=True)).mean(0)
    assert_close(likeness[0, 0, 7:], -(keys @ mean) / keys.norm(dim=-1) / mean.norm(), tolerance=1e-5)


def test_expected_attention_is_that_of_normal_queries(prompt, monkeypatch):
    """E[exp(q . k)] of queries that are drawn with the prompt's mean and covariance, each turned as the mean of rotations."""
    monkeypatch.setattr(expected_attention, "AHEAD", 3)
    monkeypatch.setattr(expected_attention, "QUERIES", 64)
    prompt, before = prompt
    layer = dataclasses.replace(prompt.layer, scaling=0.2)
    prompt = dataclasses.replace(prompt, layer=layer)
    found, b = score("expected_attention", prompt), 1
    H, group = layer.head_dim, before.shape[1] // found.shape[1]
    at = [int(T * (j + 0.5) / 64) for j in range(64)]
    turn = torch.stack(
        [
            rotated(layer, torch.eye(H, dtype=torch.float64)[None, :, None], torch.tensor([T + i]))[0, :, 0]
            for i in range(3)
        ]
    ).mean(0)
    expected = torch.zeros(T, dtype=torch.float64)
    for head in range(group):
        q = before[b, head, at] @ turn
        mean, spread = q.mean(0), (q - q.mean(0)).T @ (q - q.mean(0)) / len(q)
        keys = prompt.keys_BCSR[b, 0] * layer.scaling
        expected += (keys @ mean + ((keys @ spread) * keys).sum(-1) / 2).softmax(0)
    assert_close(found[b, 0], expected * prompt.values_BCSV[b, 0].norm(dim=-1), tolerance=1e-4)


def in_float32(prompt):
    """As the CPU's kernel takes it, where there is one."""
    tensors = {name: getattr(prompt, name).float() for name in ("queries_BnTH", "keys_BCSR", "values_BCSV")}
    return dataclasses.replace(prompt, **tensors, output=lambda: prompt.output().float())


def test_observed_in_rounds_by_the_kernel(prompt, monkeypatch):
    """As torch's operations say in float64; of a sequence behind padding fewer rounds."""
    monkeypatch.setattr(base, "TOKENS", 13)
    prompt, _ = prompt
    assert prompt.rounds_B.tolist() == [2, 3] and not prompt.by_kernel
    assert in_float32(prompt).by_kernel == (shutil.which("c++") is not None)
    found, wanted = score("observed", in_float32(prompt)), score("observed", prompt)
    for b in range(2):
        assert_close(found[b][:, real(prompt, b)], wanted[b][:, real(prompt, b)].float(), tolerance=1e-4)


@pytest.mark.parametrize("hidden", [False, True])
def test_what_stays_is_matched_by_the_kernel(prompt, hidden):
    """Where nothing is hidden; as all attention says."""
    prompt, _ = prompt
    if not hidden:
        prompt = dataclasses.replace(
            prompt, first_B=torch.zeros(1, dtype=torch.long), seen=lambda rows: torch.ones(1, 1, 1, T).bool()
        )
    index = torch.stack([torch.randperm(T - 7)[:12].sort().values + 7 for _ in range(2 * prompt.keys_BCSR.shape[1])])
    given = index.view(2, -1, 12), torch.ones(2, 12, dtype=torch.bool)
    found, wanted = (matched(x, slice(None), *given) for x in (in_float32(prompt), prompt))
    assert_close(found[0], wanted[0].float(), tolerance=1e-3)
    assert_close(found[1], wanted[1].float(), tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_observed_of_padding_in_another_default_dtype(prompt, dtype):
    prompt = in_float32(prompt[0])
    wanted = score("observed", prompt)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(score("observed", dataclasses.replace(prompt)), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")
def test_what_stays_is_matched_in_bfloat16_where_scores_are_large(prompt):
    """As well as where everything is bfloat16's alike."""
    prompt, _ = prompt
    halves = {"keys_BCSR": prompt.keys_BCSR.bfloat16(), "values_BCSV": prompt.values_BCSV.bfloat16()}
    halves["queries_BnTH"] = (30 * prompt.queries_BnTH).bfloat16()
    seen = {"first_B": torch.zeros(1, dtype=torch.long), "seen": lambda rows: torch.ones(1, 1, 1, T).bool()}
    prompt = dataclasses.replace(prompt, **halves, **seen)
    exact = dataclasses.replace(prompt, **{name: x.double() for name, x in halves.items()})
    C = prompt.keys_BCSR.shape[1]
    index = torch.stack([torch.randperm(T)[:30].sort().values for _ in range(2 * C)]).view(2, C, 30)
    shares, wanted = _matching._by_all(exact, slice(None), index)
    found, averages = _matching._by_kernel(prompt, slice(None), index)
    assert prompt.by_kernel
    assert_close(averages, wanted.float(), tolerance=2e-2)
    assert_close(found.sum(-1), shares.sum(-1).float(), tolerance=2e-2)


def test_queries_that_see_nothing_of_what_stays_ask_for_nothing(prompt):
    """Whose probabilities of it are too small to be numbers."""
    prompt, _ = prompt
    sharp = dataclasses.replace(prompt, queries_BnTH=1e4 * prompt.queries_BnTH)
    index = torch.arange(20, 26).expand(2, prompt.keys_BCSR.shape[1], 6)
    assert (sharp.asked_again[..., 20:26].sum(-1) == 0).any()
    added, values = matched(sharp, slice(None), index, torch.ones(2, 6, dtype=torch.bool))
    assert added.isfinite().all() and values.isfinite().all()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_stays_is_matched(prompt, share):
    """To the mass and the averages that the prompt's own queries get of everything; of all tokens nothing changes."""
    prompt, _ = prompt
    C, B = prompt.keys_BCSR.shape[1], len(prompt.first_B)
    index = torch.arange(T).expand(B, C, T)
    counts = prompt.shown_BS
    if share < 1:
        index = torch.stack(
            [torch.stack([torch.randperm(T - 7)[:12].sort().values + 7 for _ in range(C)]) for _ in range(B)]
        )
        counts = torch.ones(B, 12, dtype=torch.bool)
    added, values = matched(prompt, slice(None), index, counts)
    assert (added >= 0).all() and added.shape == index.shape
    group = prompt.queries_BnTH.shape[1] // C
    before, after = [], []
    for b in range(B):
        for n in range(group * C):
            c = n // group
            probs, own = prompt.asked_again[b, n], prompt.values_BCSV[b, c]
            kept = index[b, c][counts[b]]
            wanted = probs @ own
            few = probs[:, kept] / probs[:, kept].sum(-1, keepdim=True)
            weighed = probs[:, kept] * added[b, c][counts[b]].exp()
            before.append(few @ own[kept] - wanted)
            after.append(weighed / weighed.sum(-1, keepdim=True) @ values[b, c][counts[b]] - wanted)
            if share < 1:
                mass = probs[:, kept].sum(-1), weighed.sum(-1)
                assert (mass[1] - 1).square().mean() < (mass[0] - 1).square().mean()
    lost, left = (torch.cat(parts).square().mean() for parts in (before, after))
    assert left < 0.3 * lost if share < 1 else left < 1e-12
