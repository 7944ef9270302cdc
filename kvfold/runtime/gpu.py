"""Decode attention over packed numbers on a GPU: by Triton's kernels (triton_kernels.py) where they agree with torch."""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from kvfold.number_format import NumberFormat
from kvfold.quantize import pack, unpack
from kvfold.runtime.packed import PackedTokens, Stored

SCALES = ("exponent", "float8")
"""Of packed numbers that the kernels read."""
TRIED = NumberFormat(tiers=((24, 8), (40, 5), (33, 3)))
TOLERANCE = 2e-2
"""Of products in bfloat16, relative to the largest."""


def serves(q: Tensor, z: Stored, y: Stored) -> bool:
    """Whether the kernels take these tensors, and nobody wants gradients or a graph of it."""
    if q.device.type != "cuda" or torch.compiler.is_compiling() or (torch.is_grad_enabled() and q.requires_grad):
        return False
    known = (isinstance(x, PackedTokens) and x.form.scales in SCALES and x.rows.stride(-1) == 1 for x in (z, y))
    return all(known) and works(q.device)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels can be compiled here, and give what torch's operations give; if not, one line in the log says so.

    KVFOLD_NATIVE=0 leaves them out.
    """
    if os.environ.get("KVFOLD_NATIVE") == "0":
        return False
    try:
        error = _error(device)
    except (
        Exception
    ) as problem:  # no triton, no compiler for it, a device that it does not know: torch serves all of them
        error, detail = None, f"{type(problem).__name__}: {problem}".splitlines()[0]
    else:
        detail = f"they are off by {error:.2g}"
    if error is None or not error < TOLERANCE:
        logging.getLogger(__name__).warning(
            "packed caches on %s are read by torch's operations, not by kvfold's Triton kernels (%s)", device, detail
        )
        return False
    return True


def _error(device: torch.device) -> float:
    """Of both products on a small case, relative to the largest number; and how much more packing loses."""
    from kvfold.runtime import triton_kernels as kernels

    generator = torch.Generator().manual_seed(0)
    x, q = (
        torch.randn(2, 3, 1100, TRIED.width, generator=generator),
        torch.randn(2, 6, 1, TRIED.width, generator=generator),
    )
    packed = PackedTokens(pack(x, TRIED).to(device), TRIED, torch.bfloat16)
    stored = unpack(packed.rows, TRIED, torch.float32)
    some = x[:, :, :9].to(device)
    again = unpack(kernels.pack(some, TRIED), TRIED, torch.float32)
    numbers = stored.repeat_interleave(2, dim=1)
    q = q.to(device, torch.bfloat16)
    wanted = q.float() @ numbers.transpose(2, 3)
    scores = kernels.scores(q, packed)
    weights = wanted.softmax(-1)
    averaged = kernels.weighted(weights, packed, q.dtype)
    pairs = ((scores, wanted), (averaged, weights @ numbers))
    off = max(float((found - sought).abs().max() / sought.abs().max()) for found, sought in pairs)
    return max(off, float((again - some).square().sum() / (stored[:, :, :9] - some).square().sum()) - 1)
