"""`kvfold heal`: recovery training of a folded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli.options import Device, Overwrite, SeqLen


def command(
    folded: Annotated[str, typer.Argument(help="Folder that kvfold wrote.", show_default=False)],
    data: Annotated[str, typer.Option(help="Text to train on, as in compress.", show_default=False)],
    out: Annotated[str, typer.Option(help="Folder to write.", show_default=False)],
    teacher: Annotated[
        str | None, typer.Option(help="The original model (all objectives but ce).", show_default=False)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Recipes of the papers: `kvfold presets` lists them.", show_default=False)
    ] = None,
    objective: Annotated[str | None, typer.Option(help="kd (default), ce, mix or layers.", show_default=False)] = None,
    train: Annotated[
        str | None, typer.Option(help="attention (default), all, fold or lora.", show_default=False)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="To train on.", min=1, show_default="1,000,000")] = None,
    seq_len: SeqLen = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.", show_default="3e-4")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text to evaluate on during training.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="FIELD=VALUE of kvfold.Healing; wins over all else; repeatable.", show_default=False
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where checkpoints are kept (default OUT.heal).", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Train a folded model for a while, so that it forgets what folding took: uptraining, LoRA, distillation."""
    from kvfold.compression.recipe import assignments
    from kvfold.healing.heal import heal
    from kvfold.healing.recipe import make_healing
    from kvfold.report.tables import print_json

    fields: dict[str, Any] = {
        "folded": folded,
        "data": data,
        "out": out,
        "teacher": teacher,
        "preset": preset,
        "objective": objective,
    }
    fields |= {"train": train, "max_tokens": max_tokens, "seq_len": seq_len, "learning_rate": learning_rate}
    made = heal(
        make_healing(fields | {"eval_data": eval_data} | assignments(set_ or [])),
        run_dir=run_dir,
        overwrite=overwrite,
        device=device,
    )
    print_json(vars(made) | {"out": str(made.out)})
