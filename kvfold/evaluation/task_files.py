"""Tasks in local files: which layouts there are, and what lm-evaluation-harness is told about each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from kvfold.errors import DataError, RecipeError

ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
ACC_NORM = ACC | {"metric": "acc_norm"}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Layout:
    """Fields of a row and their types, and the harness's fields for such rows."""

    about: str
    fields: dict[str, type]
    config: dict[str, Any]


LAYOUTS = (
    Layout(
        "multiple choice",
        {"query": str, "choices": list, "gold": int},
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [ACC, ACC_NORM],
        },
    ),
    Layout(
        "one continuation after several contexts",
        {"context_options": list, "continuation": str, "gold": int},
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",  # a number: the harness then takes the choices as contexts, as for WinoGrande
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
            "metric_list": [ACC],
        },
    ),
    Layout(
        "the one right continuation",
        {"context": str, "continuation": str},
        {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "continuation",
            "metric_list": [PERPLEXITY, ACC],
        },
    ),
)
KNOWN = "; ".join(f"{{{', '.join(layout.fields)}}} ({layout.about})" for layout in LAYOUTS)
MMLU_FIELDS = {"question", "choice0", "choice1", "choice2", "choice3", "answer"}


@dataclass(frozen=True)
class TaskFile:
    """A task's name, its rows, and its fields in the harness's configuration."""

    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]


def is_task_file(name: str) -> bool:
    """Whether a task is meant as a path: it has a slash, ends in .jsonl, or is a file."""
    return "/" in name or name.endswith(".jsonl") or (Path(name).is_file() and not name.endswith((".yaml", ".yml")))


def read_task_file(path: str | Path, *, num_fewshot: int = 0) -> TaskFile:
    """A .jsonl file in one of LAYOUTS, or a folder of MMLU's dev/ and test/ csv files. Raises DataError on anything else."""
    path = Path(path)
    if path.is_dir():
        rows, layout = _mmlu_rows(path, num_fewshot), LAYOUTS[0]
        return TaskFile(path.resolve().name, rows, layout.config | {"metric_list": [ACC]})
    if not path.is_file():
        raise DataError(f"task file {path} does not exist. Give a .jsonl file, a task of the harness, or a preset.")
    if num_fewshot:
        raise RecipeError(f"{path} holds no examples to show before a question; leave out --num-fewshot for it.")
    rows = list(_json_rows(path))
    layout = _layout(path, rows)
    for line, row in enumerate(rows, 1):
        _check(path, line, row, layout)
    return TaskFile(path.stem, [_prompted(row) for row in rows], layout.config)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: texts may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task file {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object: {line[:80]!r}. Known layouts: {KNOWN}.")
        yield row


def _layout(path: Path, rows: list[dict[str, Any]]) -> Layout:
    if not rows:
        raise DataError(f"task file {path} is empty. Known layouts: {KNOWN}.")
    for layout in LAYOUTS:
        if layout.fields.keys() <= rows[0].keys():
            return layout
    raise DataError(f"{path} has rows of the fields {sorted(rows[0])}, which is no known layout. Known: {KNOWN}.")


def _check(path: Path, line: int, row: dict[str, Any], layout: Layout) -> None:
    for name, kind in layout.fields.items():
        if not isinstance(row.get(name), kind):
            raise DataError(f"{path}, line {line}: {name!r} is {row.get(name)!r}; it must be a {kind.__name__}.")
    for options in (row[name] for name, kind in layout.fields.items() if kind is list):
        if not all(isinstance(option, str) and option for option in options):
            raise DataError(f"{path}, line {line}: {options!r} must be texts.")
        if not 0 <= row["gold"] < len(options):
            raise DataError(f"{path}, line {line}: gold {row['gold']} is not one of {len(options)} options from 0 on.")


def _prompted(row: dict[str, Any]) -> dict[str, Any]:
    """As the harness words it: one blank before a continuation, and `Answer:` after what is marked as a question."""
    row = dict(row)
    if "query" in row:
        query = row["query"].rstrip()
        asks = any(line.startswith("Question:") for line in query.splitlines()) and not query.endswith("Answer:")
        row["query"] = query + ("\nAnswer:" if asks else "")
    elif "context" in row:  # the harness puts the blank before choices, not before this
        row["context"], row["continuation"] = row["context"].rstrip(), " " + row["continuation"].strip()
    else:
        row["context_options"] = [option.rstrip() for option in row["context_options"]]
        row["continuation"] = row["continuation"].strip()
    return row


def _mmlu_rows(folder: Path, num_fewshot: int) -> list[dict[str, Any]]:
    """Questions of all subjects in turn, so that the first N are of many; each after the first examples of its subject."""
    files = sorted((folder / "test").glob("*_test.csv"))
    if not files:
        raise DataError(
            f"{folder} holds no test/SUBJECT_test.csv; a folder must have the layout of MMLU, or give a file."
        )
    subjects = [list(_subject_rows(folder, file, num_fewshot)) for file in files]
    return [row for row in chain.from_iterable(zip_longest(*subjects)) if row is not None]


def _subject_rows(folder: Path, test: Path, num_fewshot: int) -> Iterator[dict[str, Any]]:
    subject = test.stem.removesuffix("_test")
    examples = list(_csv_rows(folder / "dev" / f"{subject}_dev.csv"))[:num_fewshot] if num_fewshot else []
    if len(examples) < num_fewshot:
        raise DataError(f"{folder}/dev has {len(examples)} examples of {subject}; {num_fewshot} were asked for.")
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    shown = [head, *(f"{_question(row)} {LETTERS[int(row['answer'])]}" for row in examples)]
    for row in _csv_rows(test):
        query = "\n\n".join([*shown, _question(row)])
        yield {"query": query, "choices": list(LETTERS), "gold": int(row["answer"])}


def _question(row: dict[str, str]) -> str:
    options = [f"{letter}. {row[f'choice{i}']}" for i, letter in enumerate(LETTERS)]
    return "\n".join([row["question"].strip(), *options, "Answer:"])


def _csv_rows(path: Path) -> Iterable[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = set(rows[0]) if rows else set()
    if not found >= MMLU_FIELDS or not all(row["answer"] in ("0", "1", "2", "3") for row in rows):
        raise DataError(
            f"{path} has the columns {sorted(found)}; MMLU has {sorted(MMLU_FIELDS)}, with answers from 0 to 3."
        )
    return rows
