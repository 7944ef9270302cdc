"""compress(recipe): checkpoint -> calibrate -> allocate -> fold, in that order. Start reading here."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold import data
from kvfold.allocate import Axes, allocate, choose_layout
from kvfold.architectures.base import empty_model, source_config
from kvfold.calibrate import Statistics
from kvfold.card import write_card_text
from kvfold.checkpoint import Checkpoint, read_json
from kvfold.errors import OutputError
from kvfold.fold import fold, folded_config
from kvfold.gather import Material, layer_group
from kvfold.loading import Source, open_source, resolve_device
from kvfold.plan import CONFIG_KEY, CachePlan
from kvfold.recipe import Recipe, make_recipe
from kvfold.runtime.modeling import empty_folded_model
from kvfold.storage import copy_file, make_folder, write_text
from kvfold.version import __version__
from kvfold.widen import SIZE, widened_size
from kvfold.width.base import LayerGroup


@dataclass(frozen=True)
class Folded:
    """What `compress` made: the folder, its plan, and how long each stage took in seconds."""

    out: Path
    plan: CachePlan
    seconds: dict[str, float]


def compress(
    recipe: Recipe | Mapping[str, Any],
    *,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> Folded:
    """Fold `recipe.model` into the new folder `recipe.out`. A dictionary is taken as `make_recipe` takes it.

    `run_dir` keeps the statistics for later folds of the same model and text (default: `<out>.run`). The result grows in
    `<out>.partial` and gets its name when it is complete; the same call continues an interrupted one.
    Raises a KvfoldError that says what was found and what to do.
    """
    if not isinstance(recipe, Recipe):
        recipe = make_recipe(recipe)
    out = Path(os.path.abspath(recipe.out))
    run_dir = Path(run_dir) if run_dir else out.with_name(out.name + ".run")
    _refuse_out(out, overwrite, keep=(Path(recipe.model), run_dir))
    clock = _Clock()
    source = open_source(recipe.model)
    axes = Axes(**{axis: recipe.method(axis) for axis in ("depth", "width", "bits", "length")})
    material = Material(recipe, source, run_dir, resolve_device(device))
    targets = choose_layout(
        source.layers, axes, kv_budget=recipe.kv_budget, sample=material.sample() if axes.depth.needs_sample else None
    )
    statistics = material.statistics(axes.width.needs, axes.width.needs_cross, targets)
    clock.lap("calibrate")

    def groups(owner: int) -> LayerGroup:
        return layer_group(source, targets, owner, statistics, axes.width)

    plan = allocate(
        source.layers,
        targets,
        axes,
        kv_budget=recipe.kv_budget,
        dtype=source.dtype,
        strategy=recipe.allocate,
        groups=groups,
    )
    _warn_if_far_below(recipe, plan)
    clock.lap("allocate")
    partial = _partial_folder(out, recipe, source.checkpoint, plan, statistics)
    fold(
        source.checkpoint, source.arch, source.layers, plan, axes.width, groups, partial, _config(recipe, source, plan)
    )
    _complete(partial, recipe, source, plan)
    _publish(partial, out, overwrite)
    clock.lap("fold")
    return Folded(Path(recipe.out), plan, clock.laps)


def _refuse_out(out: Path, overwrite: bool, keep: tuple[Path, Path]) -> None:
    """Raise OutputError where writing `out` would destroy something: a file, the model, the run folder, a foreign folder."""
    for path in keep:
        if path.resolve().is_relative_to(out.resolve()):
            raise OutputError(f"--out {out} is or holds {path}, which is needed; give another folder.")
    if not out.exists():
        return
    if not overwrite:
        raise OutputError(f"{out} exists already. Give another --out, or --overwrite to replace it.")
    empty = out.is_dir() and not any(out.iterdir())
    if not empty and not ((out / "config.json").exists() and CONFIG_KEY in read_json(out / "config.json")):
        raise OutputError(f"{out} is not a folded model, so --overwrite does not replace it; remove it yourself.")


def _partial_folder(
    out: Path, recipe: Recipe, checkpoint: Checkpoint, plan: CachePlan, statistics: Statistics | None
) -> Path:
    """The folder in which the result grows: the one of an interrupted run of the same fold, or a new one."""
    partial = out.with_name(out.name + ".partial")
    calibrated = statistics.folder.name if statistics else "-"
    identity = "\n".join([__version__, recipe.to_yaml(), checkpoint.fingerprint(), calibrated, f"{plan.to_dict()}"])
    marker = partial / "fold.txt"
    if not marker.exists() or marker.read_text() != identity:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        write_text(marker, identity)
    return partial


def _complete(partial: Path, recipe: Recipe, source: Source, plan: CachePlan) -> None:
    """Add what belongs beside the weights: tokenizer, card, recipe."""
    for file in source.checkpoint.side_files():
        copy_file(file, partial / file.name)
    _name_tokenizer_class(source.checkpoint.path, partial / "tokenizer_config.json")
    card = write_card_text(recipe, plan, version=__version__, parameters=_attention_parameters(source, plan))
    write_text(partial / "README.md", card)
    write_text(partial / "recipe.yaml", recipe.to_yaml())


def _name_tokenizer_class(source: Path, config_file: Path) -> None:
    """AutoTokenizer corrects wrong class names by model type, which a folded model no longer has: write down its choice."""
    if not config_file.exists():
        return
    config, chosen = read_json(config_file), type(data.load_tokenizer(source)).__name__
    if config.get("tokenizer_class") != chosen:
        write_text(config_file, json.dumps(config | {"tokenizer_class": chosen}, indent=2, ensure_ascii=False) + "\n")


def _publish(partial: Path, out: Path, overwrite: bool) -> None:
    """Give the finished folder its name in one step."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out} appeared meanwhile; the finished model is in {partial}, apart from its name.")
    for leftover in (partial / "fold.txt", *partial.glob("*.unfinished")):
        leftover.unlink()
    replaced = out.with_name(out.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _config(recipe: Recipe, source: Source, plan: CachePlan) -> dict[str, Any]:
    """The folded model's config.json."""
    config = folded_config(source.checkpoint, source.arch, plan)
    if recipe.keep_parameters:
        before, after = _attention_parameters(source, plan)
        config[SIZE] = widened_size(source.arch, config, len(source.layers), before - after)
        if config[SIZE] == source.checkpoint.config[SIZE]:
            warnings.warn("keep_parameters: attention has as many parameters as before; the MLPs stay as they are.")
    return config


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
            f" {recipe.width['method']!r} has no size in between with these fields. Others, or --set allocate=greedy, may"
            " come nearer.",
            stacklevel=3,
        )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 3), now
