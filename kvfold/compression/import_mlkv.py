"""import_mlkv: a checkpoint in the layout of the MLKV paper's public code (arXiv 2406.09297) -> a kvfold folder."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold import registry
from kvfold.architectures.base import Architecture, architecture, empty_model, source_config
from kvfold.checkpoint.atomic import write_tensors
from kvfold.checkpoint.converted import unpickled
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import (
    MAX_SHARD_BYTES,
    new_folder,
    refuse_out,
    write_files,
)
from kvfold.checkpoint.reader import DTYPES, INDEX, SINGLE, Checkpoint, locate, read_json
from kvfold.errors import CheckpointError
from kvfold.methods.depth.contiguous import Contiguous
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan, source_layer
from kvfold.runtimes.transformers.modeling import empty_folded_model, folded_classes

PICKLE = "pytorch_model.bin"
LAYERS, HEADS = "num_key_value_layers", "num_key_value_heads"
ROLES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "d": "o_proj", "o": "o_proj"}
"""First letter of a projection's name (query, key, value, dense) -> its name here."""

CARD = """# {name}

Imported from `{source}`, a checkpoint in the layout of the MLKV paper's public code: {owners} of {layers} layers keep a
cache of {heads} key/value heads. {readers}

```python
import kvfold
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{out}")
```
"""
AS_TRAINED = """Layers that read another's cache see its keys without rotation, as in the published training code and
scores; the cache therefore keeps keys before rotation, and a position of 4 bytes per token."""
ROTATED = (
    "Layers that read another's cache see rotated keys. Weights of the published code were not trained so: heal them."
)


def import_mlkv(
    model: str | Path, out: str | Path, *, as_trained: bool = True, allow_pickle: bool = False, overwrite: bool = False
) -> CachePlan:
    """Write the folder `out` from an MLKV checkpoint folder or hub id, and return its plan.

    `as_trained`: layers that read a cache see its keys un-rotated, as the published weights were trained; otherwise rotated,
    as it should be. `allow_pickle`: read a pytorch_model.bin (tensors only, no code is run). Raises CheckpointError on a
    folder that is not of this layout.
    """
    path, out = locate(model, pickles=allow_pickle), Path(os.path.abspath(out))
    refuse_out(out, overwrite, keep=(path,))
    found = read_json(path / "config.json")
    family = _family(found.get("model_type", "(none)"))
    config = _stock_config(found, family)
    state = _read(path, allow_pickle)
    layers = family.describe(empty_model(family, source_config(family, config)))
    plan = _plan(layers, found, _dtype(state), as_trained)
    folded = config | {
        "model_type": MODEL_TYPE_PREFIX + family.model_type,
        "architectures": [folded_classes(family)[1].__name__],
        CONFIG_KEY: plan.to_dict(),
    }
    tensors = _rename(state, family, path)
    empty = empty_folded_model(family, folded)
    wanted = dict(empty.state_dict())
    for tied in empty._tied_weights_keys if empty.config.tie_word_embeddings else ():
        tensors.pop(tied, None), wanted.pop(tied, None)
    _check(tensors, wanted, path)
    shares = found[LAYERS] < len(layers)
    facts = {"name": out.name, "source": model, "out": out, "owners": found[LAYERS], "layers": len(layers)}
    readers = "" if not shares else AS_TRAINED if as_trained else ROTATED
    card = CARD.format(heads=found[HEADS], readers=readers, **facts)
    with new_folder(out, fingerprint(imported=str(path)), overwrite=overwrite) as partial:
        write_tensors(partial / SINGLE, tensors, {"format": "pt"})
        write_files(partial, {"config.json": folded, "README.md": card}, beside=Checkpoint(path, found, {}))
    return plan


def _family(model_type: str) -> Architecture:
    """The family whose fork the checkpoint is of, for example gpt_neox_mlkv."""
    known = [name for name in registry.names("architectures") if model_type.startswith(name)]
    return architecture(max(known, key=len) if known else model_type)


def _stock_config(config: Mapping[str, Any], family: Architecture) -> dict[str, Any]:
    """The config of the stock model around the caches."""
    if missing := [name for name in (LAYERS, HEADS) if not isinstance(config.get(name), int)]:
        raise CheckpointError(
            f"config.json lacks {missing}: this is no MLKV checkpoint. `kvfold compress` folds ordinary ones."
        )
    sizes = (LAYERS, HEADS, "num_attention_heads", "num_hidden_layers")
    if wrong := [name for name in sizes if not isinstance(config.get(name), int) or config[name] < 1]:
        raise CheckpointError(f"config.json: {wrong[0]} is {config.get(wrong[0])!r}, which is no number above 0.")
    if config.get("use_key_value_mlp"):
        raise CheckpointError("use_key_value_mlp is on: key/value projections made of an MLP are not supported.")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    if heads % config[HEADS] or not 1 <= config[LAYERS] <= layers:
        raise CheckpointError(
            f"config.json: {config[HEADS]} key/value heads for {heads} query heads, {config[LAYERS]} caches for {layers}"
            " layers; the first must divide, the second not exceed."
        )
    dropped = (LAYERS, HEADS, "use_key_value_mlp", "kv_intermediate_size", "auto_map")
    stock = {name: value for name, value in config.items() if name not in dropped}
    return stock | {"model_type": family.model_type, "architectures": [family.causal_lm]}


def _plan(layers: list[AttentionLayer], config: Mapping[str, Any], dtype: str, as_trained: bool) -> CachePlan:
    targets = Contiguous(owners=config[LAYERS]).layouts(layers, None)[0]
    spec = CacheSpec(
        num_kv_heads=config[HEADS],
        head_dim=layers[0].head_dim,
        num_v_heads=config[HEADS],
        v_head_dim=layers[0].head_dim,
    )
    unrotated = dataclasses.replace(spec, rope="on_read", readers_rotate=False)
    read = set(targets)
    caches = [
        None if target is not None
        else dataclasses.replace(unrotated if as_trained and index in read else spec, window=layers[index].window)
        for index, target in enumerate(targets)
    ]  # fmt: skip
    source = tuple(source_layer(layer) for layer in layers)
    return CachePlan(dtype=dtype, source=source, caches=tuple(caches), kv_sharing_target_layer=targets)


def _read(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if (path / SINGLE).exists():
        checkpoint = Checkpoint.open(path)
        return {name: checkpoint.raw(name) for name in checkpoint.tensors}
    if not (path / PICKLE).exists():
        raise CheckpointError(f"{path} holds neither {SINGLE} nor {PICKLE} (sharded: {(path / INDEX).exists()}).")
    if not allow_pickle:
        raise CheckpointError(
            f"{path} holds its weights as {PICKLE}, a pickle. --allow-pickle reads the tensors in it and runs no code."
        )
    return unpickled(path / PICKLE)


def _dtype(state: Mapping[str, Tensor]) -> str:
    found = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()} & set(
        DTYPES.values()
    )
    if len(found) != 1:
        raise CheckpointError(f"the weights are stored as {sorted(found)}; one of {sorted(DTYPES.values())} is wanted.")
    return found.pop()


def _rename(state: Mapping[str, Tensor], family: Architecture, path: Path) -> dict[str, Tensor]:
    """Under the names of a folded model. The projections' names in the public code are known by their first letters only."""
    prefix = re.escape(family.layers) + r"\.\d+\." + re.escape(family.attention) + r"\."
    tensors = {}
    for name, tensor in state.items():
        if re.search(r"attention\.(bias|masked_bias)$|inv_freq$", name):
            continue
        if inside := re.fullmatch(rf"({prefix})(\w+)\.(weight|bias)", name):
            role = ROLES.get(inside[2][0])
            if role is None or "query_key_value" in inside[2]:
                raise CheckpointError(
                    f"{path}: {name} is no query, key, value or output projection of an MLKV checkpoint."
                )
            name = f"{inside[1]}{role}.{inside[3]}"
        name = family.current_name(name)
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors would become {name}; the layout is not that of MLKV.")
        tensors[name] = tensor.contiguous()
    return tensors


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    if wrong := sorted(set(tensors) ^ set(wanted)):
        raise CheckpointError(
            f"{path} does not hold the tensors that its config asks for: {wrong[:4]} ({len(wrong)} differ)."
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, its config asks for {tuple(wanted[name].shape)}."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite numbers; use an intact checkpoint.")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size < 64 * MAX_SHARD_BYTES, "published MLKV models are small; larger ones need sharding here"
