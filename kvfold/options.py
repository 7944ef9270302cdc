"""Options that several commands of the command line have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Model folder, or model id on the hub.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")
]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens per sequence (default: the model's context, at most 2048).", min=2, show_default=False),
]


def numbers(text: str | None, option: str = "--keep-layers") -> list[int] | None:
    """`0,1` as a list; None as it is. `option` is named where that is no list of numbers."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers, such as 0,1", param_hint=option) from None
