"""Prompts over two forms of their tokens: blocks that are merged by their log-sums give what one softmax gives."""

import pytest
import torch
from packed_forms import numbers

from kvfold.runtimes.kernels import aged_prefill
from kvfold.runtimes.kernels.aged_prefill import prefill_by_age, prefill_by_biases, prefill_by_log_sums
from kvfold.testing import assert_close

SCALE, RECENT = 0.3, 6


def expected(q_BNTH, keys, values):
    """In float64, every score in the form that its age asks for. Near tokens are the last ones."""
    N, T = q_BNTH.shape[1:3]
    S = keys[0].shape[2]
    age_TS = torch.arange(S - T, S)[:, None] - torch.arange(S)
    per_form = []
    for form in (0, 1):
        k, v = (
            torch.cat([x.new_zeros(*x.shape[:2], max(S - x.shape[2], 0), x.shape[3]), x], dim=2)[:, :, -S:]
            for x in (keys[form].double(), values[form].double())
        )
        k, v = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (k, v))
        per_form.append((q_BNTH.double() @ k.mT * SCALE, v))
    fine = (age_TS < RECENT) & (age_TS >= 0)
    scores = torch.where(fine, per_form[1][0], per_form[0][0]).masked_fill(age_TS < 0, -torch.inf)
    probs = scores.softmax(-1)
    return ((probs * ~fine) @ per_form[0][1] + (probs * fine) @ per_form[1][1]).transpose(1, 2)


def drawn(T, S, near, *, dtype=torch.float32, batch=2):
    """Four query heads that share two, values of fewer numbers than keys."""
    q, keys = numbers(batch, 4, T, 16), [numbers(batch, 2, n, 16, seed=1 + i) for i, n in enumerate((S, near))]
    values = [numbers(batch, 2, n, 12, seed=3 + i) for i, n in enumerate((S, near))]
    return q.to(dtype), *(tuple(x.to(dtype) for x in pair) for pair in (keys, values))


LENGTHS = {
    "a whole prompt": (30, 30, 30), "whole blocks": (24, 24, 24), "shorter than recent": (5, 5, 5),
    "as long as recent": (6, 6, 6), "one more": (7, 7, 7), "a piece": (20, 43, 25), "behind few": (20, 23, 23),
    "behind as many as recent": (20, 26, 25), "few behind many": (3, 40, 8), "near beyond a window": (20, 30, 34),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_both_ways_give_what_one_softmax_gives(lengths, dtype, monkeypatch):
    monkeypatch.setattr(aged_prefill, "QUERIES_AT_ONCE", 4)
    q, keys, values = drawn(*lengths, dtype=dtype)
    wanted = expected(q, keys, values)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    ways = {
        "log_sums": prefill_by_log_sums(q, keys, values, recent=RECENT, scale=SCALE),
        "biases": prefill_by_biases(q, keys, values, None, recent=RECENT, scale=SCALE),
        "age": prefill_by_age(q, keys, values, None, recent=RECENT, scale=SCALE),
    }
    for name, found in ways.items():
        assert found.dtype == dtype
        assert_close(found.double(), wanted, tolerance=tolerance, name=name)


def test_what_a_mask_hides_is_not_seen():
    q, keys, values = drawn(20, 20, 20, batch=1)
    padded = [tuple(torch.cat([100 + x[:, :, :3], x], dim=2) for x in pair) for pair in (keys, values)]
    mask = torch.ones(20, 23, dtype=torch.bool).tril(3)[None, None]
    mask[..., :3] = False
    found = prefill_by_age(q, *padded, mask, recent=RECENT, scale=SCALE)
    assert_close(found.double(), expected(q, keys, values), tolerance=1e-5)


def test_gradients_reach_queries_keys_and_values_of_both_forms():
    q, keys, values = drawn(20, 20, 20, dtype=torch.float64)
    leaves = [q, *keys, *values]
    for x in leaves:
        x.requires_grad_(True)
    wanted = torch.autograd.grad(expected(q, keys, values).square().sum(), leaves)
    found = torch.autograd.grad(
        prefill_by_age(q, keys, values, None, recent=RECENT, scale=SCALE).square().sum(), leaves
    )
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, tolerance=1e-9)


def test_long_prompts_are_read_by_log_sums(monkeypatch):
    """Which takes half the time; short ones, and numbers that its operator would misread, are not."""
    monkeypatch.setattr(aged_prefill, "prefill_by_biases", lambda *given, **sizes: "biases")
    monkeypatch.setattr(aged_prefill, "prefill_by_log_sums", lambda *given, **sizes: "log_sums")

    def way(q, keys, values):
        return prefill_by_age(q, keys, values, None, recent=RECENT, scale=SCALE)

    q, keys, values = drawn(24, 24, 24)
    assert way(q, keys, values) == "log_sums" and way(*drawn(23, 23, 23)) == "biases"
    assert way(q.double(), keys, values) == "biases"
    assert way(q.mT.contiguous().mT, keys, values) == "biases"


def test_numbers_of_two_kinds():
    """As autocast makes them where a family normalises queries and keys."""
    q, keys, values = drawn(30, 30, 30)
    low = tuple(x.bfloat16() for x in values)
    with torch.autocast("cpu", torch.bfloat16):
        found = prefill_by_age(q, keys, low, None, recent=RECENT, scale=SCALE)
    assert_close(found.double(), expected(q, keys, low), tolerance=3e-2)
