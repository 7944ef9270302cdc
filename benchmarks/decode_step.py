"""One decode step of a folded model against the original under transformers' own caches, interleaved in one run.

    python benchmarks/decode_step.py MODEL FOLDED [--batch 8] [--context 2048] [--dtype float32] [--threads 2]

The cache is filled with random numbers up to the context; then single tokens are decoded in turn by every contestant. Prints
medians and ratios to the original with DynamicCache, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from kvfold.loading import load_plan, load_weights, resolve_device
from kvfold.plan import CachePlan
from kvfold.runtime.cache import FoldedCache

WARM_UP = 3


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folded", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = resolve_device(options.device), getattr(torch, options.dtype)
    original = load_weights(options.model, options.dtype, device)
    contestants: dict[str, tuple[Any, Any]] = {
        "original, DynamicCache": (original, DynamicCache(config=original.config)),
        "original, StaticCache": (
            original,
            StaticCache(config=original.config, max_cache_len=options.context + options.steps + WARM_UP),
        ),
    }
    for folder in options.folded:
        plan, _ = load_plan(folder)
        contestants[folder] = (load_weights(folder, options.dtype, device), FoldedCache(plan))
    source, _ = load_plan(options.model)
    for name, (_, cache) in contestants.items():
        plan = load_plan(name)[0] if isinstance(cache, FoldedCache) else source
        fill(cache, plan, options.batch, options.context, dtype, device)
    seconds = race(contestants, options.batch, options.steps, device)
    report(seconds, options, device)


def fill(cache: Any, plan: CachePlan, batch: int, context: int, dtype: torch.dtype, device: str) -> None:
    """Random keys and values for every layer."""
    for index, spec in enumerate(plan.caches):
        if spec is None:
            continue
        z = torch.randn(batch, spec.num_kv_heads, context, spec.head_dim, dtype=dtype, device=device)
        y = torch.randn(batch, spec.num_v_heads, context, spec.v_head_dim, dtype=dtype, device=device)
        cache.update(z, y, index)
    if plan.position_bytes:
        cache.see(torch.arange(context, device=device)[None], batch)


@torch.inference_mode()
def race(contestants: dict[str, tuple[Any, Any]], batch: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds per decode step; every contestant takes one step in turn."""
    token = torch.full((batch, 1), 5, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(steps + WARM_UP):
        for name, (model, cache) in contestants.items():
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            if device != "cpu":
                torch.cuda.synchronize()
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], options: argparse.Namespace, device: str) -> None:
    """Table and JSON."""
    medians = {str(name).rstrip("/").rpartition("/")[2]: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    settings = {name: getattr(options, name) for name in ("batch", "context", "dtype", "threads", "steps")}
    lines = [f"One decode step on the {device}: " + ", ".join(f"{n} {v}" for n, v in settings.items()) + ".", ""]
    lines += ["| | median | ratio |", "|---|---|---|"]
    lines += [f"| {name} | {median * 1e3:.1f} ms | {median / first:.2f} |" for name, median in medians.items()]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    ratios = {name: round(median / first, 4) for name, median in medians.items()}
    print(
        json.dumps(
            settings | {"device": device, "median_ms": {n: m * 1e3 for n, m in medians.items()}, "ratio": ratios}
        )
    )


if __name__ == "__main__":
    main()
