"""Padding that caches which count tokens take for tokens."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kvfold.runtimes.kernels.recording import recorded


def warn_of_holes(mask: Tensor | None, tokens: Tensor | None) -> None:
    """Warn where a mask [B, columns] hides some between others, in a forward of several tokens [B, T, ...]: columns are
    counted from where a sequence begins, so that those age recent tokens and take the places of tokens that would stay."""
    if mask is None or tokens is None or mask.dim() != 2 or tokens.shape[1] < 2 or recorded(mask):
        return
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():  # nobody can wait for an answer
        return
    seen = mask.int()
    begun, left = seen.cummax(1).values, seen.flip(1).cummax(1).values.flip(1)
    if bool((begun * left > seen).any()):
        warnings.warn(
            "padding between a sequence's tokens (a second turn of a batch, padded on the left) counts as tokens where a"
            " plan drops tokens or keeps recent ones in a finer form: shorter rows lose more than alone. Give every"
            " sequence a cache of its own, or pad in front only.",
            stacklevel=2,
        )
