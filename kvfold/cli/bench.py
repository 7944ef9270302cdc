"""`kvfold bench`: speed of folded models beside the original."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli.options import Device, Dtype, require
from kvfold.errors import RecipeError
from kvfold.evaluation.published_shapes import SHAPES
from kvfold.registry import names

FOLDERS = "Folders and the original"
SHAPE = "Instead of folders: a shape with random weights"
ENGINE = "An engine that answers requests"

Folders = Annotated[list[str] | None, typer.Argument(help="Folders that kvfold wrote.", show_default=False)]
Against = Annotated[str | None, typer.Option(help="The original model.", show_default=False)]
ShapeName = Annotated[str | None, typer.Option(help=", ".join(SHAPES), show_default=False, rich_help_panel=SHAPE)]
Layers = Annotated[int, typer.Option(help="Of that shape.", min=1, rich_help_panel=SHAPE)]
Presets = Annotated[
    list[str] | None,
    typer.Option(help="NAME or NAME:AXIS.FIELD=VALUE,...; repeatable.", show_default=False, rich_help_panel=SHAPE),
]
Heads = Annotated[
    list[int] | None,
    typer.Option(
        help="svd_a in so many heads of ordinary size; repeatable.", show_default=False, rich_help_panel=SHAPE
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="How many sequences fit into it: 24GB; of an engine the size of its cache (default 1GiB).",
        show_default=False,
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(names('runtimes'))}; vllm answers --batch requests of --context tokens, --steps tokens each.",
        rich_help_panel=ENGINE,
    ),
]
Turns = Annotated[
    int,
    typer.Option(
        help="How often every request comes, each time with its answer and 64 tokens more.",
        min=1,
        rich_help_panel=ENGINE,
    ),
]
Rounds = Annotated[int, typer.Option(help="How often every engine answers.", min=1, rich_help_panel=ENGINE)]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Compiled as `vllm serve` does: minutes per engine.", rich_help_panel=ENGINE)
]
Batched = Annotated[
    int | None,
    typer.Option(
        help="Prompt tokens of one step; the engine's own number if not given.",
        min=1,
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
Picture = Annotated[Path | None, typer.Option(help="Picture to write (.svg).", show_default=False)]
Markdown = Annotated[Path | None, typer.Option(help="Table to write (.md).", show_default=False)]


def command(
    ctx: typer.Context,
    folded: Folders = None,
    against: Against = None,
    shape: ShapeName = None,
    layers: Layers = 2,
    preset: Presets = None,
    kv_heads: Heads = None,
    batch: Annotated[int, typer.Option(help="Sequences that decode together.", min=1)] = 8,
    context: Annotated[str, typer.Option(help="Cached tokens of each: 2048, 8k.")] = "2048",
    steps: Annotated[int, typer.Option(help="Decode steps of each contestant.", min=1)] = 20,
    prefills: Annotated[int, typer.Option(help="Prompts of each contestant; 0 for none.", min=0)] = 3,
    memory: Memory = None,
    engine: EngineName = "transformers",
    turns: Turns = 1,
    rounds: Rounds = 3,
    compiled: Compiled = False,
    max_num_batched_tokens: Batched = None,
    threads: Annotated[int, typer.Option(help="On a CPU; 0 leaves it to torch.", min=0)] = 0,
    plot: Picture = None,
    markdown: Markdown = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure speed: first token, further tokens, bytes read, share of the memory bandwidth; all in turn in one run."""
    from kvfold.evaluation.geometries import Shape
    from kvfold.evaluation.memory import parse_size
    from kvfold.runtimes.base import runtime

    _make_folders(plot, markdown)
    if (against is None) == (shape is None) or bool(folded) != (shape is None):
        raise RecipeError("give folders and --against MODEL, or --shape NAME with --preset or --kv-heads.")
    require(ctx, shape, "--shape", "layers", "preset", "kv_heads")
    geometry = Shape(name=shape, layers=layers) if shape else None
    tokens = parse_size(context, binary=True)
    what: dict[str, Any] = {"presets": preset or (), "kv_heads": kv_heads or (), "against": against, "dtype": dtype}
    if not runtime(engine).measured_by:
        raise RecipeError(f"runtime {engine!r} says no way to be measured (measured_by).")
    if runtime(engine).measured_by == "requests":
        require(ctx, None, "--engine transformers", "threads", "device", "prefills")
        sizes: dict[str, Any] = {
            "requests": batch,
            "prompt": tokens,
            "tokens": steps,
            "turns": turns,
            "memory": parse_size(memory or "1GiB"),
            "compiled": compiled,
            "max_num_batched_tokens": max_num_batched_tokens,
        }
        _report(_requests(folded or [], geometry, **what, engine=engine, rounds=rounds, **sizes), plot, markdown)
        return
    require(ctx, None, "an --engine that serves requests", "compiled", "max_num_batched_tokens", "turns", "rounds")
    from kvfold.evaluation.speed import bench

    room = parse_size(memory) if memory else None
    sizes = {"batch": batch, "context": tokens, "steps": steps, "prefills": prefills, "threads": threads}
    found = bench(folded or (), shape=geometry, **what, **sizes, device=device, memory=room)
    _report(found, plot, markdown)


def _make_folders(*files: Path | None) -> None:
    """Before anything is measured."""
    from kvfold.checkpoint.atomic import make_folder

    for file in filter(None, files):
        make_folder(file.parent)


def _requests(
    folded: list[str],
    shape: Any,
    *,
    presets: list[str],
    kv_heads: list[int],
    against: str | None,
    dtype: str,
    **settings: Any,
) -> Any:
    """What an engine measures."""
    from kvfold.evaluation.speed import recipes_of
    from kvfold.evaluation.throughput import measure

    with _folders(folded, against, shape, recipes_of(presets, kv_heads), dtype) as folders:
        return measure(folders, dtype=dtype, facts=shape.facts() if shape else {}, **settings)


@contextmanager
def _folders(
    folded: list[str], against: str | None, shape: Any, recipes: Mapping[str, Any], dtype: str
) -> Iterator[dict[str, Path]]:
    """What an engine loads: the given folders, or those of a shape while they are needed."""
    from kvfold.checkpoint.folder import by_name
    from kvfold.evaluation.throughput import of_shape

    if shape is None:
        original = {"original": Path(f"{against}")}
        yield original | by_name(folded, taken=original)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield of_shape(shape, recipes, Path(scratch), "bfloat16" if dtype == "auto" else dtype)


def _report(found: Any, plot: Path | None, markdown: Path | None) -> None:
    from kvfold.checkpoint.atomic import write_text
    from kvfold.evaluation.throughput import ThroughputBenchmark
    from kvfold.report.plots import SVG, speed_plot, throughput_plot
    from kvfold.report.speed_tables import speed_table
    from kvfold.report.tables import STDOUT, print_json

    speed_table(found).show(STDOUT)
    if markdown:
        write_text(markdown, speed_table(found).markdown())
    if plot:
        drawn = throughput_plot(found) if isinstance(found, ThroughputBenchmark) else speed_plot(found)
        write_text(plot, SVG + drawn)
    print_json(found.to_json())
