"""The frontier of bytes and quality over all models that `make results-frontier` compared: one table, and a plot per model.

    python benchmarks/frontier.py [RUNS]
    python benchmarks/frontier.py --real FOLDER [NEWER ...]

--real: of one comparison, results/real.md, and its plot and table. FOLDER holds the peers and the default as it was, NEWER
`auto` and `auto:prefer=speed` as they are now.

At every budget `auto` stands beside the best of the others that take at most as many bytes. Every point of another method is
compared with `auto` at the same budget, or, where it has one size only, at the largest budget within it.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.report.plots import SVG, frontier_plot

NAMES = {
    "svd_a:width.v_latent=layer": "svd_a",
    "palu:width.latent=layer,width.v_latent=layer,width.group_size=0,bits.method=integer": "palu in 4 bits",
    "kivi:bits.k_bits=4,bits.v_bits=4": "kivi in 4 bits",
    "kivi": "kivi in 2 bits",
    "auto:allocate=uniform": "auto, equal shares",
    "auto:allocate=uniform,bits.method=integer": "auto, equal shares in 4 bits",
    "auto:prefer=speed": "auto, speed",
}
BEFORE = "auto, keys and values apart"
RESULTS = Path("results")
LEAST = 1e-8
COLUMNS = (
    "KL auto | perplexity auto | KL auto, --prefer speed | best of the others within as many bytes | its KL | auto / it"
)


@dataclass(frozen=True)
class Point:
    """One preset at one size, on one text. asked: its budget, None where it takes none."""

    preset: str
    asked: float | None
    kept: float
    kl: float
    loss_change: float

    @property
    def perplexity_change(self) -> float:
        """In percent."""
        return 100 * math.expm1(self.loss_change)


def main() -> None:
    """Write results/frontier.md, -shifted.md (further texts) and -ablation.md, per model a table and a plot, and
    frontier.json: how many points of others there are, and which lose less."""
    if sys.argv[1:2] == ["--real"]:
        real(*map(Path, sys.argv[2:]))
        return
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    lines: list[str] = []
    shifted: list[str] = []
    ablation, seen, beaten = [], 0, []
    for file in sorted(runs.glob("frontier-*/comparison.json")):
        comparison = json.loads(file.read_text())
        for index, text in enumerate([comparison["evaluated_on"].partition(".")[0], *comparison["also_on"]]):
            points = read(comparison, index)
            where = f"{comparison['model']} | {text.removesuffix('.txt')}"
            (shifted if index else lines).extend(f"| {where} | {line}" for line in beside(points))
            ablation += [f"| {where} | {line}" for line in shared(points)]
            for point in points:
                ours = same_budget(points, point)
                if ours is not None:
                    seen += 1
                    if ours.kl > point.kl:
                        beaten.append(
                            f"{where}: {point.preset} at {point.kept:.4f}: {point.kl:.2e}, auto {ours.kl:.2e}"
                        )
        illustrate(file, comparison)
    write("frontier.md", COLUMNS, lines)
    write("frontier-shifted.md", COLUMNS, shifted)
    write("frontier-ablation.md", "KL, shared out | KL, equal shares | equal shares, 4 bits", ablation)
    print(f"{seen} points of other methods; better than auto at the same budget: {len(beaten)}", *beaten, sep="\n")
    counted = json.dumps({"points": seen, "better_than_auto": beaten})
    (RESULTS / "frontier.json").write_text(counted + "\n")
    print(counted)


def real(folder: Path, *newer: Path) -> None:
    """Of one comparison: results/real.md over all its texts, and its own table and plot. newer: of the same tokens, in whose
    presets' place they stand; the default of before stays beside."""
    file = folder / "comparison.json"
    comparison = json.loads(file.read_text())
    lines = (folder / "table.md").read_text().splitlines(keepends=True)
    for other in newer:
        added = json.loads((other / "comparison.json").read_text())
        assert added["evaluated_on"] == comparison["evaluated_on"], "both are measured on the same tokens"
        names = {row["preset"] for row in added["rows"]}
        for row in comparison["rows"]:
            row["preset"] = BEFORE if row["preset"] == "auto" and "auto" in names else row["preset"]
        comparison["rows"] = [row for row in comparison["rows"] if row["preset"] not in names] + added["rows"]
        if "auto" in names:
            lines = [line.replace("| auto |", f"| {BEFORE} |") for line in lines]
        lines = [line for line in lines if not line.startswith(tuple(f"| {name} |" for name in names))]
        added_lines = (other / "table.md").read_text().splitlines(keepends=True)
        lines += [line for line in added_lines if line.startswith(tuple(f"| {name} |" for name in names))]
    table = "".join(lines)
    texts = [comparison["evaluated_on"].partition(".")[0], *comparison["also_on"]]
    lines = [
        f"| {comparison['model']} | {text.removesuffix('.txt')} | {line}"
        for index, text in enumerate(texts)
        for line in beside(read(comparison, index))
    ]
    write("real.md", COLUMNS, lines)
    illustrate(file, comparison, table)


def illustrate(file: Path, comparison: dict[str, Any], table: str | None = None) -> None:
    """The plot of a comparison on its first text, and its table."""
    first = read(comparison, 0)
    curves = {p.preset: [(q.kept, max(q.kl, LEAST)) for q in first if q.preset == p.preset] for p in first}
    plot = frontier_plot(list(curves.items()), f"{comparison['model']}, books it never saw, no training")
    (RESULTS / f"{file.parent.name}.svg").write_text(SVG + plot)
    (RESULTS / f"{file.parent.name}.md").write_text(table or (file.parent / "table.md").read_text())


def read(comparison: dict[str, Any], index: int) -> list[Point]:
    """The points of a comparison on its text number `index`."""
    found, names = [], [row["preset"] for row in comparison["rows"]]
    several = len({row["asked_budget"] for row in comparison["rows"]} - {None}) > 1
    for row in comparison["rows"]:
        evaluations = [row["evaluation"], *row["further"]] if row["evaluation"] else []
        if evaluations:
            e = evaluations[index]
            change = e["loss"] - e["base_loss"]
            asked = None if several and names.count(row["preset"]) == 1 else row["asked_budget"]
            name = NAMES.get(row["preset"], row["preset"])
            found.append(Point(name, asked, e["kv_budget"], e["kl"], change))
    return found


def same_budget(points: list[Point], other: Point) -> Point | None:
    """`auto` with as much as another method was given; None for `auto` itself, and where it was given less than all."""
    limit = (other.asked or other.kept) * (1 + 1e-9)
    ours = [p for p in points if p.preset == "auto" and p.asked is not None and p.asked <= limit]
    return None if other.preset.startswith("auto") else max(ours, key=lambda p: p.asked or 0, default=None)


def beside(points: list[Point]) -> list[str]:
    """`auto` at every budget, and the best of the others that takes at most as many bytes."""
    lines = []
    for ours in (p for p in points if p.preset == "auto" and p.asked):
        assert ours.asked is not None
        others = [p for p in points if not p.preset.startswith("auto") and p.kept <= ours.asked * (1 + 1e-9)]
        best = min(others, key=lambda p: p.kl, default=None)
        speed = next((p for p in points if p.preset == NAMES["auto:prefer=speed"] and p.asked == ours.asked), None)
        line = f"1/{1 / ours.asked:.0f} | {ours.kl:.5f} | {ours.perplexity_change:+.2f} %"
        line += f" | {speed.kl if speed else math.nan:.5f}"
        if best is None:
            lines.append(f"{line} | none is that small | | |")
        else:
            lines.append(f"{line} | {best.preset} ({best.kept:.3f}) | {best.kl:.5f} | {ours.kl / best.kl:.2f} |")
    return lines


def shared(points: list[Point]) -> list[str]:
    """What the allocator adds: `auto` against equal shares of the bytes, and against equal bits too."""
    named = {(p.preset, p.asked): p.kl for p in points}
    names = ("auto", "auto, equal shares", "auto, equal shares in 4 bits")
    lines = []
    for asked in sorted({p.asked for p in points if p.preset == "auto" and p.asked}, reverse=True):
        kls = [named.get((name, asked)) for name in names]
        lines.append(f"1/{1 / asked:.0f} | " + " | ".join("-" if kl is None else f"{kl:.5f}" for kl in kls) + " |")
    return lines


def write(name: str, columns: str, lines: list[str]) -> None:
    """A markdown table."""
    head = f"| model | text | kv_budget | {columns} |"
    (RESULTS / name).write_text("\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines]) + "\n")


if __name__ == "__main__":
    main()
