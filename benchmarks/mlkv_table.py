"""The memory and speed table of the MLKV paper (arXiv 2406.09297): its nine configurations of Pythia-160M, random weights.

    python benchmarks/mlkv_table.py [--memory 8] [--context 2048] [--batch 8] [--dtype bfloat16]

Bytes are those that the cache objects allocate. The largest batch is how many sequences of the context fit beside the weights
into the given memory; activations are not counted. Decode steps are taken in turn by all configurations; medians. MLPs are
widened as in the paper, so that all models have the parameters of the original. One JSON line last.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GPTNeoXConfig

from kvfold.architectures.base import architecture, empty_model
from kvfold.benchmark import WARM_UP, fill, timed
from kvfold.loading import resolve_device
from kvfold.plan import CONFIG_KEY, CachePlan
from kvfold.presets import MLKV_PAPER
from kvfold.recipe import preset_recipe
from kvfold.runtime.cache import FoldedCache
from kvfold.runtime.modeling import empty_folded_model, folded_classes
from kvfold.shapes import Shape
from kvfold.widen import widened_size

PYTHIA_160M: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "rotary_pct": 0.25,
    "vocab_size": 50304,
    "max_position_embeddings": 1_000_000,
}
ORIGINAL = "original, DynamicCache"
COLUMNS = (
    "configuration", "caches x heads", "parameters (M)", "KiB per token", "MiB per sequence", "less than MHA",
    "largest batch", "ms per step", "tokens/s", "ratio",
)  # fmt: skip


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=8, help="GB for weights and cache")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = resolve_device(options.device), getattr(torch, options.dtype)
    arch = architecture("gpt_neox")
    plans = {name: plan_of(name, options.dtype) for name in MLKV_PAPER}
    stock = arch.model_class(GPTNeoXConfig(**PYTHIA_160M)).to(device, dtype).eval()
    contestants: dict[str, tuple[Any, Any]] = {ORIGINAL: (stock, DynamicCache(config=stock.config))}
    contestants |= {name: (build(plan).to(device, dtype), FoldedCache(plan)) for name, plan in plans.items()}
    for name, (_, cache) in contestants.items():
        fill(cache, plans.get(name, plans["MHA-144"]), options.batch, options.context, dtype, device)
    for name, plan in plans.items():
        held = contestants[name][1].nbytes_allocated
        assert held == plan.kv_bytes(options.context, batch_size=options.batch), f"{name} allocates {held} bytes"
    seconds = race(contestants, options.batch, options.steps, device)
    report(contestants, plans, {name: statistics.median(times) for name, times in seconds.items()}, options, device)


@torch.inference_mode()
def race(contestants: dict[str, tuple[Any, Any]], batch: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds per decode step; every contestant takes one step in turn."""
    token = torch.full((batch, 1), 5, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(steps + WARM_UP):
        for name, (model, cache) in contestants.items():
            taken = timed(functools.partial(model, token, past_key_values=cache, use_cache=True), device)
            if step >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def plan_of(name: str, dtype: str) -> CachePlan:
    """The plan of one configuration at Pythia-160M's shape."""
    shape = Shape(name="pythia-160m", layers=PYTHIA_160M["num_hidden_layers"])
    return shape.plan(preset_recipe(name, {"model": "-", "out": "-"}), dtype)


def build(plan: CachePlan) -> Any:
    """A folded Pythia-160M with random weights, its MLPs widened by what the plan saves."""
    arch = architecture("gpt_neox")
    config = GPTNeoXConfig(**PYTHIA_160M).to_dict() | {CONFIG_KEY: plan.to_dict(), "model_type": "kvfold_gpt_neox"}
    before = sum(p.numel() for p in empty_model(arch, GPTNeoXConfig(**PYTHIA_160M)).parameters())
    saved = before - sum(p.numel() for p in empty_folded_model(arch, config).parameters())
    config["intermediate_size"] = widened_size(arch, config, plan.num_layers, saved)
    config_class, model_class = folded_classes(arch)
    return model_class(config_class.from_dict(config)).eval()


def report(
    contestants: dict[str, tuple[Any, Any]],
    plans: dict[str, CachePlan],
    medians: dict[str, float],
    options: argparse.Namespace,
    device: str,
) -> None:
    """Table and JSON."""
    settings = {name: getattr(options, name) for name in ("memory", "batch", "context", "dtype", "threads", "steps")}
    rows = []
    for name, median in medians.items():
        plan = plans.get(name, plans["MHA-144"])
        parameters = sum(p.numel() for p in contestants[name][0].parameters())
        sequence = plan.kv_bytes(options.context)
        batch = int((options.memory * 1e9 - parameters * plan.itemsize()) // sequence)
        heads = f"{len(plan.owned)} x {plan.owned[0].num_kv_heads}"
        rows.append(
            (name, heads, f"{parameters / 1e6:.2f}", f"{plan.kv_bytes_per_token() / 1024:g}", f"{sequence / 2**20:.4g}",
             f"{plan.source_kv_bytes_per_token() / plan.kv_bytes_per_token():g}", f"{batch:,}", f"{median * 1e3:.1f}",
             f"{options.batch / median:,.0f}", f"{median / medians[ORIGINAL]:.2f}")
        )  # fmt: skip
    hardware = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    lines = [
        f"{hardware}, " + ", ".join(f"{name} {value}" for name, value in settings.items()) + " (memory in GB).",
        "",
    ]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    print(json.dumps(settings | {"device": hardware, "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows]}))


if __name__ == "__main__":
    main()
