"""CachePlan + weights -> a new checkpoint, shard by shard; everything outside attention is copied bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.architectures.base import Architecture
from kvfold.checkpoint.atomic import require_space, write_tensors, write_text
from kvfold.checkpoint.reader import DTYPES, INDEX, SINGLE, Checkpoint
from kvfold.compression.allocate import Groups
from kvfold.compression.widen_mlp import SIZE, widen
from kvfold.errors import CheckpointError
from kvfold.methods.width.base import WidthMethod
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.plan import CONFIG_KEY, ITEMSIZE, CachePlan
from kvfold.progress import track
from kvfold.runtimes.transformers.modeling import MODEL_TYPE_PREFIX, empty_folded_model, folded_classes

MAX_SHARD_BYTES = 512 * 1024**2
"""Small shards keep the memory of a fold low: one shard and one layer are in memory at a time."""

DEAD_BUFFER = r"rotary_emb\.inv_freq$"
"""What old checkpoints of any family carry and no current model reads."""


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
    method: WidthMethod,
    groups: Groups,
    out: Path,
    config: dict[str, Any],
) -> None:
    """Write config.json (`config`) and weights of the folded model into `out`. Shards that are there already are kept.

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
            tensors = {name: checkpoint.read(name) for name in shard.copied}
            if config.get(SIZE) != checkpoint.config.get(SIZE):
                tensors = {name: widen(arch, name, tensor, config[SIZE]) for name, tensor in tensors.items()}
            tensors |= _folded(checkpoint, arch, plan, method, groups, shard)
            _check(tensors, names, shapes)
            write_tensors(out / _name(shards, shard), tensors, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(s.nbytes for s in shards)}, "weight_map": weight_map}
        write_text(out / INDEX, json.dumps(index, indent=1))
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def folded_config(checkpoint: Checkpoint, arch: Architecture, plan: CachePlan) -> dict[str, Any]:
    """The source's config.json, with the folded model's class and the plan."""
    _, model_class = folded_classes(arch)
    return checkpoint.config | {
        "architectures": [model_class.__name__],
        "model_type": MODEL_TYPE_PREFIX + arch.model_type,
        CONFIG_KEY: plan.to_dict(),
    }


def read_layer(checkpoint: Checkpoint, arch: Architecture, layer: AttentionLayer) -> AttentionWeights:
    """One layer's attention weights in float64."""
    prefix = arch.attention_prefix(layer.index)
    return arch.weights(lambda name: checkpoint.read(prefix + name).double(), layer)


def source_dtype(checkpoint: Checkpoint, arch: Architecture, layer: AttentionLayer) -> str:
    """The dtype of a layer's attention weights, as config.json would name it: the original cache has the same."""
    prefix = arch.attention_prefix(layer.index)
    found = {stored.dtype for name, stored in checkpoint.tensors.items() if name.startswith(prefix)}
    if len(found) != 1 or not found <= set(DTYPES):
        raise CheckpointError(
            f"{checkpoint.path}: attention of layer {layer.index} is stored as {sorted(found)}; kvfold folds one of"
            f" {sorted(DTYPES.values())} per layer. Save a converted copy first."
        )
    return DTYPES[found.pop()]


def under_current_names(checkpoint: Checkpoint, arch: Architecture, model: PreTrainedModel) -> Checkpoint:
    """The checkpoint with its tensors under the names of the current model, and without the masks and tables that old files
    of its family carry and no current model reads."""
    dead = [DEAD_BUFFER, *(model._keys_to_ignore_on_load_unexpected or [])]
    tensors = {arch.current_name(name): stored for name, stored in checkpoint.tensors.items()}
    expected = set(model.state_dict())
    live = {n: t for n, t in tensors.items() if n in expected or not any(re.search(pattern, n) for pattern in dead)}
    return dataclasses.replace(checkpoint, tensors=live)


def check_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """Names of tied tensors that are stored under another name -> that name.

    Raises CheckpointError unless the folder holds exactly the tensors of its model type, tied ones at least once.
    """
    expected = set(model.state_dict())
    found = set(checkpoint.tensors)
    tied = dict(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}
    tied |= {other: name for name, other in tied.items()}
    aliases = {name: tied[name] for name in expected - found if tied.get(name) in found}
    if missing := sorted(expected - found - set(aliases)):
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors of a {model.config.model_type} model, for example {missing[0]}."
            " Does config.json belong to these weights?"
        )
    if unknown := sorted(found - expected):
        raise CheckpointError(
            f"{checkpoint.path} holds {len(unknown)} tensors that a {model.config.model_type} model does not have, for"
            f" example {unknown[0]}. Does config.json belong to these weights?"
        )
    return aliases


def _folded(
    checkpoint: Checkpoint, arch: Architecture, plan: CachePlan, method: WidthMethod, groups: Groups, shard: Shard
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for owner in (i for i in shard.folded if plan.owner(i) == i):
        group = groups(owner)
        for layer, folded in zip(group.layers, method.fold(group, plan.cache_of(owner)), strict=True):
            dtype = getattr(torch, source_dtype(checkpoint, arch, layer))
            prefix = arch.attention_prefix(layer.index)
            tensors |= {prefix + name: tensor for name, tensor in folded.state_dict(dtype).items()}
    return tensors


def _check(tensors: Mapping[str, Tensor], names: list[str], shapes: Mapping[str, Tensor]) -> None:
    assert sorted(tensors) == sorted(names), f"tensors written and promised differ: {set(tensors) ^ set(names)}"
    for name, tensor in tensors.items():
        assert name not in shapes or tensor.shape == shapes[name].shape, (
            f"{name} has shape {tuple(tensor.shape)}, the plan asks for {tuple(shapes[name].shape)}"
        )
        if not torch.isfinite(tensor).all():
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
