"""What caches of several folds of one model still know of a long context: a row per fold, and paired standard errors.

    python benchmarks/dropped_tokens.py MODEL FOLDED [FOLDED ...] --data FILE [--context 1024] [--sequences 16]
        [--markdown FILE] [--rows FOLDER]

Asks what `kvfold evaluate --context` asks. An interrupted command goes on behind the last fold whose rows are in FOLDER and
younger than the fold, the text and kvfold itself. One JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import kvfold
from kvfold.checkpoint.atomic import write_text
from kvfold.evaluation.context import Answers, Remembered, Sample, ask, compared, draw_samples
from kvfold.evaluation.texts import check_original
from kvfold.report.html import remembered
from kvfold.report.table import Table
from kvfold.runtimes.transformers.load import load


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folded", nargs="+")
    parser.add_argument("--data", required=True, type=Path, help="text that was not calibrated on")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--rows", type=Path, help="keep each fold's rows here")
    options = parser.parse_args()
    for found in measure(options):
        text = table(found, options).markdown()
        if options.markdown:  # after every fold: some take a quarter of an hour
            options.markdown.write_text(text)
    print(text)
    print(json.dumps({name: [row.to_json() for row in rows] for name, rows in found.items()}))


def measure(options: argparse.Namespace) -> Iterator[dict[str, list[Remembered]]]:
    """Rows of the folds so far, after each; the original answers once, if a fold has to be asked."""

    @functools.cache
    def original() -> tuple[list[Sample], list[Answers]]:
        base = load(options.model)
        samples = draw_samples(base.tokenizer, options.data, length=options.context, sequences=options.sequences)
        return samples, ask(base.model, samples, "the original")

    found: dict[str, list[Remembered]] = {}
    for folder in map(Path, options.folded):
        check_original(folder, options.model)
        found[folder.name] = kept(folder, options) or asked(folder, options, *original())
        yield found


def asked(
    folder: Path, options: argparse.Namespace, samples: list[Sample], expected: list[Answers]
) -> list[Remembered]:
    """A fold's rows, kept if wanted."""
    loaded = load(folder)
    rows = compared(samples, expected, ask(loaded.model, samples, folder.name), loaded.plan)
    if file := rows_file(folder, options):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps([dataclasses.asdict(row) for row in rows]))
    return rows


def kept(folder: Path, options: argparse.Namespace) -> list[Remembered]:
    """Rows of a command before, of the same contexts of this fold; none where it, the text or kvfold was written since."""
    file = rows_file(folder, options)
    if file is None or not file.exists():
        return []
    code = (one for one in Path(kvfold.__file__).parent.rglob("*") if one.suffix in (".py", ".cpp", ".h"))
    if file.stat().st_mtime < max(one.stat().st_mtime for one in (folder / "config.json", options.data, *code)):
        return []
    return [Remembered(**row) for row in json.loads(file.read_text())]


def rows_file(folder: Path, options: argparse.Namespace) -> Path | None:
    """Named by the fold's place and what it is asked, not by what kvfold itself does; None where rows are not kept."""
    place = "-".join(part.strip("/") for part in folder.parts if part.strip("/"))
    name = f"{place}-{options.data.stem}-{options.context}x{options.sequences}.json"
    return options.rows and options.rows / name


def table(found: dict[str, list[Remembered]], options: argparse.Namespace) -> Table:
    """KL of the continuation, what is found of what the original finds, bytes."""
    kinds = [row.kind for row in next(iter(found.values()))]
    read = ["of the tokens, read"] if any(rows[0].share_read < 1 for rows in found.values()) else []
    columns = ("fold", "of the bytes", *read, "KL of the continuation", *kinds[1:])
    title = f"{Path(options.model).name}, {options.sequences} contexts of {options.context:,} tokens of {options.data.name}."
    made = Table(columns, title=title)
    first = next(iter(found.values()))
    made.add("original", "1.000", *(["1.000"] if read else []), "0", *(f"{row.base_accuracy:.1%}" for row in first[1:]))
    for name, rows in found.items():
        shares = [f"{rows[0].kv_share:.3f}"] + ([f"{rows[0].share_read:.3f}"] if read else [])
        made.add(name, *shares, *map(remembered, rows))
    return made


if __name__ == "__main__":
    main()
