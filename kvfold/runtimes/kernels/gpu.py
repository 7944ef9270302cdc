"""Whether Triton's kernels for packed numbers (triton_*.py) can be used where tensors are."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.codec import pack, unpack
from kvfold.runtimes.kernels.packed_tokens import PackedTokens
from kvfold.runtimes.kernels.recording import followed, recorded
from kvfold.runtimes.kernels.rotary import apply_rotary

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIALS = (NumberFormat(tiers=((24, 8), (40, 5), (33, 3))), NumberFormat(tiers=((65, 8),), scales="float8"))
QUERIES = (20, 1)
"""Per stored head: a larger tile, and a small one."""
LARGEST_GRID = 65_535
"""Along all dimensions of a grid but the first, where kernels have sequences times heads."""
TOLERANCE = 2e-2
"""Of products, relative to the largest."""


def works_for(x: Tensor) -> bool:
    """Whether the kernels can be used with numbers of this dtype where they are."""
    return x.device.type == "cuda" and x.dtype in DTYPES and works(x.device, x.dtype)


def unpacks(rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> bool:
    """Whether the kernels turn these rows into numbers."""
    if rows_BCSX.device.type != "cuda" or rows_BCSX.stride(-1) != 1 or recorded(rows_BCSX) or dtype not in DTYPES:
        return False
    if rows_BCSX.shape[0] * rows_BCSX.shape[1] > LARGEST_GRID:
        return False
    return format.codec.fused and format.block == 1 and works(rows_BCSX.device, dtype)


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel turns these numbers, and nobody wants gradients or a graph of it."""
    if followed(x, cos, sin):
        return False
    heads = x.shape[0] * x.shape[1] * x.shape[3]  # at most
    return x.stride(-1) == 1 and cos.device == sin.device == x.device and heads <= LARGEST_GRID * 16 and works_for(x)


@functools.cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled here, and give what torch's operations give; if not, one line in the log says so.

    KVFOLD_NATIVE=0 leaves them out.
    """
    if os.environ.get("KVFOLD_NATIVE") == "0":
        return False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            errors = [
                error
                for format, count in zip(TRIALS, QUERIES, strict=True)
                for error in _errors(format, count, device, dtype)
            ]
        detail = f"they are off by {max(errors, key=lambda error: (math.isnan(error), error)):.2g}"
    except Exception as problem:
        # no triton, no compiler for it, a device that it does not know: torch serves all of them
        errors, detail = [math.inf], f"{type(problem).__name__}: {problem}".splitlines()[0]
    if all(error < TOLERANCE for error in errors):  # what is no number is not
        return True
    logging.getLogger(__name__).warning(
        "packed caches on %s are read by torch's operations, not by kvfold's Triton kernels (%s)", device, detail
    )
    return False


def _errors(format: NumberFormat, queries: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Of all that kernels make on a small case, relative to the largest number; and how much more packing loses."""
    from kvfold.runtimes.kernels import gpu_decode
    from kvfold.runtimes.kernels import triton_codes as codes

    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
    x, q = torch.randn(2, 3, 300, format.width, **options), torch.randn(2, 3 * queries, 1, format.width, **options)
    packed, q = PackedTokens(pack(x, format).to(device), format, dtype), q.to(device, dtype)
    stored = unpack(packed.rows, format, torch.float32)
    found = gpu_decode.decode_part(q, packed, packed, scale=0.2)
    pairs = [
        *zip((found.averages, found.log_sums), _attended(q, stored, stored), strict=True),
        (codes.unpack(packed.rows, format, torch.empty_like(stored)), stored),
        _rotated(codes.rotate, device),
        *_turned(packed, stored, q),
    ]
    errors = [float((found - sought).abs().max() / sought.abs().max()) for found, sought in pairs]
    if format.scales == "exponent":
        some = x[:, :, :9].to(device)
        again = unpack(codes.pack(some, format), format, torch.float32)
        errors.append(float((again - some).square().sum() / (stored[:, :, :9] - some).square().sum()) - 1)
    return errors


def _attended(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Averages and log-sums, step by step."""
    heads = q.shape[1] // keys.shape[1]
    scores = q.float() @ keys.repeat_interleave(heads, dim=1).transpose(2, 3) * 0.2
    return scores.softmax(-1) @ values.repeat_interleave(heads, dim=1), scores.logsumexp(-1)


def _turned(packed: PackedTokens, stored: Tensor, q: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of queries that are turned instead of keys, which are heads of their first 16 numbers."""
    from kvfold.runtimes.kernels import gpu_decode

    tokens, speeds = torch.arange(stored.shape[2], device=q.device), (0.0, *(0.01 / 2**i for i in range(7)))
    angles = (tokens[:, None] * torch.tensor(speeds, device=q.device)).repeat(1, 2)[None]
    cos, sin, q = angles.cos(), angles.sin(), q[..., :16]
    weight = torch.eye(16, stored.shape[3], device=q.device, dtype=q.dtype).expand(stored.shape[1], -1, -1)
    way = gpu_decode.HeadMap.of(weight, None, 16, speeds).rebuild(cos, sin, evenly=True)
    found = gpu_decode.decode_part(q, packed, packed, scale=0.2, rebuild=way)
    keys = apply_rotary(stored[..., :16], cos, sin)
    return list(zip((found.averages, found.log_sums), _attended(q, keys, stored), strict=True))


def _rotated(rotate: Callable[..., Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of two heads of six numbers, of which four turn."""
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
    x, cos, sin = (torch.randn(shape, **options).to(device) for shape in ((2, 1, 5, 12), (1, 5, 4), (1, 5, 4)))
    heads = x.unflatten(3, (2, 6)).transpose(2, 3).flatten(1, 2)
    return rotate(x, cos, sin, 6), apply_rotary(heads, cos, sin)
