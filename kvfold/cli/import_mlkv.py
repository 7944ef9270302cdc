"""`kvfold import-mlkv`: checkpoints of the MLKV paper's public code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.options import Model


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    as_trained: Annotated[
        bool,
        typer.Option(
            "--as-trained/--rotate-readers",
            help="Layers that read a cache see un-rotated keys, as published weights were trained; or rotated ones.",
        ),
    ] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read the tensors of a pytorch_model.bin.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Make a kvfold folder of a checkpoint in the layout of the MLKV paper's public code."""
    from kvfold.compression.import_mlkv import import_mlkv
    from kvfold.report.tables import print_json, print_plan

    plan = import_mlkv(model, out, as_trained=as_trained, allow_pickle=allow_pickle, overwrite=overwrite)
    print_plan(plan, f"{out}")
    print_json({"out": str(out), "kv_budget": plan.kv_budget, "kv_bytes_per_token": plan.kv_bytes_per_token()})
