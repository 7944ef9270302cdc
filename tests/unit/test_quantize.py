"""Packed numbers: against the oracle that reads them bit by bit, and how much they lose."""

import pytest
import torch

from kvfold.bits.base import NOISE, SIZES
from kvfold.number_format import BITS, NumberFormat
from kvfold.quantize import STEPS_PER_OCTAVE, pack, roundtrip, unpack
from kvfold.reference import decoded

FORMATS = [
    *(NumberFormat(tiers=((24, bits),)) for bits in BITS),
    NumberFormat(tiers=((8, 7), (16, 3), (11, 1))),
    NumberFormat(tiers=((12, 3),)),
    NumberFormat(tiers=((16, 4),), scales="affine"),
    NumberFormat(tiers=((12, 3),), scales="affine"),
    NumberFormat(tiers=((24, 3), (8, 2)), scales="affine", group_size=4),
    NumberFormat(tiers=((12, 2),), scales="channel", block=4),
    NumberFormat(tiers=((12, 5),), scales="channel", block=8),
    NumberFormat(tiers=((10, 8),), scales="float8"),
]


def numbers(form, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(2, 3, 16, form.width) * torch.rand(2, 3, 16, 1) * 5).to(dtype)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_numbers_are_what_the_oracle_reads(form):
    x = numbers(form)
    rows = pack(x, form)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 16 // form.block, form.block_bytes)
    expected = torch.stack([torch.stack([decoded(head, form) for head in row]) for row in rows])
    torch.testing.assert_close(unpack(rows, form, torch.float64), expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(roundtrip(x, form), unpack(rows, form, torch.float64))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_packed_alike(form, dtype):
    x = numbers(form, dtype)
    assert torch.equal(pack(x, form), pack(x.float(), form))
    assert unpack(pack(x, form), form, dtype).dtype == dtype


@pytest.mark.parametrize("form", [form for form in FORMATS if form.block == 1], ids=str)
def test_any_token_is_read_alone(form):
    """At whatever address its row begins."""
    rows = pack(numbers(form)[:1, :1], form)
    alone = [unpack(rows[:, :, t : t + 1], form, torch.float32) for t in range(16)]
    torch.testing.assert_close(torch.cat(alone, 2), unpack(rows, form, torch.float32))


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_nearly_the_best_of_all(bits):
    x = numbers(NumberFormat(tiers=((24, bits),)))
    lost = (roundtrip(x, NumberFormat(tiers=((24, bits),))) - x).square().sum(-1)
    half, best = 2 ** (bits - 1), torch.full_like(lost, torch.inf)
    for exponent in range(-128, 128):
        scale = 2 ** (exponent / STEPS_PER_OCTAVE)
        seen = ((x / scale).floor().clamp(-half, half - 1) + 0.5) * scale
        best = torch.minimum(best, (seen - x).square().sum(-1))
    assert lost.mean() <= 1.06 * best.mean()


def test_the_expected_noise_is_that_of_normal_numbers():
    torch.manual_seed(0)
    for position, size in enumerate(SIZES):
        x = torch.randn(1, 1, 4_000_000 // size // 16, size)
        for bits, shares in NOISE.items():
            lost = (roundtrip(x, NumberFormat(tiers=((size, bits),))) - x).square().mean() / x.square().mean()
            assert float(lost) == pytest.approx(shares[position], rel=0.05), (bits, size)


def test_more_bits_lose_less():
    x = numbers(NumberFormat(tiers=((24, 8),)))
    lost = [(roundtrip(x, NumberFormat(tiers=((24, bits),))) - x).square().mean() for bits in BITS]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-4 * x.square().mean()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_and_outliers_stay_finite(form):
    x = torch.zeros(1, 1, 8, form.width)
    x[0, 0, 1] = 1e4
    x[0, 0, 2, 0] = 3e4
    assert roundtrip(x, form).isfinite().all()
    if form.block == 1:
        assert roundtrip(x, form)[0, 0, 0].abs().max() < 1e-3


def test_gradients_pass_straight_through():
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    roundtrip(x, NumberFormat(tiers=((8, 3),))).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
