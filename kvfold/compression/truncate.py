"""A folded model -> the same with fewer numbers per stored head: the trailing ones are cut off, nothing is solved again."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torch import Tensor

from kvfold.architectures.base import architecture, empty_model, source_config
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import new_folder, refuse_out, write_files, write_weights
from kvfold.checkpoint.reader import Checkpoint
from kvfold.errors import BudgetError, CheckpointError
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.nested import MULTIPLE, check_nested, kept_width
from kvfold.plan.plan import CachePlan
from kvfold.plan.rounding import SLACK
from kvfold.plan.tensors import Shape, tensor_shapes

CARD = """# {name}

`{source}` with the leading numbers of every stored head, {kv_budget:.4g} of the original cache ({before:.4g} before), by
`kvfold truncate`. What that costs was not measured here; after `kvfold heal --set elastic=...` it costs little.
"""


def truncate(folder: str | Path, out: str | Path, *, kv_budget: float, overwrite: bool = False) -> CachePlan:
    """Write `out`, in which every cache keeps the same share of its numbers, as many as `kv_budget` of the original's bytes
    allow. Returns its plan.

    Raises PlanError where the plan has no numbers that can be left out, BudgetError where the budget is not below what the
    folder has, or below 8 numbers per head.
    """
    checkpoint, out = Checkpoint.open(folder), Path(os.path.abspath(out))
    if CONFIG_KEY not in checkpoint.config:
        raise CheckpointError(f"{folder} is not a folded model; make one with `kvfold compress`.")
    plan = CachePlan.from_dict(checkpoint.config[CONFIG_KEY])
    check_nested(plan)
    narrow = narrowed(plan, kv_budget)
    refuse_out(out, overwrite, keep=(checkpoint.path,))
    identity = fingerprint(model=checkpoint.fingerprint(), plan=narrow.to_dict())
    shards = {name: stored.shard for name, stored in checkpoint.tensors.items()}
    config = checkpoint.config | {CONFIG_KEY: narrow.to_dict()}
    card = CARD.format(name=out.name, source=folder, kv_budget=narrow.kv_budget, before=plan.kv_budget)
    with new_folder(out, identity, overwrite=overwrite) as partial:
        write_weights(partial, shards, lambda names: _tensors(checkpoint, names, plan, narrow))
        write_files(partial, {"config.json": config, "README.md": card}, beside=checkpoint)
    return narrow


def narrowed(plan: CachePlan, kv_budget: float) -> CachePlan:
    """The widest plan with the same share of every stored head that keeps the budget. Raises BudgetError."""
    if kv_budget >= plan.kv_budget:
        raise BudgetError(f"kv_budget {kv_budget:.4g} is not below the {plan.kv_budget:.4g} that this model keeps now.")
    widths = {side.width for spec in plan.owned for side in spec.sides}
    shares = {(kept + 0.5) / width for width in widths for kept in range(MULTIPLE, width, MULTIPLE)}
    for share in sorted({0.0, *shares}, reverse=True):
        found = _at(plan, share)
        if found.kv_budget <= kv_budget * SLACK:
            return found
    raise BudgetError(
        f"kv_budget {kv_budget:.4g} is out of reach: {MULTIPLE} numbers per stored head take {found.kv_budget:.4g}."
    )


def _at(plan: CachePlan, share: float) -> CachePlan:
    caches = [spec and _narrower(spec, share) for spec in plan.caches]
    return dataclasses.replace(plan, caches=tuple(caches))


def _narrower(spec: CacheSpec, share: float) -> CacheSpec:
    keys, values = (kept_width(side.width, share) for side in spec.sides)
    return dataclasses.replace(spec, head_dim=keys, v_head_dim=values)


def _tensors(checkpoint: Checkpoint, names: list[str], plan: CachePlan, narrow: CachePlan) -> dict[str, Tensor]:
    """Of one shard; those of attention without what is cut off."""
    folded = _folded_layers(checkpoint)
    tensors = {}
    for name in names:
        tensors[name] = checkpoint.raw(name)  # codes stay codes
        for prefix, layer in folded.items():
            if name.startswith(prefix):
                spec, owns = plan.cache_of(layer.index), plan.owner(layer.index) == layer.index
                axes = tensor_shapes(layer, spec, owns=owns)[name.removeprefix(prefix)]
                tensors[name] = _cut(tensors[name], axes, narrow.cache_of(layer.index))
    return tensors


def _folded_layers(checkpoint: Checkpoint) -> dict[str, AttentionLayer]:
    """What the names of a folded layer's tensors begin with -> the facts of the layer."""
    arch = architecture(checkpoint.config["model_type"].removeprefix(MODEL_TYPE_PREFIX))
    layers = arch.describe(empty_model(arch, source_config(arch, checkpoint.config)))
    return {arch.attention_prefix(layer.index): layer for layer in layers}


def _cut(tensor: Tensor, axes: Shape, narrow: CacheSpec) -> Tensor:
    """A parameter of attention without the trailing numbers of every stored head."""
    kept = {"E": narrow.head_dim, "G": narrow.v_head_dim}
    for place, axis in enumerate(axes):
        if axis.width_letter in kept:
            per_head = tensor.unflatten(place, (axis.heads, axis.width))
            tensor = per_head.narrow(place + 1, 0, kept[axis.width_letter]).flatten(place, place + 1)
    return tensor.contiguous()
