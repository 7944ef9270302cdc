"""results/peers-*.md -> results/width-ratios.md: what ours lose as a share of what the paper's method and the best peer lose.

python benchmarks/width_ratios.py
"""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
PAIRS = {
    "fast, groups / svd_a, groups": ("fast:width.latent=group,width.v_latent=group", "svd_a:width.latent=group"),
    "fast / svd_a": ("fast", "svd_a:width.v_latent=layer"),
    "small / svd_a": ("small", "svd_a:width.v_latent=layer"),
    "small / best peer": ("small", None),
}
"""None: the least of the peers' at the same budget."""
PEERS = ("kq_svd", "eigen_attention", "palu")
MEASURES = ("loss change", "KL")
TEXTS = (("", "books-valid"), (" on wikitext2-valid.txt", "wikitext2-valid"))

Row = dict[str, str]


def main() -> None:
    """Write the table."""
    head = ["model", "kv_budget", "text", *(f"{name}: {measure}" for name in PAIRS for measure in MEASURES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for file in sorted(RESULTS.glob("peers-*.md")):
        for budget in ("1/2", "1/4", "1/8"):
            for suffix, text in TEXTS:
                rows = of_budget(read(file), fraction(budget))
                cells = [ratio(rows, *pair, measure + suffix) for pair in PAIRS.values() for measure in MEASURES]
                lines.append("| " + " | ".join([file.stem.removeprefix("peers-"), budget, text, *cells]) + " |")
    caption = (
        "Loss change and KL as shares of svd_a's in the same form and bytes, and of the best peer's (kq_svd, eigen_attention,"
        " palu in groups and whole layers). A dash: one of the two loss changes is within twice its standard error of 0."
    )
    (RESULTS / "width-ratios.md").write_text("\n".join([caption, "", *lines]) + "\n")
    print("\n".join(lines))


def read(file: Path) -> list[Row]:
    """The rows of a table, by column."""
    lines = [line.strip("| ").split(" | ") for line in file.read_text().splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def of_budget(rows: list[Row], budget: float) -> dict[str, Row]:
    """Preset -> its row at the largest budget that is not above the given one."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.get("KL") and float(row["kv_budget"]) <= budget + 5e-4 and float(row["kv_budget"]) > budget / 2:
            found[row["preset"]] = max(found.get(row["preset"], row), row, key=lambda r: float(r["kv_budget"]))
    return found


def ratio(rows: dict[str, Row], ours: str, theirs: str | None, column: str) -> str:
    """Ours / theirs, or a dash where noise would be divided."""
    others = (
        [rows[theirs]] if theirs in rows else [r for p, r in rows.items() if theirs is None and p.startswith(PEERS)]
    )
    if ours not in rows or not others:
        return "-"
    best = min(others, key=lambda row: number(row[column]))
    for cell in (rows[ours][column], best[column]):
        if "±" in cell and number(cell) < 2 * float(cell.partition("±")[2]):
            return "-"
    return f"{number(rows[ours][column]) / max(number(best[column]), 1e-9):.2f}"


def number(cell: str) -> float:
    """The first number of a cell."""
    match = re.search(r"[-+]?\d+\.\d+", cell)
    assert match, f"{cell!r} holds no number"
    return float(match[0])


def fraction(text: str) -> float:
    """1/4 -> 0.25."""
    above, below = text.split("/")
    return int(above) / int(below)


if __name__ == "__main__":
    main()
