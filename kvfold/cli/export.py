"""`kvfold export`: a checkpoint that needs no kvfold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli.options import CalibrationData, Device, KvBudget, NumSamples, RunDir, SeqLen, given

FORMATS = {
    "gqa": "the stock class with fewer key/value heads",
    "gguf": "the same, by llama.cpp's converter",
    "mla": "of an original model, DeepSeek's class, whose cache is a latent (--kv-budget, --data)",
}


def command(
    folder: Annotated[str, typer.Argument(help="Folder that kvfold wrote; for mla the original.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write, or file.", show_default=False)],
    format_: Annotated[
        str, typer.Option("--format", help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()) + ".")
    ] = "gqa",
    kv_budget: KvBudget = None,
    data: CalibrationData = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    run_dir: RunDir = None,
    runtime: Annotated[
        str | None, typer.Option(help="For mla, where they differ: transformers, or vllm.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    device: Device = "auto",
) -> None:
    """Write a checkpoint that loads without kvfold."""
    from kvfold.compression.export_gguf import export_gguf
    from kvfold.compression.export_gqa import export_gqa
    from kvfold.compression.export_mla import export_mla
    from kvfold.compression.recipe import parse_budget
    from kvfold.report.tables import print_json

    if format_ not in FORMATS:
        raise typer.BadParameter(f"{format_!r} is not a format; there are: {', '.join(FORMATS)}", param_hint="--format")
    asked = given({"data": data, "num_samples": num_samples, "seq_len": seq_len})
    if format_ != "mla":
        if asked or kv_budget or run_dir or runtime:
            raise typer.BadParameter(
                f"{format_} takes the folder as it is; --kv-budget, --data and --runtime go with --format mla"
            )
        heads = (export_gguf if format_ == "gguf" else export_gqa)(folder, out, overwrite=overwrite)
        print_json({"out": str(out), "format": format_, "num_key_value_heads": heads})
        return
    if kv_budget is None or data is None:
        raise typer.BadParameter("--format mla needs --kv-budget and --data (a text, or self)")
    where: dict[str, Any] = {"run_dir": run_dir, "runtime": runtime, "overwrite": overwrite, "device": device}
    numbers = export_mla(folder, out, kv_budget=parse_budget(kv_budget), calibration=asked, **where)
    print_json({"out": str(out), "format": format_, "numbers_per_token_and_layer": numbers})
