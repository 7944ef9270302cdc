"""`kvfold evaluate`: what a folded model lost, on texts, on tasks and in recall."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli.options import Device, Dtype, Model, SeqLen, integers, require
from kvfold.evaluation.task_presets import TASK_PRESETS

TASKS_HELP = "A task of lm-evaluation-harness, a .jsonl file, or the tasks of a paper: " + ", ".join(TASK_PRESETS)
TASKS_HELP += "; repeatable. Needs the extra eval (lm-eval)."

Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text to evaluate on, cut into sequences from its beginning; an incomplete last one is left out. Repeatable:"
        " further texts show what is lost on other kinds of text.",
        show_default=False,
    ),
]
Recall = Annotated[
    str | None,
    typer.Option(
        help="Does it still find passages far back in its cache? Lengths in tokens: 1024,4096; auto: up to the model's"
        " context, at most 2048. Contexts are stretches of --data if there is one, else random tokens.",
        show_default=False,
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="What does a cache of so many tokens still know? Lengths: 1024,4096. Contexts are stretches of --data;"
        " behind each, its continuation, facts, passages and pairs are asked for.",
        show_default=False,
    ),
]


def command(
    ctx: typer.Context,
    model: Model,
    against: Annotated[str, typer.Option(help="The original model.", show_default=False)],
    data: Texts = None,
    tasks: Annotated[list[str] | None, typer.Option(help=TASKS_HELP, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Samples per task.", min=1, show_default=False)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before a question (default: the task's).", min=0, show_default=False)
    ] = None,
    recall: Recall = None,
    context: Lengths = None,
    sequences: Annotated[int, typer.Option(help="Contexts of --context.", min=2)] = 16,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use at most this many tokens of a text.", min=2, show_default=False)
    ] = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure what a folded model lost: on texts (loss, perplexity, KL, top-1 agreement), tasks, in recall, of a context."""
    from kvfold.report.tables import print_json

    nothing = not (data or tasks or recall) or (context and not data)
    _refuse(nothing, "say what to measure: --data, --tasks or --recall (--context goes with --data)")
    require(ctx, tasks, "--tasks", "limit", "num_fewshot")
    require(ctx, context, "--context", "sequences")
    require(ctx, data, "--data", "max_tokens", "seq_len")
    others = max_tokens or seq_len or len(data or []) > 1
    _refuse(context and others, "--context goes with one --data, without --max-tokens and --seq-len")
    _check_later_parts(tasks, recall, data)
    common: dict[str, Any] = {"against": against, "dtype": dtype, "device": device}
    values: dict[str, Any] = {}
    if context and data:
        values |= _of_context(model, data[0], integers(context, "--context") or [], sequences, common)
    elif data:
        values |= _of_texts(model, data, common | {"max_tokens": max_tokens, "seq_len": seq_len or 0})
    if recall:
        values |= _of_recall(model, recall, data, common)
    if tasks:  # last, since it takes longest
        values |= _of_tasks(model, tasks, common | {"limit": limit, "num_fewshot": num_fewshot})
    print_json(values)


def _check_later_parts(tasks: list[str] | None, recall: str | None, data: list[Path] | None) -> None:
    """Before anything is measured, which takes long."""
    if recall:
        from kvfold.evaluation.recall import check_lengths

        check_lengths(_recall_lengths(recall), data[0] if data else None)
    if tasks and (recall or data):
        from kvfold.evaluation.tasks import check_tasks

        check_tasks(tasks)


def _refuse(wrong: Any, what: str) -> None:
    if wrong:
        raise typer.BadParameter(what)


def _of_texts(model: str, data: list[Path], options: dict[str, Any]) -> dict[str, Any]:
    from kvfold.evaluation.texts import evaluate_texts
    from kvfold.report.tables import print_evaluation, print_texts

    found = evaluate_texts(model, data_files=data, **options)
    print_evaluation(found[0])
    values: dict[str, Any] = found[0].to_json()
    if data[1:]:
        print_texts([path.name for path in data], found)
        values["further"] = [{"data": str(p)} | one.to_json() for p, one in zip(data[1:], found[1:], strict=True)]
    return values


def _of_context(model: str, data: Path, lengths: list[int], sequences: int, common: dict[str, Any]) -> dict[str, Any]:
    from kvfold.evaluation.context import measure_context
    from kvfold.report.tables import print_context

    rows = measure_context(model, data_file=data, lengths=lengths, sequences=sequences, **common)
    print_context(rows)
    return {"context": [row.to_json() for row in rows]}


def _of_recall(model: str, recall: str, data: list[Path] | None, common: dict[str, Any]) -> dict[str, Any]:
    from kvfold.evaluation.recall import measure_recall
    from kvfold.report.tables import print_recall

    rows = measure_recall(model, lengths=_recall_lengths(recall), filler=data[0] if data else None, **common)
    print_recall(rows)
    return {"recall": [row.to_json() for row in rows]}


def _recall_lengths(recall: str) -> list[int]:
    return integers(None if recall == "auto" else recall, "--recall") or []


def _of_tasks(model: str, tasks: Any, options: dict[str, Any]) -> dict[str, Any]:
    from kvfold.evaluation.tasks import evaluate_tasks
    from kvfold.report.tables import print_tasks

    scores = evaluate_tasks(model, tasks=tasks, **options)
    print_tasks(scores)
    return {"tasks": [score.to_json() for score in scores]}
