"""CachePlan + weights -> a new checkpoint, shard by shard; everything outside attention is copied bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.architectures.base import Architecture
from kvfold.attention import AttentionLayer, AttentionWeights
from kvfold.checkpoint import DTYPES, INDEX, SINGLE, Checkpoint
from kvfold.errors import CheckpointError
from kvfold.linalg import Moment
from kvfold.plan import CONFIG_KEY, ITEMSIZE, CachePlan
from kvfold.progress import track
from kvfold.runtime.modeling import MODEL_TYPE_PREFIX, empty_folded_model, folded_classes
from kvfold.storage import require_space, write_tensors, write_text
from kvfold.width.base import WidthMethod

MAX_SHARD_BYTES = 512 * 1024**2
"""Small shards keep the memory of a fold low: one shard and one layer are in memory at a time."""

IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Buffers that old checkpoints carry and no current model reads."""


@dataclass
class Shard:
    """What goes into one output file: tensors to copy, and layers to fold."""

    copied: list[str] = field(default_factory=list)
    folded: list[AttentionLayer] = field(default_factory=list)
    nbytes: int = 0


def fold(
    checkpoint: Checkpoint,
    arch: Architecture,
    layers: list[AttentionLayer],
    plan: CachePlan,
    method: WidthMethod,
    moments_of: Callable[[int], Mapping[str, Moment]],
    out: Path,
) -> None:
    """Write config.json and weights of the folded model into `out`. Shards that are there already are kept.

    Raises CheckpointError on damaged tensors and OutputError on a full disk.
    """
    config = folded_config(checkpoint, arch, plan)
    shapes = empty_folded_model(arch, config).state_dict()
    shards = _distribute(checkpoint, arch, layers, shapes)
    require_space(out, sum(shard.nbytes for shard in shards if not (out / _name(shards, shard)).exists()))
    weight_map: dict[str, str] = {}
    for shard in track(shards, "folding", len(shards)):
        names = shard.copied + [n for layer in shard.folded for n in _names(shapes, arch, layer)]
        weight_map |= dict.fromkeys(names, _name(shards, shard))
        if not (out / _name(shards, shard)).exists():
            tensors = _tensors(checkpoint, arch, plan, method, moments_of, shard)
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
    found = {
        stored.dtype
        for name, stored in checkpoint.tensors.items()
        if name.startswith(prefix) and not name.endswith(IGNORED_SUFFIX)
    }
    if len(found) != 1 or not found <= set(DTYPES):
        raise CheckpointError(
            f"{checkpoint.path}: attention of layer {layer.index} is stored as {sorted(found)}; kvfold folds one of"
            f" {sorted(DTYPES.values())} per layer. Save a converted copy first."
        )
    return DTYPES[found.pop()]


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
    if unknown := sorted(name for name in found - expected if not name.endswith(IGNORED_SUFFIX)):
        raise CheckpointError(
            f"{checkpoint.path} holds {len(unknown)} tensors that a {model.config.model_type} model does not have, for"
            f" example {unknown[0]}. Does config.json belong to these weights?"
        )
    return aliases


def _tensors(
    checkpoint: Checkpoint,
    arch: Architecture,
    plan: CachePlan,
    method: WidthMethod,
    moments_of: Callable[[int], Mapping[str, Moment]],
    shard: Shard,
) -> dict[str, Tensor]:
    tensors = {name: checkpoint.read(name) for name in shard.copied}
    for layer in shard.folded:
        dtype = getattr(torch, source_dtype(checkpoint, arch, layer))
        weights = read_layer(checkpoint, arch, layer)
        folded = method.fold(layer, weights, moments_of(layer.index), plan.cache_of(layer.index))
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
    checkpoint: Checkpoint, arch: Architecture, layers: list[AttentionLayer], shapes: Mapping[str, Tensor]
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
        if not name.startswith(attention) and not name.endswith(IGNORED_SUFFIX):
            open_shard(checkpoint.tensors[name].nbytes).copied.append(name)
    for layer in layers:
        names = _names(shapes, arch, layer)
        itemsize = ITEMSIZE[source_dtype(checkpoint, arch, layer)]
        open_shard(itemsize * sum(shapes[name].numel() for name in names)).folded.append(layer)
    return shards


def _names(shapes: Mapping[str, Tensor], arch: Architecture, layer: AttentionLayer) -> list[str]:
    prefix = arch.attention_prefix(layer.index)
    return [name for name in shapes if name.startswith(prefix)]


def _name(shards: list[Shard], shard: Shard) -> str:
    if len(shards) == 1:
        return SINGLE
    number = next(i for i, other in enumerate(shards) if other is shard)
    return f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
