"""The CPU's own kernels (cpp/*.cpp): compiled when first needed, kept, called through ctypes.

Why: torch's fused kernel reads the cache of a step at a tenth (one query per head) to a quarter of the speed of a copy, this
one at about 0.8 (results/speed-llama2-7b.md). Where there is no compiler, torch's operations serve as before.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.codecs.exponent import TRIED
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, SideBySide, Stored, recorded

SOURCES = Path(__file__).with_name("cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
DTYPES = (torch.bfloat16, torch.float32)
TASKS_PER_THREAD = 4
"""A long cache of few heads is split until there are so many."""
SECONDS = 120
"""After which a compiler is given up."""


class _Stored(ctypes.Structure):
    """Keys or values, as decode.cpp declares them."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "width", "batch_stride", "head_stride", "token_stride")),
        *((name, ctypes.c_int64) for name in ("packed", "num_tiers")),
        ("tiers", ctypes.POINTER(ctypes.c_int32)),
    )

    def __init__(self, x_BCSR: Stored) -> None:
        rows, packed = _rows(x_BCSR), isinstance(x_BCSR, PackedTokens)
        tiers = x_BCSR.format.tiers if isinstance(x_BCSR, PackedTokens) and x_BCSR.format.scales == "exponent" else ()
        shape, strides = x_BCSR.shape, rows.stride()
        super().__init__(rows.data_ptr(), shape[1], shape[3], *strides[:3], packed, len(tiers), _flat(tiers))


class _Rotation(ctypes.Structure):
    """Sizes and strides, as rotate.cpp declares them."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("x_batch", "x_group", "x_token", "table_batch")),
        *((name, ctypes.c_int32) for name in ("batch", "groups", "heads", "tokens", "width", "rotated")),
    )


class _Pages(ctypes.Structure):
    """A region of all pages, as paging.cpp declares it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("page_stride", "heads", "tokens", "row_bytes")),
    )

    def __init__(self, rows_PCtX: Tensor) -> None:
        super().__init__(rows_PCtX.data_ptr(), rows_PCtX.stride(0), *rows_PCtX.shape[1:])


def _flat(tiers: Sequence[tuple[int, int]]) -> Any:
    return (ctypes.c_int32 * (2 * len(tiers)))(*itertools.chain(*tiers))


def _rows(x: Stored) -> Tensor:
    """What lies in memory."""
    assert not isinstance(x, SideBySide), "serves() was asked"
    return x.rows if isinstance(x, PackedTokens) else x


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one line in the log, where it cannot be made. KVFOLD_NATIVE=0 leaves it out."""
    if os.environ.get("KVFOLD_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning(
            "decoding on this CPU goes without kvfold's own kernel, several times slower: it could not be compiled (%s)."
            " It needs a C++ compiler (g++ 12 or clang; CXX names another one) and a folder for the result (XDG_CACHE_HOME).",
            (str(detail).strip().splitlines() or ["?"])[-1],
        )
        return None


def _compiled() -> Path:
    """The library's file. Raises OSError or SubprocessError."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    found = shutil.which(compiler[0])
    if found is None:
        raise OSError(f"there is no {compiler[0]}")
    sources = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]*"))]
    facts = (sources, FLAGS, found, compiler, platform.machine(), _processor())
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    file = _folder() / f"decode-{key}.so"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:  # another process may be compiling it, too
            made = Path(scratch) / file.name
            command = [*compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            os.replace(made, file)
    return file


def _folder() -> Path:
    """Where what was compiled is kept: the user's cache, or a folder of this process where there is none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfold"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return Path(tempfile.mkdtemp(prefix="kvfold-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="kvfold-"))


def _processor() -> str:
    """What the compiler makes code for: homes are shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def serves(q: Tensor, z: Stored, y: Stored) -> bool:
    """Whether the kernel takes these tensors, and nobody wants gradients or a graph of it."""
    if isinstance(z, SideBySide) or isinstance(y, SideBySide):
        return False
    tensors = (q, _rows(z), _rows(y))
    if recorded(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    plain = all(x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
    known = all(x.dtype == q.dtype and (isinstance(x, Tensor) or x.format.codec.fused) for x in (z, y))
    return plain and known and q.dtype in DTYPES and library() is not None


def packs(x: Tensor) -> bool:
    """Whether the kernel packs these numbers."""
    return x.device.type == "cpu" and x.dtype in (*DTYPES, torch.float16) and library() is not None


def pack(x: Tensor, format: NumberFormat) -> Tensor:
    """Numbers [B, C, T, R] -> rows of an `exponent` format [B, C, T, row_bytes]."""
    kernel = library()
    assert kernel is not None, "packs() was asked"
    elements = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
    rows = torch.empty(*x.shape[:3], format.row_bytes, dtype=torch.uint8, device=x.device)
    tried = (ctypes.c_int32 * len(format.tiers))(*(TRIED[bits] for _, bits in format.tiers))
    kernel.kvfold_pack(
        ctypes.c_void_p(elements.data_ptr()),
        ctypes.c_int64(elements.numel() // format.width),
        ctypes.c_int(format.width),
        ctypes.c_int(len(format.tiers)),
        _flat(format.tiers),
        tried,
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int(format.row_bytes),
        ctypes.c_int(torch.get_num_threads()),
    )
    return rows


def unpacks(rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> bool:
    """Whether the kernel turns these rows into numbers."""
    plain = rows_BCSX.device.type == "cpu" and rows_BCSX.stride(-1) == 1 and not recorded(rows_BCSX)
    return plain and format.codec.fused and format.block == 1 and dtype in DTYPES and library() is not None


def unpack(rows_BCSX: Tensor, format: NumberFormat, out_BCSR: Tensor) -> Tensor:
    """Rows as numbers, into memory whose last stride is 1."""
    kernel = library()
    assert kernel is not None and out_BCSR.stride(-1) == 1, "unpacks() was asked"
    assert out_BCSR.shape == (*rows_BCSX.shape[:3], format.width), "as many numbers as there are"
    kernel.kvfold_unpack(
        ctypes.c_int(out_BCSR.dtype == torch.bfloat16),
        ctypes.byref(_Stored(PackedTokens(rows_BCSX, format, out_BCSR.dtype))),
        ctypes.c_void_p(out_BCSR.data_ptr()),
        *(ctypes.c_int64(stride) for stride in out_BCSR.stride()[:3]),
        *(ctypes.c_int(number) for number in (out_BCSR.shape[0], out_BCSR.shape[2], torch.get_num_threads())),
    )
    return out_BCSR


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel turns these numbers, and nobody wants gradients or a graph of it."""
    tensors = (x, cos, sin)
    if recorded(*tensors) or (torch.is_grad_enabled() and x.requires_grad):
        return False
    plain = all(part.device.type == "cpu" and part.dtype in DTYPES for part in tensors) and x.stride(-1) == 1
    return plain and cos.dtype == sin.dtype and library() is not None


def rotate(x_BCSF: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, head_dim: int) -> Tensor:
    """Heads [B, C * F / head_dim, S, head_dim] of x, rotated by tables [B or 1, S, r]."""
    B, C, S, F = x_BCSF.shape
    kernel, heads, r = library(), F // head_dim, cos_BSr.shape[2]
    assert kernel is not None, "rotates() was asked"
    cos, sin = cos_BSr.contiguous(), sin_BSr.contiguous()
    assert cos.shape == sin.shape and cos.shape[0] in (1, B) and cos.shape[1] == S, "tables are of these tokens"
    out = torch.empty(B, C * heads, S, head_dim, dtype=x_BCSF.dtype, device=x_BCSF.device)
    table_batch = S * r if len(cos) > 1 else 0
    sizes = _Rotation(*x_BCSF.stride()[:3], table_batch, B, C, heads, S, head_dim, r)
    kernel.kvfold_rotate(
        *(ctypes.c_int(part.dtype == torch.bfloat16) for part in (x_BCSF, cos)),
        ctypes.byref(sizes),
        *(ctypes.c_void_p(part.data_ptr()) for part in (x_BCSF, cos, sin, out)),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


def pages(rows_PCtX: Tensor) -> bool:
    """Whether the kernel takes these bytes out of pages, and puts others there."""
    _, _, tokens, row_bytes = rows_PCtX.shape
    dense = rows_PCtX.stride()[1:] == (tokens * row_bytes, row_bytes, 1)
    return rows_PCtX.device.type == "cpu" and rows_PCtX.dtype == torch.uint8 and dense and library() is not None


def gather(rows_PCtX: Tensor, tables_Bp: Tensor, spans: Sequence[tuple[int, int]], width: int) -> Tensor:
    """As `paging.gather`."""
    kernel, heads, row_bytes = library(), rows_PCtX.shape[1], rows_PCtX.shape[3]
    assert kernel is not None, "pages() was asked"
    assert all(0 <= start < end <= start + width for start, end in spans), "rows are wide enough"
    tables = tables_Bp.to(torch.int32).contiguous()
    ends = (ctypes.c_int64 * (2 * len(spans)))(*itertools.chain(*spans))
    out = torch.empty(len(spans), heads, width, row_bytes, dtype=torch.uint8, device=rows_PCtX.device)
    kernel.kvfold_gather(
        ctypes.byref(_Pages(rows_PCtX)),
        ctypes.c_void_p(tables.data_ptr()),
        ctypes.c_int64(tables.stride(0)),
        ends,
        ctypes.c_void_p(out.data_ptr()),
        *(ctypes.c_int(number) for number in (len(spans), width, torch.get_num_threads())),
    )
    return out


def scatter(rows_PCtX: Tensor, slots_T: Tensor, new_CTX: Tensor) -> None:
    """As `paging.scatter`."""
    kernel, slots = library(), slots_T.to(torch.int64).contiguous()
    assert kernel is not None and new_CTX.stride(-1) == 1, "pages() was asked"
    assert new_CTX.dtype == torch.uint8 and new_CTX.shape == (rows_PCtX.shape[1], len(slots), rows_PCtX.shape[3])
    kernel.kvfold_scatter(
        ctypes.byref(_Pages(rows_PCtX)),
        ctypes.c_void_p(slots.data_ptr()),
        ctypes.c_void_p(new_CTX.data_ptr()),
        *(ctypes.c_int64(number) for number in (*new_CTX.stride()[:2], len(slots))),
    )


def decode(q_BNTR: Tensor, z_BCSR: Stored, y_BUSV: Stored, bias: Tensor | None, *, scale: float) -> Tensor:
    """Attention [B, T, N, V] of few query tokens. bias: float32 [B or 1, N or 1, T, S] to add to the scores, or none."""
    out_BNTV, _ = decode_part(q_BNTR, z_BCSR, y_BUSV, bias, scale=scale)
    return out_BNTV.to(q_BNTR.dtype).transpose(1, 2)


def decode_part(
    q_BNTR: Tensor, z_BCSR: Stored, y_BUSV: Stored, bias: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Averages over a part of the tokens [B, N, T, V], and the logarithms of the sums [B, N, T] that say what the part counts
    beside others; both float32.

    Packed tokens become numbers of q's dtype, block by block, in the processor's own cache.
    Sums are float32; probabilities are rounded to the dtype before they weigh values, as in torch.
    """
    B, N, T, R = q_BNTR.shape
    S, V = y_BUSV.shape[2:]
    exact: dict[str, Any] = {"dtype": torch.float32, "device": q_BNTR.device}  # whatever torch's defaults are
    queries, out = torch.empty(B, N, T, R, **exact).copy_(q_BNTR), torch.empty(B, N * T, V, **exact)
    log_sums = torch.empty(B, N * T, **exact)
    groups, threads = math.gcd(z_BCSR.shape[1], y_BUSV.shape[1]), torch.get_num_threads()
    splits = min(max(1, -(-TASKS_PER_THREAD * threads // (B * groups))), -(-S // 256))
    if bias is not None:  # a row per query; one token's mask need not be copied for that
        bias = bias.expand(B, N, T, S)[:, :, 0] if T == 1 else bias.expand(B, N, T, S).reshape(B, N * T, S)
        bias = bias if bias.stride(-1) == 1 else torch.empty(bias.shape, **exact).copy_(bias)
    kernel = library()
    assert kernel is not None, "serves() was asked"
    kernel.kvfold_decode(
        ctypes.c_int(q_BNTR.dtype == torch.bfloat16),
        ctypes.c_void_p(queries.data_ptr()),
        ctypes.c_float(scale),
        ctypes.byref(_Stored(z_BCSR)),
        ctypes.byref(_Stored(y_BUSV)),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        *(ctypes.c_int64(0 if bias is None else bias.stride(axis)) for axis in (0, 1)),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(log_sums.data_ptr()),
        *(ctypes.c_int(number) for number in (B, N * T, S, splits, threads)),
    )
    return out.view(B, N, T, V), log_sums.view(B, N, T)
