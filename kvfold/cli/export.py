"""`kvfold export`: a checkpoint that needs no kvfold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[str, typer.Argument(help="Folder that kvfold wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help="gqa: the stock class with fewer key/value heads.")] = "gqa",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint that loads without kvfold."""
    from kvfold.compression.export_gqa import export_gqa
    from kvfold.report.tables import print_json

    if format_ != "gqa":
        raise typer.BadParameter(f"{format_!r} is not a format; there is: gqa", param_hint="--format")
    heads = export_gqa(folder, out, overwrite=overwrite)
    print_json({"out": str(out), "format": format_, "num_key_value_heads": heads})
