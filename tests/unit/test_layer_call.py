"""Attention of a layer by one call of the CPU's kernel: heads that see different tokens, sinks, storage that moves; and new
tokens that are packed where they lie."""

import copy
import gc
import weakref

import pytest
import torch
from packed_forms import numbers

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.attention import grouped_attention
from kvfold.runtimes.kernels.cpu_layer import Form, LayerReader, Steps, asked_of
from kvfold.runtimes.kernels.dispatch import pack
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, newest, read, read_all
from kvfold.runtimes.transformers.packed_buffers import PackedBuffer
from kvfold.runtimes.transformers.recent_buffer import RecentBuffer
from kvfold.testing import assert_close

B, H, SIZES = 2, 32, {"heads": 6, "scale": 0.2, "softcap": None}
RUNS = ((0, 1, 4), 70), ((5,), 9), ((2, 3), 300)
FORMAT = NumberFormat(tiers=((16, 4), (16, 2)))


def stored(tokens, *, is_packed, seed=0):
    x = numbers(B, 1, tokens, H, seed=seed)
    return PackedTokens(pack(x, FORMAT), FORMAT, x.dtype) if is_packed else x


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-30.0, -1.0, 0.5, 4.0, 0.0, 2.0])])
def test_heads_that_keep_different_tokens(T, is_packed, mapped, sinks):
    """Each as products of matrices give it, all of them by one call; some tokens are masked."""
    q, steps = numbers(B, 6, T, H), Steps()
    weight = numbers(1, 3 * 16, H, seed=3) / H**0.5
    back = cpu_decode.ValueMap.of(weight, 16) if mapped else None
    wanted, forms, asked = torch.empty(B, T, 6, H), [], []
    for heads, tokens in RUNS:
        keys, values = (stored(tokens, is_packed=is_packed, seed=tokens + side) for side in (0, 1))
        mask = torch.ones(B, 1, T, tokens, dtype=torch.bool).tril(tokens - T)
        mask[0, ..., :4] = False
        own = q[:, list(heads)]
        forms.append(Form(keys, values, heads=heads))
        asked.append(asked_of(own, tokens, mask))
        some = None if sinks is None else sinks[list(heads)]
        wanted[:, :, list(heads)] = grouped_attention(
            own, read_all(keys), read_all(values), mask, scale=0.2, sinks=some
        )[0]
    if mapped:
        per_head = wanted.view(B, T, 3, 2, H)
        wanted = torch.einsum("btkgv,khv->btkgh", per_head, weight.view(3, 16, H)).flatten(2, 3)
    with torch.no_grad():
        found = steps.read(forms, asked, H, back, sinks=sinks, **SIZES)
    assert_close(found, wanted, tolerance=1e-5)


def test_described_anew_only_when_tokens_have_moved(monkeypatch):
    """The same memory with more tokens is known; other memory, another map and other heads are not."""
    made, real = [], LayerReader.__init__
    monkeypatch.setattr(
        LayerReader, "__init__", lambda self, *args, **rest: made.append(1) or real(self, *args, **rest)
    )
    steps, room, q = Steps(), numbers(B, 1, 64, H), numbers(B, 6, 1, H)

    def read(x, count, rows=slice(None)):
        shown = x[rows, :, :count]
        with torch.no_grad():
            found = steps.read([Form(shown, shown)], [asked_of(q[rows], count, None)], H, None, **SIZES)
        assert_close(found, grouped_attention(q[rows], shown, shown, None, scale=0.2)[0], tolerance=1e-5)

    for count in (10, 11, 12):
        read(room, count)
    assert len(made) == 1
    read(room.clone(), 12)
    assert len(made) == 2
    read(room, 12, rows=slice(1))
    assert len(made) == 3
    read(room[:, :, 1:], 12)
    assert len(made) == 4


def test_nothing_holds_tokens_that_were_read():
    """A cache's memory is its own, and a model that has read one can be copied."""
    steps, q = Steps(), numbers(B, 6, 1, H)
    x = stored(40, is_packed=True)
    gone = weakref.ref(x.rows)
    with torch.no_grad():
        steps.read([Form(x, x)], [asked_of(q, 40, None)], H, None, **SIZES)
    assert steps.described[1] is not None
    assert copy.deepcopy(steps).described[1] is None
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens(dtype):
    """Many queries per stored head, packed tokens: tiles, what is left of them, and room for no more than there are."""
    q = numbers(1, 36, 1, H).to(dtype)
    for count in range(1, 100):
        x = PackedTokens(pack(numbers(1, 2, count, H, seed=count).to(dtype), FORMAT), FORMAT, dtype)
        with torch.no_grad():
            found = Steps().read([Form(x, x)], [asked_of(q, count, None)], H, None, heads=36, scale=0.2, softcap=None)
        wanted = grouped_attention(q.double(), *(read_all(x).double(),) * 2, None, scale=0.2)[0]
        assert_close(found.double(), wanted, tolerance=1e-5 if dtype == torch.float32 else 2e-2)


def test_sinks_that_are_trained_are_left_to_others():
    """The kernel gives them no gradient."""
    x, sinks = numbers(B, 1, 40, H), torch.zeros(6, requires_grad=True)
    asked = [Form(x, x)], [asked_of(numbers(B, 6, 1, H), 40, None)], H, None
    assert Steps().read(*asked, sinks=sinks, **SIZES) is None
    assert Steps().read(*asked, sinks=sinks.detach(), **SIZES) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "T"), [(1, 3), (2, 1), (2, 3)])
def test_tokens_are_packed_where_they_lie(rows, T, dtype):
    """As `pack` packs them; those of a step are known as they are stored, once; growing moves them."""
    buffer, made = PackedBuffer(FORMAT, unit=8), []
    for step in range(9):
        made.append(numbers(rows, 2, T, H, seed=step).to(dtype))
        buffer.append(made[-1].transpose(2, 3).contiguous().transpose(2, 3) if step == 4 else made[-1], 0)
        shown, S = buffer.view(), (step + 1) * T
        assert torch.equal(newest(shown, T), read(shown, S - T, S))
    assert torch.equal(shown.rows, pack(torch.cat(made, dim=2), FORMAT))
    buffer.forget(T, None)
    assert torch.equal(newest(buffer.view(), T), read(shown, S - 2 * T, S - T))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_full_buffer_of_recent_tokens_stays_where_it_is(rows):
    """Its oldest token makes room, whatever came before: a prompt, a step of several, a crop."""
    x, buffer = numbers(rows, 1, 60, H), RecentBuffer(FORMAT, H, 16)
    buffer.append(x[:, :, :40])
    at = buffer.rows.data_ptr()
    for step in range(40, 50):
        shown = buffer.append(x[:, :, step : step + 1])
        assert torch.equal(shown.rows, pack(x[:, :, step - 15 : step + 1], FORMAT))
        assert torch.equal(newest(shown, 1), read(shown, 15, 16))
    assert buffer.rows.data_ptr() == at
    assert buffer.append(x[:, :, 50:53]).shape[2] == 19
    buffer.append(x[:, :, 53:54], keep_all=True)
    buffer.forget(1)
    shown = buffer.append(x[:, :, 53:54])
    assert torch.equal(shown.rows[:, :, -16:], pack(x[:, :, 38:54], FORMAT))
