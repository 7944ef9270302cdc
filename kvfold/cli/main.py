"""The command line: one sub-command per stage. Tables for people, one JSON line last for programs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli.bench import bench_command
from kvfold.cli.evaluate import evaluate_command
from kvfold.cli.heal import heal_command
from kvfold.cli.options import (
    CalibrationData,
    Device,
    Dtype,
    KeepLayers,
    KeepParameters,
    KvBudget,
    KvHeads,
    MinWidth,
    Model,
    NumSamples,
    OptionalModel,
    Out,
    Overwrite,
    Owners,
    Prefer,
    PresetName,
    RecipeFile,
    RunDir,
    Runtime,
    Seed,
    Select,
    SeqLen,
    Sets,
    TargetKl,
    numbers,
)
from kvfold.compression.compress import compress
from kvfold.compression.export_gqa import export_gqa
from kvfold.compression.import_mlkv import import_mlkv
from kvfold.compression.recipe import load_recipe, make_recipe, parse_budget
from kvfold.compression.truncate import truncate
from kvfold.errors import KvfoldError, RecipeError
from kvfold.evaluation.compare import compare
from kvfold.evaluation.demo import demo
from kvfold.evaluation.generate import generate
from kvfold.evaluation.inspection import Inspection, inspect
from kvfold.evaluation.memory import capacity, parse_size
from kvfold.progress import STDERR
from kvfold.registry import AXES
from kvfold.report.tables import STDOUT, print_capacity, print_comparison, print_json, print_plan
from kvfold.version import __version__

app = typer.Typer(
    help="Make the KV cache of a pretrained decoder smaller, and tell the truth about bytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("compress")
def compress_command(
    model: OptionalModel = None,
    preset: PresetName = None,
    kv_budget: KvBudget = None,
    target_kl: TargetKl = None,
    runtime: Runtime = None,
    prefer: Prefer = None,
    keep_layers: KeepLayers = None,
    min_width: MinWidth = None,
    owners: Owners = None,
    kv_heads: KvHeads = None,
    data: CalibrationData = None,
    out: Out = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    select: Select = None,
    seed: Seed = None,
    keep_parameters: KeepParameters = False,
    run_dir: RunDir = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Fold a model: read it, calibrate, plan, and write a new folder with a smaller cache."""
    given: dict[str, Any] = {"model": model, "out": out, "preset": preset, "kv_budget": kv_budget, "seed": seed}
    given |= {
        "target_kl": target_kl,
        "runtime": runtime,
        "prefer": prefer,
        "min_width": min_width,
        "keep_layers": numbers(keep_layers),
    }
    calibration = {"data": data, "num_samples": num_samples, "seq_len": seq_len, "select": select}
    tree = load_recipe(recipe) if recipe else {}
    if preset:  # a preset is a point on all axes: it replaces those of the recipe
        tree = {name: value for name, value in tree.items() if name not in AXES}
    tree |= _given(given) | ({"keep_parameters": True} if keep_parameters else {})
    for axis, fields in (
        ("calibration", calibration),
        ("depth", {"owners": owners}),
        ("width", {"kv_heads": kv_heads}),
    ):
        if given_fields := _given(fields):
            tree[axis] = (tree.get(axis) or {}) | given_fields
    made = compress(make_recipe(tree, set_ or []), run_dir=run_dir, overwrite=overwrite, device=device)
    print_plan(made.plan, f"{made.out}")
    print_json(
        {
            "out": str(made.out),
            "kv_budget": made.plan.kv_budget,
            "kv_bytes_per_token": made.plan.kv_bytes_per_token(),
            "base_kv_bytes_per_token": made.plan.source_kv_bytes_per_token(),
            "seconds": made.seconds,
        }
    )


@app.command("import-mlkv")
def import_mlkv_command(
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
    plan = import_mlkv(model, out, as_trained=as_trained, allow_pickle=allow_pickle, overwrite=overwrite)
    print_plan(plan, f"{out}")
    print_json({"out": str(out), "kv_budget": plan.kv_budget, "kv_bytes_per_token": plan.kv_bytes_per_token()})


@app.command("export")
def export_command(
    folder: Annotated[str, typer.Argument(help="Folder that kvfold wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help="gqa: the stock class with fewer key/value heads.")] = "gqa",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint that loads without kvfold."""
    if format_ != "gqa":
        raise typer.BadParameter(f"{format_!r} is not a format; there is: gqa", param_hint="--format")
    heads = export_gqa(folder, out, overwrite=overwrite)
    print_json({"out": str(out), "format": format_, "num_key_value_heads": heads})


@app.command("truncate")
def truncate_command(
    folder: Annotated[str, typer.Argument(help="Folder that kvfold wrote.", show_default=False)],
    kv_budget: Annotated[str, typer.Option(help="Below what the folder keeps now: 0.125 or 1/8.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Cut the trailing numbers of every stored head off; best after `heal --set elastic=0.25`."""
    plan = truncate(folder, out, kv_budget=parse_budget(kv_budget), overwrite=overwrite)
    print_plan(plan, f"{out}")
    print_json({"out": str(out), "kv_budget": plan.kv_budget, "kv_bytes_per_token": plan.kv_bytes_per_token()})


@app.command("inspect")
def inspect_command(
    model: Model,
    memory: Annotated[str | None, typer.Option(help="How many sequences fit: 80GB, 24GiB.", show_default=False)] = None,
    context: Annotated[str, typer.Option(help="Tokens per sequence for that: 32k or 32768.")] = "32k",
    sequences: Annotated[int | None, typer.Option(help="Which budget so many need.", min=1, show_default=False)] = None,
) -> None:
    """Show what a model's cache takes, layer by layer, and how many sequences fit into a memory."""
    found: Inspection = inspect(model)
    print_plan(found.plan, model)
    for runtime, obstacle in found.plan.servable_by().items():
        STDOUT.print(f"served by {runtime}: {'yes' if obstacle is None else f'no, {obstacle}'}")
    if sequences and not memory:
        raise RecipeError("--sequences goes with --memory.")
    fitting = memory and capacity(
        model, memory=parse_size(memory), context=parse_size(context, binary=True), wanted=sequences
    )
    if fitting:
        print_capacity(fitting)
    print_json(found.to_json() | ({"capacity": fitting.to_json()} if fitting else {}))


app.command("evaluate")(evaluate_command)


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling.", min=1e-3)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt."""
    made = generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sample=sample,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    STDOUT.print(prompt, style="bold", end="", markup=False, highlight=False)
    STDOUT.print(made.text, markup=False, highlight=False)
    print_json(vars(made))


app.command("heal")(heal_command)
app.command("bench")(bench_command)


@app.command("compare")
def compare_command(
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
    seed: Annotated[int, typer.Option(help="Seed of calibration and evaluation.")] = 0,
    device: Device = "auto",
) -> None:
    """Fold with several presets at several budgets, and measure them side by side."""
    found = compare(
        model,
        presets=preset,
        budgets=[parse_budget(b) for b in kv_budget],
        calibration=_given({"data": data, "num_samples": num_samples, "seq_len": seq_len}),
        out=out,
        eval_files=eval_data or (),
        max_tokens=max_tokens,
        prompt=prompt,
        seed=seed,
        device=device,
    )
    print_comparison(found, out)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for models, table and report.")] = Path("demo"),
    device: Device = "auto",
) -> None:
    """Fold the packaged model with several presets and budgets; write a report. Takes a few minutes."""
    print_comparison(demo(out, device=device), out)


@app.command("version")
def version_command() -> None:
    """Show the version."""
    print_json({"version": __version__})


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except KvfoldError as error:
        STDERR.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        STDERR.print(str(error), markup=False, highlight=False)
        sys.exit(1)


def _show_warning(message: Any, category: type, *_: Any, **__: Any) -> None:
    STDERR.print("[yellow]warning:[/] ", end="")
    STDERR.print(str(message), markup=False, highlight=False)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    main()
