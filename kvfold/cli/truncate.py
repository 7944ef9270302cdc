"""`kvfold truncate`: fewer numbers per stored head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.options import Overwrite


def command(
    folder: Annotated[str, typer.Argument(help="Folder that kvfold wrote.", show_default=False)],
    kv_budget: Annotated[str, typer.Option(help="Below what the folder keeps now: 0.125 or 1/8.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Cut the trailing numbers of every stored head off; best after `heal --set elastic=0.25`."""
    from kvfold.compression.recipe import parse_budget
    from kvfold.compression.truncate import truncate
    from kvfold.report.tables import print_json, print_plan

    plan = truncate(folder, out, kv_budget=parse_budget(kv_budget), overwrite=overwrite)
    print_plan(plan, f"{out}")
    print_json({"out": str(out), "kv_budget": plan.kv_budget, "kv_bytes_per_token": plan.kv_bytes_per_token()})
