"""What queries lose with each of the tokens, by the CPU's own kernel (cpp/effect.cpp): scores, weights and losses never leave
the cache, where torch's operations write and read all of them a dozen times."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.runtimes.kernels.cpu import DTYPES, StoredTokens
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.recording import recorded

PART = 32
"""Queries whose losses are added up together: their weights of all tokens lie in a core's cache."""


class Losses(NamedTuple):
    """effect_BnpS: summed over PART queries each; of every query the logarithm of what its scores' exponentials sum up to
    [B, n, Q], and the average of stored values [B, n, Q, V]."""

    effect_BnpS: Tensor
    log_sums_BnQ: Tensor
    averages_BnQV: Tensor


class _Asked(ctypes.Structure):
    """As effect.cpp declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "bias", "root")),
        *(
            (name, ctypes.c_int64)
            for name in ("bias_batch", "bias_head", "batch", "heads", "rows", "tokens", "part", "threads")
        ),
        ("softcap", ctypes.c_float),
    )


def serves(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel reads these, and nobody records what is done with the queries."""
    here = all(x.device.type == "cpu" for x in (queries, keys, values))
    plain = all(x.dtype in DTYPES and x.stride(-1) == 1 for x in (keys, values))
    return (
        here and plain and keys.dtype == values.dtype and not recorded(queries, keys, values) and library() is not None
    )


def losses(
    queries_BnQR: Tensor,
    keys_BCSR: Tensor,
    values_BCSV: Tensor,
    seen: Tensor | None,
    root_nVV: Tensor,
    *,
    softcap: float | None = None,
) -> Losses:
    """Of queries, which are scaled. seen: [B or 1, n or 1, S], numbers to add to scores. root: a stored value
    v weighs in the residual stream as much as root v."""
    kernel, (B, n, Q, _), (_, _, S, V) = library(), queries_BnQR.shape, values_BCSV.shape
    assert kernel is not None, "serves() was asked"
    queries, root = (x.to(torch.float32).contiguous() for x in (queries_BnQR, root_nVV))
    assert root.shape == (n, V, V) and n % keys_BCSR.shape[1] == 0, "every query head has a root and a stored head"
    bias = None if seen is None else seen.float().contiguous().expand(B, n, S)
    facts = _Asked(
        queries.data_ptr(), None if bias is None else bias.data_ptr(), root.data_ptr(),
        *((0, 0) if bias is None else bias.stride()[:2]), B, n, Q, S, PART, torch.get_num_threads(), softcap or 0.0,
    )  # fmt: skip
    shapes = (B, n, -(-Q // PART), S), (B, n, S), (B, n, Q), (B, n, Q, V)
    effect, lengths, log_sums, averages = (queries.new_empty(shape) for shape in shapes)
    found = (ctypes.c_void_p * 4)(*(x.data_ptr() for x in (effect, lengths, log_sums, averages)))
    described = [StoredTokens.of(x) for x in (keys_BCSR, values_BCSV)]
    kernel.kvfold_effects(ctypes.byref(facts), *(ctypes.byref(x) for x in described), ctypes.byref(found))
    return Losses(effect, log_sums, averages)
