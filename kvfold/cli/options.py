"""Options that several commands share, and what the help says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.registry import names

SHAPE, TEXT, RUN = "What is kept", "Calibration", "The run"
"""Panels of the help; what most people need stands before them."""


def _option(help_: str, *flags: str, panel: str | None = None, **more: Any) -> Any:
    """Of an option whose default is said in its help, or is nothing."""
    return typer.Option(*flags, help=help_, rich_help_panel=panel, **({"show_default": False} | more))


Model = Annotated[str, typer.Argument(help="Model folder, or model id on the hub.", show_default=False)]
OptionalModel = Annotated[
    str | None, typer.Argument(help="Model folder, model id on the hub, or a GGUF file.", show_default=False)
]
KvBudget = Annotated[str | None, _option("Bytes kept / the original cache's: 0.25 or 1/4.")]
Context = Annotated[
    int | None,
    _option("Tokens of a sequence over which bytes are counted.", min=1, panel="What is kept", show_default="2,048"),
]
CalibrationData = Annotated[
    str | None, _option("Text to calibrate on: a file, a data set, or self (the model samples it).")
]
Out = Annotated[str | None, _option("Folder to write.")]
PresetName = Annotated[str | None, _option("A method by name: `kvfold presets` lists them.", show_default="auto")]
Runtime = Annotated[
    str | None,
    _option(f"{', '.join(names('runtimes'))}: only plans that it serves are made.", show_default="transformers"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")
]

TargetKl = Annotated[float | None, _option("Instead of a budget: lose at most so many nats per token.", panel=SHAPE)]
Prefer = Annotated[str | None, _option("size: keys rebuilt on read; speed: keys read as they lie (auto).", panel=SHAPE)]
KeepLayers = Annotated[str | None, _option("Layers left as they are: 0,1,31.", panel=SHAPE)]
MinWidth = Annotated[
    float | None, _option("Of a layer's numbers, the least share to store.", min=0, max=1, panel=SHAPE)
]
Owners = Annotated[int | None, _option("Layers that keep a cache (mlkv, cla, shared).", min=1, panel=SHAPE)]
KvHeads = Annotated[int | None, _option("Key/value heads per cache, or as many numbers.", min=1, panel=SHAPE)]
KeepParameters = Annotated[bool, _option("Widen the MLPs by what attention saves.", "--keep-parameters", panel=SHAPE)]

NumSamples = Annotated[int | None, _option("Sequences (default 64; 16 of rotated keys).", min=1, panel=TEXT)]
SeqLen = Annotated[int | None, _option("Tokens of each (default 256; 1,024 of rotated keys).", min=2, panel=TEXT)]
Select = Annotated[str | None, _option("random (default), or diverse ones out of more.", panel=TEXT, hidden=True)]
Seed = Annotated[int | None, _option("Of calibration (default 0).", panel=TEXT)]

RecipeFile = Annotated[Path | None, _option("YAML recipe; options given here win.", panel=RUN)]
Sets = Annotated[
    list[str] | None, _option("AXIS.FIELD=VALUE, any field of any method; wins; repeatable.", "--set", panel=RUN)
]
RunDir = Annotated[Path | None, _option("Statistics, kept for reuse (default OUT.run).", panel=RUN)]
Overwrite = Annotated[bool, _option("Replace OUT if it exists.", "--overwrite", panel=RUN)]
AllowPickle = Annotated[
    bool, _option("Read pytorch_model.bin where a folder has nothing else.", "--allow-pickle", panel=RUN)
]


def integers(text: str | None, option: str = "--keep-layers") -> list[int] | None:
    """`0,1` as a list; None as it is. `option` is named where that is no list of numbers."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers, such as 0,1", param_hint=option) from None


def require(ctx: typer.Context, wanted: Any, what: str, *names: str) -> None:
    """Raise typer.BadParameter where options were given that say nothing unless `what` was `wanted` too."""
    lonely = [name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if lonely and not wanted:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in lonely)
        raise typer.BadParameter(f"{options} {'goes' if len(lonely) == 1 else 'go'} with {what}")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in values.items() if value is not None}
