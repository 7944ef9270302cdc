"""What `fisher` expects a side to cost beside what it costs: keys or values of one cache folded at a time, in nats per token.

    python benchmarks/expected_nats.py MODEL --data TEXT [--layers 0 7 14] [--budgets 1/4 1/8] [--markdown FILE]

Every side stores the shape that a uniform share of the budget gives it. One JSON line last.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from kvfold.calibration.material import layer_group
from kvfold.checkpoint.source import open_source
from kvfold.compression.allocate import expected_curve
from kvfold.compression.probe import Probe
from kvfold.compression.recipe import make_recipe, material_of, parse_budget
from kvfold.compression.request import Request

Row = dict[str, Any]


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text; measured on it as well")
    parser.add_argument("--layers", type=int, nargs="+", help="of which layers (default: all)")
    parser.add_argument("--budgets", nargs="+", default=["1/4", "1/8", "1/16"])
    parser.add_argument("--prefer", default="size")
    parser.add_argument("--run-dir", type=Path, help="where statistics and measurements are kept")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options, options.run_dir or Path(scratch))
    table = markdown(Path(options.model).name, rows)
    if options.markdown:
        options.markdown.write_text(table)
    print(table)
    print(json.dumps({"model": options.model, "rows": rows}))


def measure(options: argparse.Namespace, run_dir: Path) -> list[Row]:
    """One row per layer, side and budget."""
    sides = {"width": {"method": "fisher"}, "length": {"method": "identity"}}  # keys and values apart, all tokens alike
    fields = {"model": options.model, "out": str(run_dir / "unused"), "prefer": options.prefer} | sides
    recipe = make_recipe(fields | {"preset": "auto", "kv_budget": 0.5, "calibration": {"data": options.data}})
    source = open_source(options.model)
    axes = recipe.axes
    request = Request(layers=source.layers, targets=(None,) * len(source.layers), axes=axes, dtype=source.dtype)
    material = material_of(recipe, source, run_dir)
    found = material.statistics(axes.width.needs)
    groups = functools.lru_cache(maxsize=1)(
        lambda owner: layer_group(source, request.targets, owner, found, axes.width)
    )
    probe = Probe(source, request, groups, tokens_BT=material.tokens(), file=run_dir / "probes.json", device="cpu")
    layers = options.layers or [layer.index for layer in source.layers]
    return [row for index in layers for side in ("keys", "values") for row in of_side(probe, index, side, options)]


def of_side(probe: Probe, owner: int, side: str, options: argparse.Namespace) -> list[Row]:
    """At every budget."""
    began = time.perf_counter()
    curve = expected_curve(probe.request, probe.groups, owner, side)
    expecting, rows = time.perf_counter() - began, []
    whole = probe.request.cost((owner, side), probe.request.widest(probe.request.layers[owner], side))
    for budget in options.budgets:
        shape, nats = max(
            (point for point in curve if probe.request.cost((owner, side), point[0]) <= parse_budget(budget) * whole),
            key=lambda point: probe.request.cost((owner, side), point[0]),
        )
        began = time.perf_counter()
        row = {
            "layer": owner,
            "side": side,
            "budget": budget,
            "expected": nats,
            "measured": probe.of_side(owner, side, shape),
        }
        rows.append(row | {"expecting_s": expecting, "measuring_s": time.perf_counter() - began})
    return rows


def markdown(model: str, rows: list[Row]) -> str:
    """The sides, then how well expectation and measurement agree at every budget."""
    lines = [f"`{model}`: one side of one cache folded at a time, nats per token.", ""]
    lines += [
        "| budget | sides | rank correlation | sd of log(expected / measured) | mean of it | sum expected | sum measured |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        lines.append(f"| {budget} | " + " | ".join(agreement([row for row in rows if row["budget"] == budget])) + " |")
    lines += ["", "| layer | side | budget | expected | measured |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['layer']} | {r['side']} | {r['budget']} | {r['expected']:.2e} | {r['measured']:.2e} |" for r in rows
    ]
    return "\n".join(lines) + "\n"


def agreement(rows: list[Row]) -> list[str]:
    """Cells of one budget."""
    expected, measured = ([max(row[name], 1e-9) for row in rows] for name in ("expected", "measured"))
    logs = [math.log(e / m) for e, m in zip(expected, measured, strict=True)]
    rank = statistics.correlation(ranks(expected), ranks(measured))
    elements = [f"{rank:.2f}", f"{statistics.stdev(logs):.2f}", f"{statistics.mean(logs):+.2f}"]
    return [str(len(rows)), *elements, f"{sum(expected):.4f}", f"{sum(measured):.4f}"]


def ranks(elements: list[float]) -> list[int]:
    """The place of each in their order."""
    order = sorted(range(len(elements)), key=elements.__getitem__)
    return [order.index(i) for i in range(len(elements))]


if __name__ == "__main__":
    main()
