"""What folds of one model score on tasks beside the original: accuracy, change and its paired standard error, in points.

    python benchmarks/task_scores.py MODEL FOLDED [FOLDED ...] --tasks FILE [FILE ...] [--limit 500] [--markdown FILE]

Tasks are what `kvfold evaluate --tasks` takes: files, folders of MMLU, names of lm-evaluation-harness. One JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from kvfold.checkpoint.source import load_plan
from kvfold.evaluation.standard_errors import defined
from kvfold.evaluation.tasks import TaskScore, evaluate_folds
from kvfold.report.table import Table


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folded", nargs="+")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, help="samples per task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument(
        "--answers", type=Path, default=Path("runs/answers"), help="where answers are kept for a later call"
    )
    options = parser.parse_args()
    tables = evaluate_folds(
        options.folded, against=options.model, tasks=options.tasks, limit=options.limit, batch_size=options.batch_size,
        answers=options.answers,
    )  # fmt: skip
    names = [f"{Path(path).name} ({load_plan(path)[0].kv_budget:.4f})" for path in options.folded]
    text = table(names, [chosen(rows) for rows in tables]).markdown()
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    rows = [[defined(dataclasses.asdict(row)) for row in rows] for rows in tables]
    print(json.dumps({"model": options.model, "folds": dict(zip(names, rows, strict=True))}))


def chosen(rows: list[TaskScore]) -> list[TaskScore]:
    """One row per task: acc_norm where the task has it, else acc; no perplexities, no members of groups."""
    best: dict[str, TaskScore] = {}
    for row in rows:
        if row.metric in ("acc", "acc_norm") and not row.part_of and (row.task not in best or row.metric == "acc_norm"):
            best[row.task] = row
    return list(best.values())


def table(names: Sequence[str], tables: list[list[TaskScore]]) -> Table:
    """A row per task, then their mean, whose error takes tasks as independent."""
    found = Table(("task", "questions", "original", *names))
    for scores in zip(*tables, strict=True):
        changes = [cell(row.score, row.score - row.base_score, row.change_stderr) for row in scores]
        first = scores[0]
        base = f"{100 * first.base_score:.1f} ± {100 * first.base_stderr:.1f}"
        found.add(f"{first.task} ({first.metric})", f"{first.samples}", base, *changes)
    found.add(*mean_row(tables))
    return found


def mean_row(tables: list[list[TaskScore]]) -> list[str]:
    """The last row of the table."""
    count = len(tables[0])
    cells = []
    for rows in tables:
        change = sum(row.score - row.base_score for row in rows) / count
        error = sum(row.change_stderr**2 for row in rows) ** 0.5 / count
        cells.append(cell(sum(row.score for row in rows) / count, change, error))
    base = sum(row.base_score for row in tables[0]) / count
    return ["mean", f"{sum(row.samples for row in tables[0])}", f"{100 * base:.1f}", *cells]


def cell(score: float, change: float, error: float) -> str:
    """Score, and its change with one standard error, in points."""
    return f"{100 * score:.1f} ({100 * change:+.1f} ± {100 * error:.1f})"


if __name__ == "__main__":
    main()
