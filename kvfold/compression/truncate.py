"""A folded model -> the same with fewer numbers per stored head: the trailing ones are cut off, nothing is solved again."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from torch import Tensor

from kvfold.architectures.base import architecture
from kvfold.checkpoint.atomic import write_text
from kvfold.checkpoint.folder import copy_side_files, partial_folder, publish, refuse_out, write_weights
from kvfold.checkpoint.reader import Checkpoint
from kvfold.compression.allocate import SLACK
from kvfold.errors import BudgetError, CheckpointError
from kvfold.healing.elastic import MULTIPLE, check_nested, kept_width
from kvfold.plan.plan import CONFIG_KEY, CachePlan, CacheSpec
from kvfold.runtimes.transformers.modeling import MODEL_TYPE_PREFIX

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
    partial = partial_folder(out, f"{checkpoint.fingerprint()} {narrow.to_dict()}")
    shards = {name: stored.shard for name, stored in checkpoint.tensors.items()}
    write_weights(partial, shards, lambda names: _tensors(checkpoint, names, plan, narrow))
    write_text(partial / "config.json", json.dumps(checkpoint.config | {CONFIG_KEY: narrow.to_dict()}, indent=2) + "\n")
    copy_side_files(checkpoint, partial)
    facts = {"name": out.name, "source": folder, "kv_budget": narrow.kv_budget, "before": plan.kv_budget}
    write_text(partial / "README.md", CARD.format(**facts))
    publish(partial, out, overwrite)
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
    arch = architecture(checkpoint.config["model_type"].removeprefix(MODEL_TYPE_PREFIX))
    prefixes = {arch.attention_prefix(layer): layer for layer in range(plan.num_layers)}
    tensors = {}
    for name in names:
        tensors[name] = checkpoint.read(name)
        for prefix, layer in prefixes.items():
            if name.startswith(prefix):
                maps_keys = f"{prefix}k_a_proj.weight" in checkpoint.tensors
                spec, fewer = plan.cache_of(layer), narrow.cache_of(layer)
                tensors[name] = _cut(name.removeprefix(prefix), tensors[name], spec, fewer, maps_keys=maps_keys)
    return tensors


def _cut(name: str, tensor: Tensor, spec: CacheSpec, narrow: CacheSpec, *, maps_keys: bool) -> Tensor:
    """A parameter of attention without its trailing numbers. maps_keys: keys are stored after `k_a_proj`, not `k_proj`."""
    part, _, kind = name.rpartition(".")
    absorbed = spec.rope == "none" and not spec.k_projection
    keys = {"k_a_proj": 1, "k_b_proj": 2 if kind == "weight" else None, "k_u_proj": 0}
    keys |= {} if maps_keys else {"k_proj": 0}
    keys |= {"q_proj": 0} if absorbed else {}
    values = {"v_proj": 0, "v_b_proj": 2}
    values |= {} if spec.v_projection or kind == "bias" else {"o_proj": 1}
    for axes, before, after in ((keys, spec.head_dim, narrow.head_dim), (values, spec.v_head_dim, narrow.v_head_dim)):
        axis = axes.get(part)
        if axis is not None:
            return tensor.unflatten(axis, (-1, before)).narrow(axis + 1, 0, after).flatten(axis, axis + 1).contiguous()
    return tensor
