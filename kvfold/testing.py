"""The one numeric assertion of the project, for its tests and for people who write methods."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest relative RMS error that counts as equal, by the coarser dtype of the two tensors."""


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64. Raises AssertionError on shapes that differ and on NaN."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert not actual.isnan().any(), "the result holds NaN"
    assert not expected.isnan().any(), "the expected tensor holds NaN"
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)).item()


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float | None = None, name: str = "tensor") -> None:
    """Raise AssertionError, with the number, unless the relative RMS error is within the dtype's tolerance."""
    if tolerance is None:
        tolerance = max(TOLERANCE[actual.dtype], TOLERANCE[expected.dtype])
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS error {error:.3e} is above {tolerance:.1e}"
