"""`kvfold compare`: presets side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.options import Device, Model, NumSamples, SeqLen, given, require


def command(
    ctx: typer.Context,
    model: Model,
    preset: Annotated[
        list[str], typer.Option(help="NAME or NAME:AXIS.FIELD=VALUE,...; repeatable.", show_default=False)
    ],
    kv_budget: Annotated[list[str], typer.Option(help="0.5 or 1/2; repeatable.", show_default=False)],
    data: Annotated[str, typer.Option(help="Calibration text, as in compress.")] = "self",
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(help="Text to evaluate on (default: the model samples it); repeatable.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for models, table and report.")] = Path("comparison"),
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    max_tokens: Annotated[int, typer.Option(help="Evaluate on at most this many tokens.", min=2)] = 8192,
    prompt: Annotated[str, typer.Option(help="Text that all models continue.")] = "The",
    context: Annotated[
        int,
        typer.Option(
            help="Ask as well what a cache still knows of so many tokens of the first --eval-data, as evaluate --context;"
            " bytes are counted over as many.",
            min=0,
        ),
    ] = 0,
    sequences: Annotated[int, typer.Option(help="Contexts of --context.", min=2)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of calibration and evaluation.")] = 0,
    device: Device = "auto",
) -> None:
    """Fold with several presets at several budgets, and measure them side by side."""
    from kvfold.compression.recipe import parse_budget
    from kvfold.evaluation.compare import compare
    from kvfold.report.tables import print_comparison

    require(ctx, context, "--context", "sequences")
    found = compare(
        model,
        presets=preset,
        budgets=[parse_budget(b) for b in kv_budget],
        calibration=given({"data": data, "num_samples": num_samples, "seq_len": seq_len}),
        out=out,
        eval_files=eval_data or (),
        max_tokens=max_tokens,
        prompt=prompt,
        context=context,
        sequences=sequences,
        seed=seed,
        device=device,
    )
    print_comparison(found, out)
