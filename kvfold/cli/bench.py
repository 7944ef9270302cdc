"""`kvfold bench`: speed of folded models beside the original."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvfold.checkpoint.atomic import write_text
from kvfold.cli.options import Device, Dtype
from kvfold.compression.recipe import Recipe
from kvfold.errors import RecipeError
from kvfold.evaluation.geometries import SHAPES, Shape
from kvfold.evaluation.memory import parse_size
from kvfold.evaluation.speed import PREFILLS, Benchmark, bench, recipes_of
from kvfold.evaluation.throughput import ThroughputBenchmark, measure, of_shape
from kvfold.registry import unknown
from kvfold.report.plots import SVG, speed_plot, throughput_plot
from kvfold.report.speed_tables import speed_table
from kvfold.report.tables import STDOUT, print_json
from kvfold.runtimes.vllm.limits import RUNTIMES


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
    memory: Annotated[
        str | None,
        typer.Option(
            help="How many sequences fit into it: 24GB; with --engine vllm the size of the cache (default 1GiB).",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="transformers, or vllm: --batch requests of --context tokens at once, --steps tokens for each of them."
        ),
    ] = "transformers",
    rounds: Annotated[int, typer.Option(help="With --engine vllm: how often every engine answers.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="On a CPU; 0 leaves it to torch.", min=0)] = 0,
    plot: Annotated[Path | None, typer.Option(help="Picture to write (.svg).", show_default=False)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Table to write (.md).", show_default=False)] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure speed: first token, further tokens, bytes read, share of the memory bandwidth; all in turn in one run."""
    if (against is None) == (shape is None) or bool(folded) != (shape is None):
        raise RecipeError("give folders and --against MODEL, or --shape NAME with --preset or --kv-heads.")
    if engine not in RUNTIMES:
        raise RecipeError(unknown("engine", engine, RUNTIMES))
    if engine == "vllm" and (threads or device != "auto"):
        raise RecipeError(
            "--engine vllm goes without --threads and --device: vLLM takes the device that it was built for."
        )
    geometry = Shape(name=shape, layers=layers) if shape else None
    tokens = parse_size(context, binary=True)
    found: Benchmark | ThroughputBenchmark
    if engine == "vllm":
        sizes = {"requests": batch, "prompt": tokens, "tokens": steps, "memory": parse_size(memory or "1GiB")}
        with _folders(folded, against, geometry, recipes_of(preset or (), kv_heads or ()), dtype) as folders:
            found = measure(folders, **sizes, rounds=rounds, dtype=dtype, facts=geometry.facts() if geometry else {})
    else:
        found = bench(
            folded or (),
            against=against,
            shape=geometry,
            presets=preset or (),
            kv_heads=kv_heads or (),
            batch=batch,
            context=tokens,
            steps=steps,
            prefills=prefills,
            threads=threads,
            dtype=dtype,
            device=device,
            memory=parse_size(memory) if memory else None,
        )
    speed_table(found).show(STDOUT)
    if markdown:
        write_text(markdown, speed_table(found).markdown())
    if plot:
        drawn = throughput_plot(found) if isinstance(found, ThroughputBenchmark) else speed_plot(found)
        write_text(plot, SVG + drawn)
    print_json(found.to_json())


@contextmanager
def _folders(
    folded: list[str] | None, against: str | None, shape: Shape | None, recipes: Mapping[str, Recipe], dtype: str
) -> Iterator[dict[str, Path]]:
    """What vLLM loads: the given folders, or those of a shape while they are needed."""
    if shape is None:
        yield {"original": Path(f"{against}")} | {Path(folder).name: Path(folder) for folder in folded or ()}
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield of_shape(shape, recipes, Path(scratch), "bfloat16" if dtype == "auto" else dtype)
