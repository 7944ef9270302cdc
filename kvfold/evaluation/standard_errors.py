"""Standard errors of means, and of the ratio of two scores that were measured on the same samples."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def stderr(values_N: Tensor) -> float:
    """Standard error of the mean; nan for fewer than two values."""
    return values_N.double().std().item() / math.sqrt(len(values_N)) if len(values_N) > 1 else math.nan


def ratio(top: float, bottom: float) -> float:
    """top / bottom; nan where the bottom is 0."""
    return top / bottom if bottom else math.nan


def ratio_stderr(top: float, bottom: float, *, top_stderr: float, bottom_stderr: float, change_stderr: float) -> float:
    """Standard error of top / bottom by the delta method, that is, to first order in the errors.

    `change_stderr`, that of top - bottom, says how far the two err together: Cov = (Var top + Var bottom - Var change) / 2.
    """
    if not bottom:
        return math.nan
    r = top / bottom
    together = (top_stderr**2 + bottom_stderr**2 - change_stderr**2) / 2
    variance = top_stderr**2 + (r * bottom_stderr) ** 2 - 2 * r * together
    return math.sqrt(max(variance, 0.0) if not math.isnan(variance) else math.nan) / abs(bottom)


def defined(tree: Any) -> Any:
    """The same dictionaries and lists for JSON, which has no number for nan and infinity: null instead."""
    if isinstance(tree, dict):
        return {name: defined(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [defined(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
