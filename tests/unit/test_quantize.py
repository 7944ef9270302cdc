"""Packed numbers: against the oracle that reads them bit by bit, and how much they lose."""

import pytest
import torch

from kvfold.plan.codecs._codes import BITS
from kvfold.plan.codecs._lloyd_max import lloyd_max
from kvfold.plan.codecs.base import NOISE, SIZES
from kvfold.plan.codecs.exponent import STEPS_PER_OCTAVE
from kvfold.plan.codecs.normal import Normal
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.codec import pack, roundtrip, unpack
from kvfold.runtimes.reference import decoded

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
    NumberFormat(tiers=((24, 4),), scales="normal", norm_correction=True),
    NumberFormat(tiers=((12, 3),), scales="normal"),
    NumberFormat(tiers=((8, 6), (16, 2), (11, 1)), scales="normal", norm_correction=True),
]


def elements(format, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(2, 3, 16, format.width) * torch.rand(2, 3, 16, 1) * 5).to(dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_numbers_are_what_the_oracle_reads(format):
    x = elements(format)
    rows = pack(x, format)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 16 // format.block, format.block_bytes)
    expected = torch.stack([torch.stack([decoded(head, format) for head in row]) for row in rows])
    torch.testing.assert_close(unpack(rows, format, torch.float64), expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(roundtrip(x, format), unpack(rows, format, torch.float64))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_number_beyond_half_precision_spoils_nothing(format):
    """In which scales are stored."""
    x = elements(format, torch.float32)
    x[0, 0, 3, 5], x[0, 1, 4, 2] = 2e5, -3e9
    assert unpack(pack(x, format), format, torch.float32).isfinite().all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_packed_alike(format, dtype):
    x = elements(format, dtype)
    assert torch.equal(pack(x, format), pack(x.float(), format))
    assert unpack(pack(x, format), format, dtype).dtype == dtype


@pytest.mark.parametrize("format", [format for format in FORMATS if format.block == 1], ids=str)
def test_any_token_is_read_alone(format):
    """At whatever address its row begins."""
    rows = pack(elements(format)[:1, :1], format)
    alone = [unpack(rows[:, :, t : t + 1], format, torch.float32) for t in range(16)]
    torch.testing.assert_close(torch.cat(alone, 2), unpack(rows, format, torch.float32))


KNOWN_ERRORS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
"""Of the best levels for normal numbers (Max 1960, table I)."""


def test_levels_for_normal_numbers_are_the_published_ones():
    assert lloyd_max(1) == pytest.approx((-0.7979, 0.7979), abs=1e-4)
    assert lloyd_max(2) == pytest.approx((-1.5104, -0.4528, 0.4528, 1.5104), abs=1e-4)
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits, error in KNOWN_ERRORS.items():
        levels = torch.tensor(lloyd_max(bits), dtype=torch.float64)
        nearest = (x[:, None] - levels).abs().min(1).values
        assert float(nearest.square().mean()) == pytest.approx(error, rel=0.01)


def test_a_normal_row_is_a_scale_and_codes():
    assert {bits: NumberFormat(tiers=((64, bits),), scales="normal").row_bytes for bits in Normal.bits} == {
        bits: 2 + 8 * bits for bits in Normal.bits
    }


@pytest.mark.parametrize("norm_correction", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_numbers_are_the_nearest_levels(bits, norm_correction):
    """One token after the other: brought to a mean square of 1, rounded, and brought back to what it was or to its norm."""
    format = NumberFormat(tiers=((24, bits),), scales="normal", norm_correction=norm_correction)
    x, levels = elements(format), torch.tensor(lloyd_max(bits), dtype=torch.float64)
    for token, seen in zip(x.flatten(0, 2), roundtrip(x, format).flatten(0, 2), strict=True):
        size = token.square().mean().sqrt()
        rounded = levels[(token[:, None] / size - levels).abs().argmin(1)]
        if norm_correction:
            size = token.norm() / rounded.norm()
        torch.testing.assert_close(seen, rounded * size, rtol=1e-3, atol=0)  # a scale is float16


def test_norm_correction_keeps_the_norm():
    x = elements(NumberFormat(tiers=((24, 3),)))
    kept, shorter = (
        roundtrip(x, NumberFormat(tiers=((24, 3),), scales="normal", norm_correction=correct)).norm(dim=-1)
        for correct in (True, False)
    )
    torch.testing.assert_close(kept, x.norm(dim=-1), rtol=1e-3, atol=0)
    assert (shorter / x.norm(dim=-1)).mean() < 0.99


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_nearly_the_best_of_all(bits):
    x = elements(NumberFormat(tiers=((24, bits),)))
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
    x = elements(NumberFormat(tiers=((24, 8),)))
    lost = [(roundtrip(x, NumberFormat(tiers=((24, bits),))) - x).square().mean() for bits in BITS]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-4 * x.square().mean()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_and_outliers_stay_finite(format):
    x = torch.zeros(1, 1, 8, format.width)
    x[0, 0, 1] = 1e4
    x[0, 0, 2, 0] = 3e4
    assert roundtrip(x, format).isfinite().all()
    if format.block == 1:
        assert roundtrip(x, format)[0, 0, 0].abs().max() < 1e-3


def test_gradients_pass_straight_through():
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    roundtrip(x, NumberFormat(tiers=((8, 3),))).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
