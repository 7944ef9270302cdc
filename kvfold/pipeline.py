"""compress(recipe): checkpoint -> calibrate -> allocate -> fold, in that order. Start reading here."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvfold import data
from kvfold.allocate import Axes, allocate
from kvfold.architectures.base import Architecture, architecture, empty_model, source_config
from kvfold.attention import AttentionLayer
from kvfold.calibrate import Statistics, calibrate
from kvfold.card import write_card_text
from kvfold.checkpoint import Checkpoint
from kvfold.errors import DataError, OutputError
from kvfold.fold import check_names, fold, folded_config, read_layer, source_dtype
from kvfold.linalg import Moment
from kvfold.plan import CachePlan
from kvfold.recipe import Recipe
from kvfold.runtime.modeling import empty_folded_model
from kvfold.storage import copy_file, write_tensors, write_text
from kvfold.version import __version__

MAX_SEQ_LEN = 2048


@dataclass(frozen=True)
class Folded:
    """What `compress` made: the folder, its plan, and how long each stage took in seconds."""

    out: Path
    plan: CachePlan
    seconds: dict[str, float]


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been opened and understood."""

    checkpoint: Checkpoint
    arch: Architecture
    layers: list[AttentionLayer]


def compress(
    recipe: Recipe, *, run_dir: str | Path | None = None, overwrite: bool = False, device: str = "auto"
) -> Folded:
    """Fold `recipe.model` into the new folder `recipe.out`.

    `run_dir` keeps the statistics for later folds of the same model and text (default: `<out>.run`). The result grows in
    `<out>.partial` and gets its name when it is complete; the same call continues an interrupted one.
    Raises a KvfoldError that says what was found and what to do.
    """
    out = Path(recipe.out)
    run_dir = Path(run_dir) if run_dir else out.with_name(out.name + ".run")
    _refuse_existing(out, overwrite, Path(recipe.model))
    clock = _Clock()
    source = open_source(recipe.model)
    axes = Axes(**{axis: recipe.method(axis) for axis in ("depth", "width", "bits", "length")})
    statistics = gather(recipe, source, axes.width.needs, run_dir, resolve_device(device))
    clock.lap("calibrate")

    def moments_of(index: int) -> Mapping[str, Moment]:
        return statistics.layer(index, axes.width.needs) if statistics else {}

    plan = allocate(
        source.layers,
        axes,
        kv_budget=recipe.kv_budget,
        dtype=source_dtype(source.checkpoint, source.arch, source.layers[0]),
        strategy=recipe.allocate,
        inputs=lambda i: (read_layer(source.checkpoint, source.arch, source.layers[i]), moments_of(i)),
    )
    _warn_if_far_below(recipe, plan)
    clock.lap("allocate")
    partial = _partial_folder(out, recipe, source.checkpoint, plan)
    fold(source.checkpoint, source.arch, source.layers, plan, axes.width, moments_of, partial)
    _finish(partial, out, recipe, source, plan)
    clock.lap("fold")
    return Folded(out, plan, clock.laps)


def open_source(model: str | Path) -> Source:
    """Open a checkpoint and read the facts of its layers. Raises CheckpointError before any work is done."""
    checkpoint = Checkpoint.open(model)
    arch = architecture(checkpoint.config.get("model_type", "(none)"))
    stock = empty_model(arch, source_config(arch, checkpoint.config))
    check_names(checkpoint, stock)
    return Source(checkpoint, arch, arch.describe(stock))


def gather(
    recipe: Recipe, source: Source, needs: frozenset[str], run_dir: Path, device: str = "cpu"
) -> Statistics | None:
    """The statistics that a method needs, calibrated now or reused; None if it needs none."""
    if not needs:
        return None
    if recipe.calibration.data is None:
        raise DataError(
            f"width method {recipe.width['method']!r} needs calibration text: give --data FILE, a data set name, or"
            " `--data self` (the model samples its own)."
        )
    tokens_BT = _calibration_tokens(recipe, source, run_dir, device)
    return calibrate(source.checkpoint, source.arch, tokens_BT, needs=needs, run_dir=run_dir, device=device)


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _calibration_tokens(recipe: Recipe, source: Source, run_dir: Path, device: str) -> Tensor:
    calibration = recipe.calibration
    context = source.checkpoint.config.get("max_position_embeddings", MAX_SEQ_LEN)
    size: dict[str, Any] = {
        "num_samples": calibration.num_samples,
        "seq_len": calibration.seq_len or min(MAX_SEQ_LEN, context),
        "seed": recipe.seed,
    }
    if calibration.data == "self":
        return self_sampled(source, run_dir, device=device, **size)
    assert calibration.data is not None
    return data.sequences(
        data.load_tokenizer(source.checkpoint.path),
        calibration.data,
        config=calibration.config,
        split=calibration.split,
        text_field=calibration.text_field,
        **size,
    )


def self_sampled(source: Source, run_dir: Path, *, num_samples: int, seq_len: int, seed: int, device: str) -> Tensor:
    """[num_samples, seq_len] tokens that the original model draws; kept in `run_dir`, since drawing them takes long."""
    file = run_dir / f"samples-{source.checkpoint.fingerprint()}-{num_samples}x{seq_len}-{seed}.safetensors"
    if not file.exists():
        model = source.arch.model_class.from_pretrained(source.checkpoint.path, dtype="auto").to(device).eval()
        tokens_BT = data.sample_from_model(model, num_samples=num_samples, seq_len=seq_len, seed=seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"tokens": tokens_BT}, {})
    return load_file(file)["tokens"]


def _refuse_existing(out: Path, overwrite: bool, model: Path) -> None:
    if out.exists() and model.exists() and out.samefile(model):
        raise OutputError(f"--out {out} is the model itself; give another folder.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists already. Give another --out, or --overwrite to replace it.")


def _partial_folder(out: Path, recipe: Recipe, checkpoint: Checkpoint, plan: CachePlan) -> Path:
    """The folder in which the result grows: the one of an interrupted run of the same fold, or a new one."""
    partial = out.with_name(out.name + ".partial")
    identity = f"{recipe.to_yaml()}\n{checkpoint.fingerprint()}\n{plan.to_dict()}\n"
    marker = partial / "fold.txt"
    if not marker.exists() or marker.read_text() != identity:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(marker, identity)
    return partial


def _finish(partial: Path, out: Path, recipe: Recipe, source: Source, plan: CachePlan) -> None:
    """Add what belongs beside the weights, and give the folder its name in one step."""
    for file in source.checkpoint.side_files():
        copy_file(file, partial / file.name)
    card = write_card_text(recipe, plan, version=__version__, parameters=_attention_parameters(source, plan))
    write_text(partial / "README.md", card)
    write_text(partial / "recipe.yaml", recipe.to_yaml())
    (partial / "fold.txt").unlink()
    replaced = out.with_name(out.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _attention_parameters(source: Source, plan: CachePlan) -> tuple[int, int]:
    """Numbers in the attention weights, before and after."""
    prefixes = tuple(source.arch.attention_prefix(layer.index) for layer in source.layers)
    stock = empty_model(source.arch, source_config(source.arch, source.checkpoint.config))
    folded = empty_folded_model(source.arch, folded_config(source.checkpoint, source.arch, plan))
    before, after = (
        sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes)) for model in (stock, folded)
    )
    return before, after


def _warn_if_far_below(recipe: Recipe, plan: CachePlan) -> None:
    if recipe.kv_budget is not None and plan.kv_budget < 0.95 * recipe.kv_budget:
        warnings.warn(
            f"kv_budget {recipe.kv_budget:.4g} was asked for and {plan.kv_budget:.4g} is used: the method"
            f" {recipe.width['method']!r} has no size in between.",
            stacklevel=3,
        )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 3), now
