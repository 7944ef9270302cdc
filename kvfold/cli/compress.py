"""`kvfold compress`: fold a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfold.cli.options import (
    AllowPickle,
    CalibrationData,
    Context,
    Device,
    KeepLayers,
    KeepParameters,
    KvBudget,
    KvHeads,
    MinWidth,
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
    given,
    integers,
)
from kvfold.progress import STDERR
from kvfold.registry import AXES

if TYPE_CHECKING:
    from kvfold.compression.compress import Folded

ALONE = (
    "A method that is named leaves the default preset aside: axes that are not named stay as they are, bits and recent tokens"
    " too. --preset auto beside it keeps the others of the default."
)


def command(
    model: OptionalModel = None,
    kv_budget: KvBudget = None,
    data: CalibrationData = None,
    out: Out = None,
    preset: PresetName = None,
    runtime: Runtime = None,
    device: Device = "auto",
    context: Context = None,
    target_kl: TargetKl = None,
    prefer: Prefer = None,
    keep_layers: KeepLayers = None,
    min_width: MinWidth = None,
    owners: Owners = None,
    kv_heads: KvHeads = None,
    keep_parameters: KeepParameters = False,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    select: Select = None,
    seed: Seed = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    run_dir: RunDir = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Fold a model: read it, calibrate, plan, and write a new folder with a smaller cache."""
    from kvfold.compression.compress import compress
    from kvfold.compression.recipe import load_recipe, make_recipe

    fields: dict[str, Any] = {"model": model, "out": out, "preset": preset, "kv_budget": kv_budget, "seed": seed}
    fields |= {"context_len": context, "target_kl": target_kl, "runtime": runtime, "prefer": prefer}
    fields |= {"min_width": min_width, "keep_layers": integers(keep_layers)}
    calibration = {"data": data, "num_samples": num_samples, "seq_len": seq_len, "select": select}
    tree = load_recipe(recipe) if recipe else {}
    if preset:  # a preset is a point on all axes: it replaces those of the recipe
        tree = {name: value for name, value in tree.items() if name not in AXES}
    tree |= given(fields) | ({"keep_parameters": True} if keep_parameters else {})
    for axis, of_axis in (
        ("calibration", calibration),
        ("depth", {"owners": owners}),
        ("width", {"kv_heads": kv_heads}),
    ):
        if given_of_axis := given(of_axis):
            known = tree.get(axis) or {}
            tree[axis] = known | given_of_axis if isinstance(known, dict) else known  # which make_recipe refuses
    where: dict[str, Any] = {"run_dir": run_dir, "overwrite": overwrite, "device": device}
    asked = make_recipe(tree, set_ or [])
    if asked.preset is None and not recipe:
        STDERR.print(ALONE)
    made = compress(asked, allow_pickle=allow_pickle, **where)
    if given(calibration) and not made.calibrated:
        STDERR.print("This method needs no calibration: the text and what was said of it were not read.")
    _show(made)


def _show(made: Folded) -> None:
    """The plan as a table for people, then one JSON line."""
    from kvfold.report.tables import print_json, print_parameters, print_plan

    print_plan(made.plan, f"{made.out}")
    print_parameters(made.plan, *made.parameters)
    print_json(
        {
            "out": str(made.out),
            "kv_budget": made.plan.kv_budget,
            "kv_bytes_per_token": made.plan.kv_bytes_per_token(),
            "base_kv_bytes_per_token": made.plan.source_kv_bytes_per_token(),
            "attention_parameters": made.parameters,
            "seconds": made.seconds,
        }
    )
