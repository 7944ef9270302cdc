"""Which kernel reads a cache in which situation, and which one packs it.

Decoding is bound by the bytes of the cache, so queries are absorbed and stored numbers are read as they lie. A prompt is
bound by arithmetic: unless the stored heads suit the fused kernel, they are rebuilt for that one call.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.plan.token_runs import FEW_TOKENS
from kvfold.runtimes.kernels import codec, cpu, cpu_decode, cpu_store, gpu, gpu_decode
from kvfold.runtimes.kernels.attention import (
    grouped_attention,
    kernel_attention,
    one_query_attention,
    products_attention,
)
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, SideBySide, Stored, read_all
from kvfold.runtimes.kernels.recording import recorded
from kvfold.runtimes.kernels.rotary import apply_rotary, rotate_fast


class Way(Enum):
    """How to attend. The first five meet stored numbers with absorbed queries, at few tokens."""

    CPU = "cpp/decode.cpp, packed numbers too"
    TRITON = "triton_attention.py, over packed numbers"
    ONE_QUERY = "torch's fused kernel, the queries of a stored head as its rows"
    PRODUCTS = "two matrix products per stored head, without copies"
    GROUPED = "two matrix products"
    PIECES = "a piece of the cache at a time as numbers, with a running maximum and sum"
    EAGER = "two matrix products, with probabilities, dropout and capped scores"
    STORED = "torch's fused kernel over stored heads"
    REBUILT = "torch's fused kernel over heads that are rebuilt for this call"


def choose(
    q_BNTH: Tensor,
    z: Stored,
    y: Stored,
    *,
    on_read: bool = False,
    rebuilds: bool = False,
    eager: bool = False,
    exact: bool = False,
    softcap: float | None = None,
    head_dim: int = 0,
) -> Way:
    """The way of one call.

    `on_read`: the source's keys are rebuilt from z, which the device's kernel does itself or without where it `rebuilds`.
    `eager`: probabilities are wanted, the config asks for it, or scores are capped. `exact`: probabilities are wanted or
    dropped out. `head_dim`: the source's.
    """
    T, S = q_BNTH.shape[2], z.shape[2]
    few, several = T <= FEW_TOKENS and not exact, isinstance(z, SideBySide)
    met = few and (rebuilds or not on_read)
    by_cpu = met and cpu_decode.serves(q_BNTH, z, y)
    packed = isinstance(z, PackedTokens) or isinstance(y, PackedTokens) or (several and not eager)
    if packed and not exact and (few or T < S):  # decoding, or a prompt that continues a cache
        if by_cpu:
            return Way.CPU
        if met and gpu_decode.serves(q_BNTH, z, y):
            return Way.TRITON
        return Way.PIECES
    if eager:
        return Way.EAGER
    if few and (on_read or several):
        return Way.CPU if by_cpu else Way.PIECES
    if few:
        return _over_numbers(q_BNTH, z, y)
    if several:
        return Way.REBUILT
    alike = z.shape[1::2] == y.shape[1::2] and z.shape[3] <= head_dim
    return Way.STORED if alike and not on_read else Way.REBUILT


def _over_numbers(q: Tensor, z: Stored, y: Stored) -> Way:
    """At few tokens, where nothing is packed."""
    if cpu_decode.serves(q, z, y):
        return Way.CPU
    if q.shape[2] > 1:
        return Way.GROUPED
    if z.shape[1::2] == y.shape[1::2]:
        return Way.ONE_QUERY
    # on the CPU a batched half-precision product over a view of a larger buffer copies the buffer first
    copies = q.device.type == "cpu" and q.dtype != torch.float32 and not torch.is_grad_enabled()
    return Way.PRODUCTS if copies else Way.GROUPED


def decode_attention(
    q_BNTR: Tensor,
    z_BCSR: Stored,
    y_BUSV: Stored,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    way: Way | None = None,
) -> Tensor:
    """Few absorbed query tokens over stored numbers, by one of the first five ways: [B, T, N, V]."""
    way = way or _over_numbers(q_BNTR, z_BCSR, y_BUSV)
    if way in (Way.CPU, Way.TRITON):
        return kernel_attention(q_BNTR, z_BCSR, y_BUSV, mask, scale=scale, softcap=softcap, sinks=sinks)
    z, y = read_all(z_BCSR), read_all(y_BUSV)
    if way is Way.ONE_QUERY and sinks is None:
        return one_query_attention(q_BNTR, z, y, mask, scale=scale)
    if way is Way.PRODUCTS and sinks is None:
        return products_attention(q_BNTR, z, y, mask, scale=scale)
    return grouped_attention(q_BNTR, z, y, mask, scale=scale, sinks=sinks)[0]


def pack(x_BCTR: Tensor, format: NumberFormat) -> Tensor:
    """As `codec.pack`, by the device's kernel where there is one: torch's operations take dozens of calls per tier.

    Equal but for scales whose errors differ by a rounding.
    """
    x = x_BCTR.detach()
    if format.codec.packs_fused and x.numel() and not recorded(x):
        if cpu.packs(x):
            return cpu.pack(x, format)
        if gpu.works_for(x):
            from kvfold.runtimes.kernels import triton_codes

            return triton_codes.pack(x, format)
    return codec.pack(x, format)


def stores_in_place(new_BCTR: Tensor, format: NumberFormat) -> bool:
    """Whether a kernel packs these tokens where they are to lie: of one sequence, or one of each."""
    alone = 1 in (new_BCTR.shape[0], new_BCTR.shape[2]) and new_BCTR.shape[2] > 0
    return alone and cpu_store.packs_into(new_BCTR, format)


def store_in_place(rows_BCSX: Tensor, start: int, new_BCTR: Tensor, format: NumberFormat) -> Tensor:
    """Pack T tokens into rows from `start` on; the numbers that these then mean, [B, C, T, R]."""
    B, _, T, _ = new_BCTR.shape
    room = rows_BCSX.shape[2]
    slots = torch.arange(start, start + T) if B == 1 else torch.arange(start, B * room, room)
    x_CTR = new_BCTR.detach()[0] if B == 1 else new_BCTR.detach()[:, :, 0].transpose(0, 1)
    (stored_CTR,) = cpu_store.LayerWriter([cpu_store.Storage(rows_BCSX, format, read=True)])([x_CTR], [slots])
    assert stored_CTR is not None, "it was to be read"
    return stored_CTR[None] if B == 1 else stored_CTR.transpose(0, 1)[:, :, None]


def unpack(
    rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype, out: Tensor | None = None, width: int | None = None
) -> Tensor:
    """As `codec.unpack`, by the device's kernel where there is one; into `out` where that is given. width: the first so many
    numbers."""
    by_cpu = cpu.unpacks(rows_BCSX, format, dtype)
    if not by_cpu and not gpu.unpacks(rows_BCSX, format, dtype):
        numbers = codec.unpack(rows_BCSX, format, dtype)[..., :width]
        return numbers if out is None else out.copy_(numbers)
    if out is None:
        out = torch.empty(*rows_BCSX.shape[:3], width or format.width, dtype=dtype, device=rows_BCSX.device)
    if by_cpu:
        return cpu.unpack(rows_BCSX, format, out)
    from kvfold.runtimes.kernels import triton_codes

    return triton_codes.unpack(rows_BCSX, format, out)


def rotated_heads(x_BCSF: Tensor, head_dim: int, cos_BSr: Tensor, sin_BSr: Tensor, pairs: int | None = None) -> Tensor:
    """The heads [B, K, S, H] that groups of heads side by side consist of, rotated by tables [B or 1, S, r]. pairs: so many
    turn, the first ones; all if None."""
    if cpu.rotates(x_BCSF, cos_BSr, sin_BSr):
        return cpu.rotate(x_BCSF, cos_BSr, sin_BSr, head_dim, pairs)
    if pairs is None and gpu.rotates(x_BCSF, cos_BSr, sin_BSr):
        from kvfold.runtimes.kernels import triton_codes

        return triton_codes.rotate(x_BCSF, cos_BSr, sin_BSr, head_dim)
    heads = x_BCSF.unflatten(3, (-1, head_dim)).transpose(2, 3).flatten(1, 2)
    return apply_rotary(heads, cos_BSr, sin_BSr) if pairs is None else rotate_fast(heads, cos_BSr, sin_BSr, pairs)


def roundtrip(x_BCTR: Tensor, format: NumberFormat | None) -> Tensor:
    """As `codec.roundtrip`, by the same kernels as a cache."""
    return codec.roundtrip(x_BCTR, format, pack, unpack)
