"""Speed for people: tables of `kvfold bench`, printed and as Markdown."""

from __future__ import annotations

import math
from typing import Any

from kvfold.evaluation.speed import Benchmark
from kvfold.evaluation.throughput import ThroughputBenchmark
from kvfold.report.table import Table

STEPS = (
    "", "kv_budget", "first token", "step", "tokens/s", "of the first", "attention", "cache MB", "read MB", "of bandwidth",
    "peak MB", "sequences that fit",
)  # fmt: skip
REQUESTS = ("", "kv_budget", "tokens/s", "of the first", "first token", "further token", "cached tokens")


def speed_table(found: Benchmark | ThroughputBenchmark) -> Table:
    """How it was measured, and a row per contestant: times beside ratios to the first row, which noise spares more.

    Columns that nothing was measured for are left out.
    """
    if isinstance(found, ThroughputBenchmark):
        return Table(REQUESTS, list(_of_requests(found)), title=_settings(found.settings))
    title = f"{_settings(found.settings)}; copies {found.copy_bytes_per_second / 1e9:.3g} GB/s"
    lines = _of_steps(found)
    used = [i for i, name in enumerate(STEPS) if not name or any(line[i] for line in lines)]
    return Table([STEPS[i] for i in used], [tuple(line[i] for i in used) for line in lines], title=title)


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _of_steps(found: Benchmark) -> list[tuple[str, ...]]:
    return [
        (row.label, f"{row.kv_budget:.3f}", _time(row.ttft), _time(row.tpot),
         f"{row.tokens_per_second:,.4g}", f"{row.tpot / found.rows[0].tpot:.3f}", _time(row.attention),
         f"{row.stored_bytes / 1e6:,.4g}", f"{row.read_bytes / 1e6:,.4g}",
         "" if math.isnan(row.attention) else f"{row.bandwidth:.0%}",
         f"{row.peak_bytes / 1e6:,.4g}" if row.peak_bytes else "",
         "" if row.fitting is None else f"{row.fitting:,}")
        for row in found.rows
    ]  # fmt: skip


def _of_requests(found: ThroughputBenchmark) -> list[tuple[str, ...]]:
    first = found.rows[0].tokens_per_second
    return [
        (row.label, f"{row.kv_budget:.3f}", f"{row.tokens_per_second:,.4g}", f"{row.tokens_per_second / first:.2f}",
         _time(row.ttft), _time(row.tpot), f"{row.cache_tokens:,}")
        for row in found.rows
    ]  # fmt: skip


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"
