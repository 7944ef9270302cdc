"""`kvfold bench`: speed of folded models beside the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.benchmark import PREFILLS, bench
from kvfold.capacity import parse_size
from kvfold.drawing import SVG, speed_plot
from kvfold.errors import RecipeError
from kvfold.options import Device, Dtype
from kvfold.printing import benchmark_markdown, print_benchmark, print_json
from kvfold.shapes import SHAPES, Shape
from kvfold.storage import write_text


def bench_command(
    folded: Annotated[list[str] | None, typer.Argument(help="Folders that kvfold wrote.", show_default=False)] = None,
    against: Annotated[str | None, typer.Option(help="The original model.", show_default=False)] = None,
    shape: Annotated[
        str | None,
        typer.Option(help=f"Instead of folders: random weights of {', '.join(SHAPES)}.", show_default=False),
    ] = None,
    layers: Annotated[int, typer.Option(help="Of that shape.", min=1)] = 2,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="For that shape: NAME or NAME:AXIS.FIELD=VALUE,...; repeatable.", show_default=False),
    ] = None,
    kv_heads: Annotated[
        list[int] | None,
        typer.Option(help="For that shape: svd_a in so many heads of ordinary size; repeatable.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences that decode together.", min=1)] = 8,
    context: Annotated[str, typer.Option(help="Cached tokens of each: 2048, 8k.")] = "2048",
    steps: Annotated[int, typer.Option(help="Decode steps of each contestant.", min=1)] = 20,
    prefills: Annotated[int, typer.Option(help="Prompts of each contestant; 0 for none.", min=0)] = PREFILLS,
    threads: Annotated[int, typer.Option(help="On a CPU; 0 leaves it to torch.", min=0)] = 0,
    plot: Annotated[Path | None, typer.Option(help="Picture to write (.svg).", show_default=False)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Table to write (.md).", show_default=False)] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure speed: first token, further tokens, bytes read, share of the memory bandwidth; all in turn in one run."""
    if (against is None) == (shape is None) or bool(folded) != (shape is None):
        raise RecipeError("give folders and --against MODEL, or --shape NAME with --preset or --kv-heads.")
    found = bench(
        folded or (),
        against=against,
        shape=Shape(name=shape, layers=layers) if shape else None,
        presets=preset or (),
        kv_heads=kv_heads or (),
        batch=batch,
        context=parse_size(context, binary=True),
        steps=steps,
        prefills=prefills,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    print_benchmark(found)
    if markdown:
        write_text(markdown, benchmark_markdown(found))
    if plot:
        write_text(plot, SVG + speed_plot(found.rows))
    print_json(found.to_json())
