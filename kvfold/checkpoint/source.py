"""Opening a model folder to fold it: its layers, its plan, its weights under current names."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvfold.architectures.base import (
    Architecture,
    architecture,
    empty_model,
    foreign_faults,
    source_config,
    text_fields,
)
from kvfold.checkpoint.hub import headers
from kvfold.checkpoint.quantized import quantized
from kvfold.checkpoint.reader import DTYPES, Checkpoint, StoredTensor, is_model_id, locate, read_json
from kvfold.errors import CheckpointError
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.naming import CONFIG_KEY
from kvfold.plan.plan import CachePlan, source_layer, source_plan

MAX_SEQ_LEN = 2048


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been opened and understood."""

    checkpoint: Checkpoint
    arch: Architecture
    layers: list[AttentionLayer]

    @property
    def seq_len(self) -> int:
        """Tokens per sequence where nothing else is asked for: the model's context length, at most 2,048."""
        return default_seq_len(self.checkpoint.config)

    @property
    def dtype(self) -> str:
        """The dtype of the original cache, as config.json would name it."""
        return source_dtype(self.checkpoint, self.arch, self.layers[0])


def load_plan(model: str | Path) -> tuple[CachePlan, bool]:
    """The plan of a folded folder, or that of a stock model's own cache; and whether the folder is folded."""
    path = locate(model)
    config = read_json(path / "config.json")
    if config.get(CONFIG_KEY):
        return CachePlan.from_dict(config[CONFIG_KEY]), True
    return _own_plan(open_source(path))


def plan_of_headers(model: str | Path) -> tuple[CachePlan, bool, Mapping[str, Any]]:
    """The same of a folder, or of a model on the hub, of which no weights are fetched; and its config.json."""
    checkpoint = headers(model) if is_model_id(model) else None
    config = read_json(locate(model) / "config.json") if checkpoint is None else checkpoint.config
    if config.get(CONFIG_KEY):
        return CachePlan.from_dict(config[CONFIG_KEY]), True, config
    plan, folded = load_plan(model) if checkpoint is None else _own_plan(understood(checkpoint))
    return plan, folded, config


def _own_plan(source: Source) -> tuple[CachePlan, bool]:
    return source_plan([source_layer(layer) for layer in source.layers], source.dtype), False


def open_source(model: str | Path) -> Source:
    """Open a checkpoint and read the facts of its layers. Raises CheckpointError before any work is done."""
    return understood(Checkpoint.open(model))


def understood(checkpoint: Checkpoint) -> Source:
    """The same of one that was opened."""
    arch = architecture(checkpoint.config.get("model_type", "(none)"))
    config = source_config(arch, checkpoint.config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path} holds {len(checkpoint.tensors)} tensors, where config.json names {layers:,} layers. Does"
            " config.json belong to these weights?"
        )
    stock = empty_model(arch, config)
    checkpoint = under_current_names(checkpoint, arch, stock)
    stacks = stacked(checkpoint, arch, stock)
    checkpoint = dataclasses.replace(checkpoint, stacks=stacks, aliases=check_names(checkpoint, arch, stock, stacks))
    check_shapes(checkpoint, arch, stock)
    with foreign_faults(f"config.json describes a {arch.model_type} model whose attention is not understood"):
        return Source(checkpoint, arch, arch.describe(stock))


def default_seq_len(config: dict[str, Any]) -> int:
    """Tokens per sequence where nothing else is asked for: the model's context length, at most 2,048."""
    return min(MAX_SEQ_LEN, context_len(config) or MAX_SEQ_LEN)


def context_len(config: dict[str, Any]) -> int | None:
    """Tokens that a model has positions for; None where nothing limits them."""
    text = text_fields(config)
    return text.get("max_position_embeddings") or text.get("n_positions") or text.get("max_seq_len")


def warn_if_too_long(seq_len: int, config: dict[str, Any]) -> None:
    """Warn where sequences are longer than the model's positions: it was not trained for that."""
    context = context_len(config) or seq_len
    if seq_len > context:
        warnings.warn(
            f"sequences of {seq_len} tokens exceed the model's context of {context}; it was not trained for them."
        )


WRAPPERS = ("module.", "_orig_mod.")
"""What distributed training and torch.compile put before all names."""
DEAD_BUFFER = r"rotary_emb\.inv_freq$"
"""What old checkpoints of any family carry and no current model reads."""


def read_layer(checkpoint: Checkpoint, arch: Architecture, layer: AttentionLayer) -> AttentionWeights:
    """One layer's attention weights in float64."""
    prefix = arch.attention_prefix(layer.index)
    return arch.weights(lambda name: checkpoint.read(prefix + name).double(), layer)


def source_dtype(checkpoint: Checkpoint, arch: Architecture, layer: AttentionLayer) -> str:
    """The dtype of a layer's attention weights, as config.json would name it: the original cache has the same."""
    prefix = arch.attention_prefix(layer.index)
    if any(name.startswith(prefix) for name in checkpoint.packed):
        return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")
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
    dead = [DEAD_BUFFER, *arch.dead, *(model._keys_to_ignore_on_load_unexpected or [])]
    expected, base = set(model.state_dict()), arch.base_prefix(model)
    tensors = {arch.current_name(name): stored for name, stored in _without_wrapper(checkpoint.tensors).items()}
    # of a base model that was saved alone
    tensors = {base + n if n not in expected and base + n in expected else n: t for n, t in tensors.items()}
    live = {n: t for n, t in tensors.items() if n in expected or not any(re.search(pattern, n) for pattern in dead)}
    return dataclasses.replace(checkpoint, tensors=live, packed=quantized(checkpoint.config, live))


def _without_wrapper(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Without what training tools put before all names."""
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): stored for name, stored in tensors.items()}
    return tensors


def stacked(checkpoint: Checkpoint, arch: Architecture, model: PreTrainedModel) -> dict[str, list[tuple[str, ...]]]:
    """Parameters that hold all experts of a layer -> the tensors that files hold of each, unless they hold the parameters."""
    found = {name: arch.parts(name, tensor) for name, tensor in model.state_dict().items()}
    return {name: parts for name, parts in found.items() if parts and name not in checkpoint.tensors}


def check_shapes(checkpoint: Checkpoint, arch: Architecture, model: PreTrainedModel) -> None:
    """Raise CheckpointError where a tensor has another shape than config.json asks for."""
    wanted = {arch.stored_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        stored = checkpoint.tensors.get(name)
        if stored is not None and name not in checkpoint.packed and stored.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(stored.shape)} where config.json asks for {list(shape)}. Does"
                " config.json belong to these weights?"
            )


def check_names(
    checkpoint: Checkpoint, arch: Architecture, model: PreTrainedModel, stacks: Mapping[str, list[tuple[str, ...]]]
) -> dict[str, str]:
    """Names of tensors that are stored under another name (tied ones, or as old files have it) -> that name.

    Raises CheckpointError unless the folder holds exactly the tensors of its model type, tied ones at least once.
    """
    stored = {name: arch.stored_name(name) for name in set(model.state_dict()) - set(stacks)}
    modules = tuple(packed.stored("") for packed in checkpoint.packed.values())
    found = {name for name in checkpoint.tensors if not name.startswith(modules)} | set(checkpoint.packed)
    found |= {name for name in checkpoint.tensors if name.endswith((".bias", "_proj_bias"))}
    old = {name: other for name, other in stored.items() if other != name and other in found}
    expected = set(stored) - set(old) | set(old.values())
    expected |= {part for parts in stacks.values() for names in parts for part in names}
    tied = dict(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}
    tied |= {other: name for name, other in tied.items()}
    aliases = old | {name: tied[name] for name in expected - found if tied.get(name) in found}
    if missing := sorted(expected - found - set(aliases)):
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors of a {model.config.model_type} model, for example {missing[0]}."
            " Does config.json belong to these weights?"
            + (
                " A base model that was saved without its head predicts nothing."
                if missing == ["lm_head.weight"]
                else ""
            )
        )
    if unknown := sorted(found - expected):
        raise CheckpointError(
            f"{checkpoint.path} holds {len(unknown)} tensors that a {model.config.model_type} model does not have, for"
            f" example {unknown[0]}. Does config.json belong to these weights?"
        )
    return aliases
