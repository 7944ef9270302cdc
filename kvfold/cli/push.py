"""`kvfold push`: a folded folder to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.errors import RecipeError


def command(
    folder: Annotated[Path, typer.Argument(help="What kvfold compress or heal wrote.")],
    repo: Annotated[str, typer.Argument(help="NAME or OWNER/NAME on the hub.")],
    against: Annotated[
        str | None, typer.Option(help="The original: its id on the hub, or a local copy.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Measure on this text first, and write it into the card.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of that text.", min=2)] = 20_000,
    license: Annotated[str | None, typer.Option(help="Of the original: apache-2.0.", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Upload a folded model, with a card that names its original and what was measured."""
    from kvfold.checkpoint.push import push
    from kvfold.evaluation.texts import evaluate
    from kvfold.report.tables import STDOUT, print_json, quality_table

    if data and not against:
        raise RecipeError("--data measures what was lost against the original; name it by --against.")
    found = evaluate(folder, against=against, data_file=data, max_tokens=max_tokens) if data and against else None
    measured = quality_table(found, data.name).markdown() if found and data else None
    address = push(folder, repo, base_model=against, license=license, measured=measured, private=private)
    STDOUT.print(f"{folder} is at {address}", markup=False)
    print_json({"folder": str(folder), "repo": repo, "address": address, "measured": found and found.to_json()})
