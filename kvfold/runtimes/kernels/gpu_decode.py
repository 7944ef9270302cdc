"""Attention of few query tokens over packed numbers by the GPU's kernels: over stored keys, or over keys that turn so slowly
that queries are turned instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvfold.plan.number_format import ELSEWHERE, NumberFormat
from kvfold.runtimes.kernels import gpu
from kvfold.runtimes.kernels.cpu_decode import ANY_AGE
from kvfold.runtimes.kernels.cpu_maps import tolerance_of
from kvfold.runtimes.kernels.gpu import works_for
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, PagedTokens, SideBySide, Stored, parts_of
from kvfold.runtimes.kernels.recording import recorded
from kvfold.runtimes.kernels.turning import turns_slowly

if TYPE_CHECKING:
    from kvfold.runtimes.kernels.triton_attention import Span

LARGEST_AGE = 2**31 - 1
DTYPES = gpu.DTYPES


class HeadMap(NamedTuple):
    """How keys of the source's heads are made: a linear map [K, H, R] and an offset in float32, or none. speeds: in radians
    per token, of each pair of a head; nothing where queries cannot be turned instead. tolerance: as `tolerance_of` has it."""

    weights_KHR: Tensor
    offset_KH: Tensor | None
    speeds: tuple[float, ...]
    tolerance: float

    @classmethod
    def of(
        cls,
        weight_CFR: Tensor,
        bias_CF: Tensor | None,
        head_dim: int,
        speeds: tuple[float, ...] = (),
        *,
        format: NumberFormat | None = None,
        tokens: int | None = None,
    ) -> HeadMap:
        """As the CPU's; however few tokens there are, queries are turned for whole blocks of the kernel."""
        weights = weight_CFR.detach().reshape(-1, head_dim, weight_CFR.shape[2])
        offset = None if bias_CF is None else bias_CF.detach().float().reshape(-1, head_dim).contiguous()
        return cls(weights, offset, speeds, tolerance_of(weight_CFR.dtype, format))

    def rebuild(self, cos: Tensor | None = None, sin: Tensor | None = None, *, evenly: bool = False) -> Rebuild | None:
        """With tables [B or 1, S, r] of the tokens; None where keys would have to be rebuilt."""
        if cos is None or sin is None or not evenly or not turns_slowly(self.speeds):
            return None
        return Rebuild(self, cos, sin)


class Rebuild(NamedTuple):
    """A map and the tables of the tokens that it is for."""

    map: HeadMap
    cos: Tensor
    sin: Tensor

    def of_tokens(self, start: int, end: int) -> Rebuild:
        """Of some of the tokens."""
        return self._replace(cos=self.cos[:, start:end], sin=self.sin[:, start:end])

    def of_sequences(self, rows: slice) -> Rebuild:
        """Of some of the sequences."""
        return self if len(self.cos) == 1 else self._replace(cos=self.cos[rows], sin=self.sin[rows])


class Part(NamedTuple):
    """As `cpu_decode.Averages`, in splits [splits, B, N, T, V] that are still to be added."""

    sums: Tensor
    log_sums: Tensor
    last: bool = False

    @property
    def averages(self) -> Tensor:
        """[B, N, T, V]."""
        return self.sums.sum(0)

    @classmethod
    def of_all(cls, parts: Sequence[Part]) -> Part:
        """Of several batches as one."""
        return cls(torch.cat([x.averages for x in parts])[None], torch.cat([x.log_sums for x in parts]))


def serves(q_BNTR: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether the kernels take these tensors, and nobody wants gradients or a graph of it."""
    parts = [*parts_of(keys), *parts_of(values)]
    if (
        not q_BNTR.is_cuda
        or q_BNTR[:1, ..., 0].numel() * keys.shape[2] > ELSEWHERE
        or _fills_grid(q_BNTR, keys, values)
    ):
        return False  # a number per query and token of a sequence exists
    if not all(_is_known(part, q_BNTR) for part in parts) or (torch.is_grad_enabled() and q_BNTR.requires_grad):
        return False
    return not recorded(q_BNTR, *(part.rows for part in parts)) and works_for(q_BNTR)


def _fills_grid(q: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether there are more stored heads of sequences than a grid has places."""
    return len(q) * max(keys.shape[1], values.shape[1]) > gpu.LARGEST_GRID


def _is_known(x: Any, q: Tensor) -> bool:
    packed = isinstance(x, PackedTokens | PagedTokens) and x.format is not None
    known = packed and x.format.codec.fused and x.format.block == 1 and getattr(x, "recent", None) is None
    return known and x.rows.stride(-1) == 1 and x.rows.device == q.device and x.dtype == q.dtype


def decode_part(
    q_BNTR: Tensor,
    keys: Any,
    values: Any,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sequences_B3: Tensor | None = None,
    position: int | None = None,
    ages: tuple[int, int] = ANY_AGE,
    rebuild: Rebuild | None = None,
) -> Part:
    """As `cpu_decode.decode_part`; keys are never rebuilt. sequences_B3: on the CPU, which says how large grids are."""
    from kvfold.runtimes.kernels import triton_attention as kernels
    from kvfold.runtimes.kernels.triton_turning import functions_of, turned_exponentials

    tokens = keys.shape[2] if sequences_B3 is None else int((sequences_B3[:, 1] - sequences_B3[:, 0]).max())
    if len(q_BNTR) > 1 and (q_BNTR[..., 0].numel() * tokens > ELSEWHERE or _fills_grid(q_BNTR, keys, values)):
        halves = [slice(len(q_BNTR) // 2), slice(len(q_BNTR) // 2, None)]
        options = {"scale": scale, "softcap": softcap, "position": position, "ages": ages}
        return Part.of_all(
            [_of_some(rows, q_BNTR, keys, values, bias, sequences_B3, rebuild, options) for rows in halves]
        )
    parts, N, T = parts_of(keys), q_BNTR.shape[1], q_BNTR.shape[2]
    youngest, oldest = (max(-LARGEST_AGE, min(age, LARGEST_AGE)) for age in ages)
    sizes: dict[str, Any] = {"scale": scale, "softcap": softcap, "ages": (youngest, oldest), "dtype": q_BNTR.dtype}
    turning = None
    if rebuild is not None:
        turning = functions_of(rebuild.map.speeds, rebuild.map.tolerance, q_BNTR.device)
    aligned = kernels.TOKENS if turning is None else turning.basis.shape[1]
    span = _span(keys.shape[2], T, position, sequences_B3, aligned, q_BNTR.device)
    marks = kernels.marks_of(len(q_BNTR), N, T, span, q_BNTR)
    if rebuild is None or turning is None:
        kernels.add_exponentials(marks, kernels.arranged(q_BNTR, parts), parts, span, bias, **sizes)
    else:
        map, tables = rebuild.map, (rebuild.cos, rebuild.sin)
        turned_exponentials(marks, q_BNTR, map.weights_KHR, map.offset_KH, turning, tables, parts, span, bias, **sizes)
    kernels.share_out(marks)
    return Part(kernels.averages(marks, parts_of(values), span, q_BNTR.dtype), marks.log_sums)


def _of_some(
    rows: slice,
    q_BNTR: Tensor,
    keys: Any,
    values: Any,
    bias: Tensor | None,
    sequences_B3: Tensor | None,
    rebuild: Rebuild | None,
    options: dict[str, Any],
) -> Part:
    """Of some sequences of a batch: what exists of every token would be too much for all."""
    some_keys = _sequences(keys, rows)
    return decode_part(
        q_BNTR[rows], some_keys, some_keys if values is keys else _sequences(values, rows),
        bias if bias is None or bias.dim() < 4 or len(bias) == 1 else bias[rows],
        sequences_B3=None if sequences_B3 is None else sequences_B3[rows],
        rebuild=rebuild and rebuild.of_sequences(rows), **options,
    )  # fmt: skip


def _sequences(stored: Any, rows: slice) -> Any:
    if isinstance(stored, SideBySide):
        return SideBySide([_sequences(part, rows) for part in stored.parts])
    if isinstance(stored, PagedTokens):
        return stored.of(stored.tables_Bp[rows])
    return PackedTokens(stored.rows[rows], stored.format, stored.dtype, width=stored.width)


def _span(
    S: int, T: int, position: int | None, sequences_B3: Tensor | None, aligned: int, device: torch.device
) -> Span:
    from kvfold.runtimes.kernels.triton_attention import TOKENS, Span

    if sequences_B3 is None:
        return Span(S, S - T if position is None else position, -(-S // TOKENS), aligned)
    longest = int((sequences_B3[:, 1] - sequences_B3[:, 0] // aligned * aligned).max())
    on_device = sequences_B3.to(torch.int32).to(device, non_blocking=True)
    return Span(S, 0, max(-(-longest // TOKENS), 1), aligned, on_device)


def values_of(parts: Sequence[Part], width: int, dtype: torch.dtype, map: None = None) -> Tensor:
    """As `cpu_decode.values_of`, which alone has maps: [B, T, N, width]."""
    from kvfold.runtimes.kernels.triton_attention import join

    assert map is None, "nobody asks a GPU's kernels for it"
    return join([(x.sums, x.log_sums, width - x.sums.shape[4] if x.last else 0) for x in parts], width, dtype)
