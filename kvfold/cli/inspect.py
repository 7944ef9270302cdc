"""`kvfold inspect`: what a model's cache takes, and what fits into a memory."""

from __future__ import annotations

from typing import Annotated

import typer

from kvfold.cli.options import Model, require


def command(
    ctx: typer.Context,
    model: Model,
    memory: Annotated[str | None, typer.Option(help="How many sequences fit: 80GB, 24GiB.", show_default=False)] = None,
    context: Annotated[str, typer.Option(help="Tokens per sequence for that: 32k or 32768.")] = "32k",
    sequences: Annotated[int | None, typer.Option(help="Which budget so many need.", min=1, show_default=False)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare all files with what was written.")] = False,
) -> None:
    """Show what a model's cache takes, layer by layer, and how many sequences fit into a memory."""
    from kvfold.checkpoint.manifest import check_files
    from kvfold.checkpoint.reader import locate
    from kvfold.evaluation.inspection import inspect
    from kvfold.evaluation.memory import capacity, parse_size
    from kvfold.report.tables import STDOUT, print_capacity, print_json, print_plan, print_processes
    from kvfold.runtimes.base import servable_by

    require(ctx, memory, "--memory", "sequences", "context")
    room, tokens = memory and parse_size(memory), parse_size(context, binary=True)
    found = inspect(model)
    if verify:
        check_files(locate(model))
    print_plan(found.plan, model)
    for runtime, obstacle in servable_by(found.plan, found.config).items():
        STDOUT.print(f"served by {runtime}: {'yes' if obstacle is None else f'no, {obstacle}'}")
    print_processes(found.plan)
    if verify:
        STDOUT.print("all files are as they were written")
    fitting = room and capacity(model, memory=room, context=tokens, wanted=sequences)
    if fitting:
        print_capacity(fitting)
    print_json(
        found.to_json() | ({"verified": True} if verify else {}) | ({"capacity": fitting.to_json()} if fitting else {})
    )
