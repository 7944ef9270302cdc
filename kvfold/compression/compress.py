"""compress(recipe): checkpoint -> calibrate -> allocate -> fold, in that order. Start reading here."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold import distributed as processes
from kvfold.architectures.base import empty_model, source_config
from kvfold.calibration.calibrate import Statistics
from kvfold.calibration.forgetting import Choice, Forgetting
from kvfold.calibration.material import TRAINING_TOKENS, Material, layer_group
from kvfold.checkpoint.converted import converted
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import new_folder, refuse_out, write_files
from kvfold.checkpoint.reader import Checkpoint
from kvfold.checkpoint.source import Source, load_plan, open_source
from kvfold.compression.allocate import check_request, choose_layout
from kvfold.compression.card import write_card_text
from kvfold.compression.choose_plan import choose_plan, or_plain, warn_if_far_below
from kvfold.compression.fold import Folds, fold, folded_config, foreseeing
from kvfold.compression.prediction import Prediction
from kvfold.compression.probe import PROBE_VERSION, Probe
from kvfold.compression.recipe import Recipe, make_recipe, material_of
from kvfold.compression.request import Groups, Request, limits_of
from kvfold.compression.share_tokens import check_heads, check_tokens, of_shapes
from kvfold.compression.suit_width import suited
from kvfold.compression.widen_mlp import SIZE, widened_size
from kvfold.errors import RecipeError
from kvfold.methods.width.base import LayerGroup
from kvfold.plan.checks import check_sinks
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.base import runtime
from kvfold.runtimes.transformers.load import resolve_device
from kvfold.runtimes.transformers.modeling import empty_folded_model
from kvfold.version import __version__


@dataclass(frozen=True)
class Folded:
    """What `compress` made: the folder, its plan, how long each stage took in seconds, the numbers in attention's weights
    before and after, and whether the calibration text was read."""

    out: Path
    plan: CachePlan
    seconds: dict[str, float]
    parameters: tuple[int, int]
    calibrated: bool


def compress(
    recipe: Recipe | Mapping[str, Any],
    *,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    allow_pickle: bool = False,
) -> Folded:
    """Fold `recipe.model` (a folder, hub id, GGUF file or adapter) into the new folder `recipe.out`. A dictionary is taken as
    `make_recipe` takes it. allow_pickle: read pytorch_model.bin where there is nothing else.

    `run_dir` keeps the statistics for later folds of the same model and text (default: `<out>.run`). The result grows in
    `<out>.partial` and gets its name when it is complete; the same call continues an interrupted one. Under torchrun or
    accelerate launch the processes share the calibration text; all else is done by the first, for which the others wait.
    Raises a KvfoldError that says what was found and what to do.
    """
    if not isinstance(recipe, Recipe):
        recipe = make_recipe(recipe)
    out = Path(os.path.abspath(recipe.out))
    run_dir = Path(run_dir) if run_dir else Path(f"{out}.run")
    refuse_out(out, overwrite, keep=(Path(recipe.model), run_dir))
    device = processes.start(processes.own_device(resolve_device(device)))
    processes.wait_for_all()
    clock = _Clock()
    with processes.first_before_others():
        folder = converted(recipe.model, run_dir, allow_pickle=allow_pickle)
    source = open_source(folder)
    recipe = suited(recipe, source.layers)
    material = material_of(recipe, source, run_dir, device)
    request = _request(recipe, source, material)
    width, targets = request.axes.width, request.targets
    statistics = material.statistics(width.needs, width.needs_cross, targets, width.joint)
    vectors = material.sample(width.needs_vectors, TRAINING_TOKENS) if width.needs_vectors else None
    forgetting, forgotten_LCn = _forgetting(material, request.axes.length)
    clock.lap("calibrate")
    if processes.rank():
        processes.wait_for_all()
        plan = load_plan(out)[0]
        return Folded(Path(recipe.out), plan, clock.laps, _attention_parameters(source, plan), material.was_read)

    @functools.lru_cache(maxsize=1)  # keys and values of a group are asked for one after the other
    def groups(owner: int) -> LayerGroup:
        group = layer_group(source, targets, owner, statistics, width, vectors, recent=material.recent)
        return group if request.recent_of(group.owner) else group.of_recent

    probe = functools.cache(functools.partial(_probe, recipe, material, statistics, request, groups))
    plan = choose_plan(recipe, request, groups, probe, forgotten_LCn)
    recipe, request, plan = or_plain(recipe, request, plan, probe)
    warn_if_far_below(recipe, plan)
    if warning := runtime(recipe.runtime).warning(plan):
        warnings.warn(warning, stacklevel=2)
    clock.lap("allocate")
    config = _config(recipe, source, plan)
    with new_folder(out, _identity(recipe, source.checkpoint, plan, statistics), overwrite=overwrite) as partial:
        folds, parameters = _folds(request, groups, plan, forgetting), _attention_parameters(source, plan)
        fold(source.checkpoint, source.arch, source.layers, plan, folds, partial, config)
        _complete(partial, recipe, source, plan, parameters)
    clock.lap("fold")
    processes.wait_for_all()
    return Folded(Path(recipe.out), plan, clock.laps, parameters, material.was_read)


def _request(recipe: Recipe, source: Source, material: Material) -> Request:
    """What the recipe asks for, with the layout of owners and readers.

    Raises RecipeError and BudgetError where that cannot be, before anything takes long.
    """
    everyone = (None,) * len(source.layers)
    asked = Request(
        layers=source.layers,
        targets=everyone,
        axes=recipe.axes,
        dtype=source.dtype,
        limits=limits_of(recipe, material.num_samples * material.seq_len),
        context_len=recipe.context_len,
    )
    sample = material.sample() if asked.axes.depth.needs_sample else None
    asked, budget = of_shapes(asked, recipe.kv_budget)
    request = dataclasses.replace(asked, targets=choose_layout(asked, kv_budget=budget, sample=sample))
    check_tokens(request, recipe.kv_budget, in_nats=asked.axes.width.in_nats or recipe.allocate == "measured")
    check_heads(request)
    check_request(request, 1.0 if recipe.target_kl else budget)
    _check_runtime(recipe, request, source.checkpoint.config)
    if recipe.keep_parameters:
        if source.checkpoint.packed:
            raise RecipeError("keep_parameters widens MLPs, whose weights are quantized here; leave it out.")
        widened_size(source.arch, source.checkpoint.config, len(source.layers), 0)
    return request


def _check_runtime(recipe: Recipe, request: Request, config: Mapping[str, Any]) -> None:
    """Raise RecipeError or PlanError if what is asked for is not what the runtime serves, whatever the budget."""
    widest = request.plan({key: options[-1] for key, options in request.options.items()})
    for layer in request.layers:
        check_sinks(layer, widest.cache_of(layer.index))
    if obstacle := runtime(recipe.runtime).obstacle(widest, config):
        raise RecipeError(f"runtime {recipe.runtime!r}: {obstacle}")


def _folds(request: Request, groups: Groups, plan: CachePlan, forgetting: Forgetting | None) -> Folds:
    """How the plan's layers are folded."""
    folds = Prediction(groups, plan, request.axes.width).folded
    if forgetting is None or forgetting.worth_LCD is None:
        return folds
    return foreseeing(folds, plan, forgetting.worth_LCD)


def _forgetting(material: Material, length: Any) -> tuple[Forgetting | None, Tensor | None]:
    """What forgetting costs, as a method that drops tokens chooses them; and [L, K, n], by which it weighs heads."""
    if not (length.weighs_heads or length.foresees):
        return None, None
    found = material.forgetting(length.sinks, Choice(length.scorer, length.newest) if length.scorer else None)
    if length.competes:
        return found, found.missed_LCn
    return found, found.nats_LCn(length.recall) if length.weighs_heads else None


def _probe(
    recipe: Recipe, material: Material, statistics: Statistics | None, request: Request, groups: Groups
) -> Probe:
    tokens_BT, checkpoint = material.tokens(), material.source.checkpoint
    key = fingerprint(
        version=PROBE_VERSION,
        model=checkpoint.fingerprint(),
        tokens=tokens_BT,
        statistics=statistics and statistics.folder.name,
        width=recipe.to_dict()["width"],
        length=recipe.to_dict()["length"],
        targets=request.targets,
        device=material.device.partition(":")[0],
    )
    file = material.run_dir / f"probes-{key[:12]}.json"
    return Probe(material.source, request, groups, tokens_BT=tokens_BT, file=file, device=material.device)


def _identity(recipe: Recipe, checkpoint: Checkpoint, plan: CachePlan, statistics: Statistics | None) -> str:
    """Equal for two runs of the same fold, of which the second continues the first."""
    return fingerprint(
        version=__version__,
        recipe=recipe.to_yaml(),
        model=checkpoint.fingerprint(),
        statistics=statistics and statistics.folder.name,
        plan=plan.to_dict(),
    )


def _complete(partial: Path, recipe: Recipe, source: Source, plan: CachePlan, parameters: tuple[int, int]) -> None:
    """Add what belongs beside the weights: tokenizer, card, recipe."""
    card = write_card_text(
        recipe,
        plan,
        config=source.checkpoint.config,
        version=__version__,
        parameters=parameters,
    )
    write_files(partial, {"README.md": card, "recipe.yaml": recipe.to_yaml()}, beside=source.checkpoint)


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


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 3), now
