"""What caches of several folds of one model still know of a long context: a row per fold, and paired standard errors.

    python benchmarks/dropped_tokens.py MODEL FOLDED [FOLDED ...] --data FILE [--context 1024] [--sequences 16]
        [--markdown FILE]

Asks what `kvfold evaluate --context` asks. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvfold.evaluation.context import Remembered, ask, compared, draw_samples
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
    options = parser.parse_args()
    for found in measure(options.model, options.folded, options.data, options.context, options.sequences):
        text = table(found, options).markdown()
        if options.markdown:  # after every fold: some take a quarter of an hour
            options.markdown.write_text(text)
    print(text)
    print(json.dumps({name: [row.to_json() for row in rows] for name, rows in found.items()}))


def measure(
    model: str, folded: Sequence[str], data: Path, context: int, sequences: int
) -> Iterator[dict[str, list[Remembered]]]:
    """Rows of the folds so far, after each; the original answers once."""
    base = load(model)
    samples = draw_samples(base.tokenizer, data, length=context, sequences=sequences)
    expected = ask(base.model, samples, "the original")
    found: dict[str, list[Remembered]] = {}
    for folder in folded:
        check_original(folder, model)
        loaded = load(folder)
        found[Path(folder).name] = compared(
            samples, expected, ask(loaded.model, samples, Path(folder).name), loaded.plan
        )
        yield found


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
