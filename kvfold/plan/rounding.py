"""Whole numbers out of products of shares, which are floating-point numbers."""

from __future__ import annotations

SLACK = 1 + 1e-9
"""Of a budget: what sums and products of shares and bytes are rounded by."""


def whole(number: float) -> int:
    """The whole number that fits: 600 into 599.9999999."""
    return int(number * SLACK)
