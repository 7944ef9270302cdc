"""A folded model whose cache is plain grouped-query attention -> a checkpoint of the stock class."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold.architectures.base import Architecture, architecture, empty_model, source_config
from kvfold.checkpoint.atomic import write_tensors, write_text
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import (
    EXPORT_MARKER,
    new_folder,
    refuse_out,
    write_files,
)
from kvfold.checkpoint.reader import INDEX, Checkpoint
from kvfold.errors import CheckpointError, PlanError
from kvfold.plan.cache_spec import divisors
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan

CARD = """# {name}

Exported by kvfold from `{source}`: {heads} key/value heads in every layer, {kv_budget:.4g} of the original cache. This is
an ordinary `{model_class}`; nothing of kvfold is needed to load, fine-tune, convert or serve it.
"""


def export_gqa(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Write `out` as a stock checkpoint with the logits of `folder`, and return its number of key/value heads.

    Raises PlanError with the obstacle and the nearest plan that could be exported, where the plan is not uniform
    grouped-query attention or the family has no stock class for it.
    """
    checkpoint, out = Checkpoint.open(folder), Path(os.path.abspath(out))
    if CONFIG_KEY not in checkpoint.config:
        raise CheckpointError(f"{folder} is not a folded model; it needs no export.")
    plan = CachePlan.from_dict(checkpoint.config[CONFIG_KEY])
    if checkpoint.packed:
        raise PlanError(
            f"{folder} has quantized matrices ({min(checkpoint.packed)} and others), which are not exported; fold and export"
            " the model as it was before, and quantize the export."
        )
    arch = architecture(checkpoint.config["model_type"].removeprefix(MODEL_TYPE_PREFIX))
    heads = _uniform_heads(plan, arch, checkpoint.config)
    refuse_out(out, overwrite, keep=(checkpoint.path,))
    config = _stock_config(checkpoint.config, arch, heads)
    stock = empty_model(arch, source_config(arch, config))
    facts = {"name": out.name, "source": folder, "heads": heads, "kv_budget": plan.kv_budget}
    files: dict[str, Any] = {
        "config.json": config,
        "README.md": CARD.format(model_class=config["architectures"][0], **facts),
        EXPORT_MARKER: {"format": "gqa", "source": str(folder)},
    }
    with new_folder(out, fingerprint(export=checkpoint.fingerprint()), overwrite=overwrite) as partial:
        weight_map: dict[str, str] = {}
        shards = _shards(checkpoint, arch, plan)
        for shard, names in shards.items():
            tensors = _stock_tensors(checkpoint, arch, names, plan)
            weight_map |= dict.fromkeys(tensors, shard)
            write_tensors(partial / shard, tensors, {"format": "pt"})
        _check(weight_map, arch, stock)
        if len(shards) > 1:
            write_text(partial / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
        write_files(partial, files, beside=checkpoint)
    return heads


def _uniform_heads(plan: CachePlan, arch: Architecture, config: dict[str, Any]) -> int:
    """The number of key/value heads of every layer, or a PlanError that names what is in the way."""
    if arch.no_stock_gqa:
        raise PlanError(
            f"{arch.model_type} models have no stock grouped-query class: {arch.no_stock_gqa} Use the folded model with"
            " `import kvfold`."
        )
    for layer in range(plan.num_layers):
        if obstacle := _obstacle(plan, layer):
            raise PlanError(f"layer {layer} {obstacle}; {_nearest(plan, arch, config)}")
    counts = {spec.num_kv_heads for spec in plan.owned}
    if len(counts) > 1:
        raise PlanError(f"layers keep different numbers of heads, {sorted(counts)}; {_nearest(plan, arch, config)}")
    return counts.pop()


def _obstacle(plan: CachePlan, layer: int) -> str | None:
    spec, source = plan.caches[layer], plan.source[layer]
    if spec is None:
        return f"reads the cache of layer {plan.owner(layer)}"
    if plan.readers(layer) != [layer]:
        return f"shares its cache with layers {plan.readers(layer)[1:]}"
    if spec.k_projection or spec.v_projection or spec.joint:
        return f"keeps projections beside its weights (keys {spec.num_kv_heads} x {spec.head_dim})"
    if spec.output_bias:
        return "has an output bias that the stock class does not have"
    if spec.rope == "on_read":
        return "rotates keys on read"
    if any(side.format is not None for side in spec.sides):
        return "stores its numbers in few bits, of which a stock checkpoint knows nothing"
    if spec.tokens is not None:
        return "drops tokens head by head, of which a stock checkpoint knows nothing"
    if spec.reading is not None:
        return "reads some of the stored tokens, of which a stock checkpoint knows nothing"
    if (spec.num_kv_heads, spec.head_dim) != (spec.num_v_heads, spec.v_head_dim) or spec.head_dim != source.head_dim:
        return (
            f"stores keys as {spec.num_kv_heads} x {spec.head_dim} and values as {spec.num_v_heads} x {spec.v_head_dim},"
            f" where a stock class has equal heads of {source.head_dim}"
        )
    return None


def _nearest(plan: CachePlan, arch: Architecture, config: dict[str, Any]) -> str:
    heads = plan.source[0].num_kv_heads
    if arch.describe(empty_model(arch, source_config(arch, _stock_config(config, arch, heads))))[0].own_norms:
        return f"every head has a norm of its own, so that only plans with all {heads} heads can be exported."
    nearest = min(divisors(heads), key=lambda count: abs(count / heads - plan.kv_budget))
    return (
        f"the nearest plan that can be exported is {nearest} heads per layer: kvfold compress MODEL --preset procrustes"
        f" --kv-heads {nearest}."
    )


def _stock_config(config: dict[str, Any], arch: Architecture, heads: int) -> dict[str, Any]:
    stock = {name: value for name, value in config.items() if name not in (CONFIG_KEY, "auto_map")}
    return stock | {
        "model_type": arch.model_type, "architectures": [arch.causal_lm], "num_key_value_heads": heads,
    }  # fmt: skip


def _shards(checkpoint: Checkpoint, arch: Architecture, plan: CachePlan) -> dict[str, list[str]]:
    """Shard -> names; all tensors of one layer's attention go where its queries are, wherever they were."""
    home = {}
    for layer in range(plan.num_layers):
        prefix = arch.attention_prefix(layer)
        home[prefix] = checkpoint.tensors[f"{prefix}q_proj.weight"].shard
    shards: dict[str, list[str]] = {}
    for name, stored in checkpoint.tensors.items():
        prefix = next((prefix for prefix in home if name.startswith(prefix)), "")
        shards.setdefault(home.get(prefix, stored.shard), []).append(name)
    return shards


def _stock_tensors(checkpoint: Checkpoint, arch: Architecture, names: list[str], plan: CachePlan) -> dict[str, Tensor]:
    """The tensors of one shard under the stock class's names; attention is converted layer by layer."""
    prefixes = [arch.attention_prefix(layer) for layer in range(plan.num_layers)]
    tensors: dict[str, Tensor] = {}
    inside: dict[str, dict[str, Tensor]] = {}
    for name in names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            tensors[name] = checkpoint.read(name)
        else:
            inside.setdefault(prefix, {})[name.removeprefix(prefix)] = checkpoint.read(name)
    for prefix, state in inside.items():
        stock = arch.stock_attention(FoldedWeights.from_state_dict(state), plan.source[0].head_dim)
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in stock.items()}
    return tensors


def _check(names: dict[str, str], arch: Architecture, stock: Any) -> None:
    stored = arch.names_in_files(stock)
    expected = {part for name, parts in stored.items() for part in ([name] if name in names else parts)}
    if stock.config.tie_word_embeddings:  # files hold one of both names
        tied = stock._tied_weights_keys or {}
        expected -= ({*tied} | {*tied.values()}) - set(names)
    assert set(names) == expected, (
        f"tensors of the stock class and of the export differ: {sorted(set(names) ^ expected)[:4]}"
    )
