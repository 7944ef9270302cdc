"""Microseconds of the GPU's kernels over packed numbers, beside torch's fused kernel over numbers as they are; and of that
with and without cuDNN while a cache grows: python benchmarks/packed_kernels.py [--markdown FILE].

In bfloat16, one query token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import gpu_decode, triton_codes
from kvfold.runtimes.kernels import triton_attention as kernels
from kvfold.runtimes.kernels.codec import pack
from kvfold.runtimes.kernels.packed_tokens import PackedTokens

INT4, MIXED = ((128, 4),), ((128, 6), (176, 4), (176, 2))
CASES = [(batch, *side) for batch in (4, 32) for side in ((8, INT4), (1, MIXED))]
"""Sequences, stored heads of one side, and their tiers: of Llama-3-8B's shape, plain heads and a latent at an eighth."""
QUERIES, TOKENS, ROUNDS = 32, 8192, 12
BUSY = 400_000
"""Cycles for which the device waits before each run, so that launches are not what is measured."""


def microseconds(run: Callable[[], Any]) -> float:
    """Median, on the device."""
    found = []
    for at in range(ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found += [1e3 * begin.elapsed_time(end)] if at > 1 else []
    return statistics.median(found)


def of_case(batch: int, heads: int, tiers: tuple[tuple[int, int], ...]) -> list[float]:
    """MB, then microseconds: exponentials of scores, what blocks count, averages, all of them with what is around them, the
    same with queries that are turned, unpacking, packing one token, torch's kernel over bfloat16."""
    format = NumberFormat(tiers=tiers)
    some = torch.randn(batch, heads, 64, format.width, device="cuda", dtype=torch.bfloat16)
    rows = pack(some, format).repeat(1, 1, TOKENS // 64, 1)
    stored, q = PackedTokens(rows, format, torch.bfloat16), some.new_empty(batch, QUERIES, 1, format.width).normal_()
    span = kernels.Span(TOKENS, TOKENS - 1, TOKENS // kernels.TOKENS)
    marks, meeting = kernels.marks_of(batch, QUERIES, 1, span, q), kernels.arranged(q, [stored])
    sizes: dict[str, Any] = {"scale": 1e-3, "softcap": None, "ages": (0, TOKENS), "dtype": torch.bfloat16}
    way, out = turned(heads, format.width), some.new_empty(batch, heads, TOKENS, format.width)
    runs: list[Callable[[], Any]] = [
        lambda: kernels.add_exponentials(marks, meeting, [stored], span, None, **sizes),
        lambda: kernels.share_out(marks),
        lambda: kernels.averages(marks, [stored], span, torch.bfloat16),
        lambda: gpu_decode.decode_part(q, stored, stored, scale=1e-3),
        lambda: gpu_decode.decode_part(q[..., :128], stored, stored, scale=1e-3, rebuild=way),
        lambda: triton_codes.unpack(rows, format, out),
        lambda: triton_codes.pack(some[:, :, :1], format),
    ]
    plain = [torch.randn(batch, 8, TOKENS, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return [2 * rows.nbytes / 1e6, *map(microseconds, runs), microseconds(lambda: attended(q[..., :128], *plain))]


def turned(heads: int, width: int) -> gpu_decode.Rebuild:
    """Eight key heads of 128 numbers out of a stored width, whose slow pairs turn as Llama-3's."""
    speeds = tuple(0.0 if i < 21 else 5e5 ** (-i / 64) for i in range(64))
    weight = torch.randn(heads, 1024 // heads, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    angles = (torch.arange(TOKENS, device="cuda")[:, None] * torch.tensor(speeds, device="cuda")).repeat(1, 2)[None]
    way = gpu_decode.HeadMap.of(weight, None, 128, speeds).rebuild(angles.cos(), angles.sin(), evenly=True)
    assert way is not None, "positions follow each other"
    return way


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By torch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def growing(cudnn: bool) -> float:
    """Milliseconds of the same while each call sees one token more."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    k, v = (torch.randn(4, 8, TOKENS + 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = []
    for tokens in range(TOKENS, TOKENS + 16):
        torch.cuda.synchronize()
        start = time.perf_counter()
        attended(k[:, :1, :1].expand(-1, QUERIES, -1, -1), k[:, :, :tokens], v[:, :, :tokens])
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def main() -> None:
    """Print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    lines = [
        f"torch's kernel over a cache that grows, ms: {growing(True):.3f} with cuDNN, {growing(False):.3f} without",
        "",
    ]
    names = (
        "MB",
        "exponentials",
        "shares",
        "averages",
        "a step",
        "queries turned",
        "unpacking",
        "packing a token",
        "bfloat16, 8 heads",
    )
    lines += ["| batch | heads | tiers | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for batch, heads, tiers in CASES:
        numbers = " | ".join(f"{number:,.0f}" for number in of_case(batch, heads, tiers))
        lines.append(f"| {batch} | {heads} | {tiers} | {numbers} |")
    text = "\n".join([f"{torch.cuda.get_device_name()}, {TOKENS} tokens, {QUERIES} queries, microseconds", "", *lines])
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
