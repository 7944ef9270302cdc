"""CachePlan + weights -> a new checkpoint, shard by shard; everything outside attention is copied bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.checkpoint.atomic import require_space, write_tensors, write_text
from kvfold.checkpoint.folder import MAX_SHARD_BYTES
from kvfold.checkpoint.quantized import without_attention
from kvfold.checkpoint.reader import INDEX, SINGLE, Checkpoint
from kvfold.checkpoint.remote_code import auto_map
from kvfold.checkpoint.source import source_dtype
from kvfold.compression.widen_mlp import SIZE, widen
from kvfold.errors import CheckpointError
from kvfold.methods.width.base import LayerGroup, WidthMethod
from kvfold.plan.cache_spec import ITEMSIZE, CacheSpec
from kvfold.plan.folded_weights import FoldedWeights, beside
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan
from kvfold.plan.tensors import tensor_shapes
from kvfold.progress import track
from kvfold.runtimes.transformers.modeling import empty_folded_model, folded_classes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Folds = Callable[[int], Iterator[FoldedWeights]]
"""Owner's index -> the weights of the layers that use its cache, in their order."""


@dataclass
class Shard:
    """What goes into one output file: tensors to copy, and layers to fold. Layers that share a cache stay together."""

    copied: list[str] = field(default_factory=list)
    folded: list[int] = field(default_factory=list)
    nbytes: int = 0


def fold(
    checkpoint: Checkpoint,
    arch: Architecture,
    layers: list[AttentionLayer],
    plan: CachePlan,
    folded: Folds,
    out: Path,
    config: dict[str, Any],
) -> None:
    """Write config.json (`config`) and weights of the folded model into `out`. Shards that are there already are kept.

    `folded`: owner -> the weights of the layers that use its cache.
    Raises CheckpointError on damaged tensors and OutputError on a full disk.
    """
    shapes = empty_folded_model(arch, config).state_dict()
    shards = _distribute(checkpoint, arch, layers, plan, shapes)
    require_space(out, sum(shard.nbytes for shard in shards if not (out / _name(shards, shard)).exists()))
    weight_map: dict[str, str] = {}
    for shard in track(shards, "folding", len(shards)):
        names = shard.copied + [n for i in shard.folded for n in _names(shapes, arch, i)]
        weight_map |= dict.fromkeys(names, _name(shards, shard))
        if not (out / _name(shards, shard)).exists():
            tensors = {name: checkpoint.raw(name) for name in shard.copied}
            if config.get(SIZE) != checkpoint.config.get(SIZE):
                tensors = {name: widen(arch, name, tensor, config[SIZE]) for name, tensor in tensors.items()}
            tensors |= _folded(checkpoint, arch, layers, plan, folded, shard)
            _check(tensors, names, shapes)
            write_tensors(out / _name(shards, shard), tensors, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(s.nbytes for s in shards)}, "weight_map": weight_map}
        write_text(out / INDEX, json.dumps(index, indent=1))
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def folded_config(checkpoint: Checkpoint, arch: Architecture, plan: CachePlan) -> dict[str, Any]:
    """The source's config.json, with the folded model's class and the plan."""
    config_class, model_class = folded_classes(arch)
    return (
        checkpoint.config
        | {
            "architectures": [model_class.__name__],
            "auto_map": auto_map(config_class.__name__, model_class.__name__),
            "model_type": MODEL_TYPE_PREFIX + arch.model_type,
            CONFIG_KEY: plan.to_dict(),
        }
        | ({"quantization_config": without_attention(checkpoint.config, arch.attention)} if checkpoint.packed else {})
    )


def _folded(
    checkpoint: Checkpoint,
    arch: Architecture,
    layers: list[AttentionLayer],
    plan: CachePlan,
    folded: Folds,
    shard: Shard,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for owner in (i for i in shard.folded if plan.owner(i) == i):
        for index, weights in zip(plan.readers(owner), folded(owner), strict=True):
            dtype = getattr(torch, source_dtype(checkpoint, arch, layers[index]))
            prefix = arch.attention_prefix(index)
            tensors |= {prefix + name: tensor for name, tensor in weights.state_dict(dtype).items()}
    return tensors


def folded_weights(method: WidthMethod, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
    """Of the layers of a group, with the finer form of recent tokens where the plan has one of its own."""
    if not spec.recent_head_dim:
        yield from method.fold(group, spec.of_all)
        return
    forms = method.fold(group, spec.of_all), method.fold(group.of_recent, spec.of_recent)
    for position, (layer, far, near) in enumerate(zip(group.layers, *forms, strict=True)):
        yield beside(tensor_shapes(layer, spec, owns=not position), far, near)


def foreseeing(folds: Folds, plan: CachePlan, worth_LKD: Tensor) -> Folds:
    """The same, where owners say what a token will be worth; of a stored head what its source heads do in the mean."""

    def folded(owner: int) -> Iterator[FoldedWeights]:
        spec, (first, *others) = plan.cache_of(owner), folds(owner)
        worth_CD = worth_LKD[owner].unflatten(0, (spec.num_kv_heads, -1)).mean(1)
        drops = spec.tokens is not None and spec.tokens.foreseen
        yield dataclasses.replace(first, s_proj=worth_CD) if drops else first
        yield from others

    return folded


def _check(tensors: Mapping[str, Tensor], names: list[str], shapes: Mapping[str, Tensor]) -> None:
    assert sorted(tensors) == sorted(names), f"tensors written and promised differ: {set(tensors) ^ set(names)}"
    for name, tensor in tensors.items():
        assert name not in shapes or tensor.shape == shapes[name].shape, (
            f"{name} has shape {tuple(tensor.shape)}, the plan asks for {tuple(shapes[name].shape)}"
        )
        if tensor.dtype in FLOATS and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name} is not finite after folding: its numbers do not fit into {tensor.dtype}. Fold a bfloat16 or float32"
                " copy of the checkpoint."
            )


def _distribute(
    checkpoint: Checkpoint,
    arch: Architecture,
    layers: list[AttentionLayer],
    plan: CachePlan,
    shapes: Mapping[str, Tensor],
) -> list[Shard]:
    """Fill shards in a fixed order, so that an interrupted run finds the same ones again."""
    attention = tuple(arch.attention_prefix(layer.index) for layer in layers)
    shards = [Shard()]

    def open_shard(nbytes: int) -> Shard:
        if shards[-1].nbytes and shards[-1].nbytes + nbytes > MAX_SHARD_BYTES:
            shards.append(Shard())
        shards[-1].nbytes += nbytes
        return shards[-1]

    for name in sorted(checkpoint.tensors):
        if not name.startswith(attention):
            stored = checkpoint.tensors[name]
            open_shard(shapes[name].numel() * stored.itemsize if name in shapes else stored.nbytes).copied.append(name)
    for owner in range(len(layers)):
        members = plan.readers(owner)
        nbytes = 0
        for index in members:
            itemsize = ITEMSIZE[source_dtype(checkpoint, arch, layers[index])]
            nbytes += itemsize * sum(shapes[name].numel() for name in _names(shapes, arch, index))
        if members:
            open_shard(nbytes).folded.extend(members)
    return shards


def _names(shapes: Mapping[str, Tensor], arch: Architecture, layer: int) -> list[str]:
    prefix = arch.attention_prefix(layer)
    return [name for name in shapes if name.startswith(prefix)]


def _name(shards: list[Shard], shard: Shard) -> str:
    if len(shards) == 1:
        return SINGLE
    number = next(i for i, other in enumerate(shards) if other is shard)
    return f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
