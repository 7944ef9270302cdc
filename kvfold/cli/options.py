"""Options that several commands share, and what the help says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.compression.presets import MLKV_PAPER, PRESETS
from kvfold.registry import names

Model = Annotated[str, typer.Argument(help="Model folder, or model id on the hub.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        help="Calibration sequences (default 64; 16 where keys are stored after rotation).", min=1, show_default=False
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of each (default 256; 1,024 where keys are stored after rotation).", min=2, show_default=False
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of calibration (default 0).", show_default=False)]
PRESET_HELP = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items() if name not in MLKV_PAPER)
PRESET_HELP += f"; {', '.join(MLKV_PAPER)}: the configurations of arXiv 2406.09297 for 12 layers of 12 heads"


OptionalModel = Annotated[
    str | None, typer.Argument(help="Model folder, model id on the hub, or a GGUF file.", show_default=False)
]
PresetName = Annotated[str | None, typer.Option(help=PRESET_HELP, show_default="auto")]
KvBudget = Annotated[
    str | None, typer.Option(help="Bytes kept / bytes of the original cache: 0.25 or 1/4.", show_default=False)
]
TargetKl = Annotated[
    float | None,
    typer.Option(
        help="Instead of a budget: the smallest cache that loses at most so much (nats per token).",
        show_default=False,
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        help=f"What will read the cache: {', '.join(names('runtimes'))}; for vllm only plans that it serves are made.",
        show_default="transformers",
    ),
]
Prefer = Annotated[
    str | None,
    typer.Option(help="size: keys rebuilt on read; speed: keys read as they lie (auto).", show_default=False),
]
KeepLayers = Annotated[
    str | None, typer.Option(help="Layers that store every number as it is: 0,1,31.", show_default=False)
]
MinWidth = Annotated[
    float | None,
    typer.Option(help="The least share of a layer's numbers to store.", min=0, max=1, show_default=False),
]
Owners = Annotated[
    int | None,
    typer.Option(
        help="Layers that keep a cache (mlkv, cla, shared); the others read theirs.", min=1, show_default=False
    ),
]
KvHeads = Annotated[
    int | None, typer.Option(help="Key/value heads per cache, or as many numbers.", min=1, show_default=False)
]
CalibrationData = Annotated[
    str | None,
    typer.Option(help="Calibration text: .txt, .jsonl, .parquet, a data set name, or self.", show_default=False),
]
Out = Annotated[str | None, typer.Option(help="Folder to write.", show_default=False)]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML recipe; options given here win.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="AXIS.FIELD=VALUE, any field of any method; wins over all else; repeatable.",
        show_default=False,
    ),
]
Select = Annotated[
    str | None,
    typer.Option(help="Calibration sequences: random (default), or diverse ones out of more.", show_default=False),
]
KeepParameters = Annotated[
    bool,
    typer.Option("--keep-parameters", help="Widen the MLPs by what attention saves; their function stays the same."),
]
RunDir = Annotated[
    Path | None, typer.Option(help="Where statistics are kept for reuse (default OUT.run).", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


def numbers(text: str | None, option: str = "--keep-layers") -> list[int] | None:
    """`0,1` as a list; None as it is. `option` is named where that is no list of numbers."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers, such as 0,1", param_hint=option) from None


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in values.items() if value is not None}
