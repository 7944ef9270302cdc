"""`kvfold export`: a checkpoint that needs no kvfold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[str, typer.Argument(help="Folder that kvfold wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write, or file.", show_default=False)],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="gqa: the stock class with fewer key/value heads; gguf: the same, by llama.cpp's converter.",
        ),
    ] = "gqa",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint that loads without kvfold."""
    from kvfold.compression.export_gguf import export_gguf
    from kvfold.compression.export_gqa import export_gqa
    from kvfold.report.tables import print_json

    formats = {"gqa": export_gqa, "gguf": export_gguf}
    if format_ not in formats:
        raise typer.BadParameter(f"{format_!r} is not a format; there are: {', '.join(formats)}", param_hint="--format")
    heads = formats[format_](folder, out, overwrite=overwrite)
    print_json({"out": str(out), "format": format_, "num_key_value_heads": heads})
