"""A Llama-type model -> a checkpoint of DeepSeek-V3's class, whose cache is a latent and one rotated key head per token.

Servers with kernels for multi-head latent attention run it. Unlike a fold it changes what keys mean: all but one mixture of
heads per speed stop rotating, so that it loses much and wants training (TransMLA, arXiv 2502.07864).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.calibration.calibration import Calibration
from kvfold.calibration.material import Material
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.folder import EXPORT_MARKER, new_folder, refuse_out, write_files, write_weights
from kvfold.checkpoint.source import Source, open_source, read_layer
from kvfold.compression.deepseek_config import EPSILONS, attention_scaling, deepseek_config, dtype_of, epsilon_of
from kvfold.errors import BudgetError, CheckpointError
from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.decoupled_rotation import decouple
from kvfold.linalg.eigen import Moment
from kvfold.linalg.reduced_rank import Term, solve
from kvfold.linalg.sensitivity import METRIC, WEIGHTED
from kvfold.methods.width.mla import BOTH, Mla
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.rounding import whole
from kvfold.runtimes.transformers.load import resolve_device

SMALL = 1e-7
"""Of latents, in the mean: far below the root of the epsilon of DeepSeek's norm, which so passes them times a factor."""
DISTANCE = 4096
"""Tokens that queries look back, at most."""
CARD = """# {name}

Exported by kvfold from `{source}`: multi-head latent attention, {width} numbers per token and layer where the original caches
{before}. This is an ordinary `DeepseekV3ForCausalLM`; nothing of kvfold is needed. It was not trained after it was made.
"""


def export_mla(
    model: str | Path,
    out: str | Path,
    *,
    kv_budget: float,
    calibration: Mapping[str, Any],
    run_dir: str | Path | None = None,
    published: bool = False,
    runtime: str | None = None,
    overwrite: bool = False,
    device: str = "cpu",
) -> int:
    """Write `out`, and return how many numbers it caches per token and layer. published: mix heads as TransMLA does. runtime:
    which is to read it, where they differ: transformers, or vllm as servers do.

    Raises CheckpointError where the model is none of Llama's type or the runtime would read it wrongly, RecipeError where
    runtimes differ and none is named, BudgetError where one rotated head does not fit.
    """
    source, out, device = open_source(model), Path(os.path.abspath(out)), resolve_device(device)
    _check(source)
    epsilon = epsilon_of(source, runtime)
    layer = source.layers[0]
    rank, scaling = rank_of(layer, kv_budget), attention_scaling(source)
    run_dir = Path(run_dir) if run_dir else Path(f"{out}.run")
    refuse_out(out, overwrite, keep=(source.checkpoint.path, run_dir))
    names = frozenset({METRIC + BOTH, WEIGHTED + BOTH})
    asked = Material(Calibration(**calibration), source, run_dir, Mla(rope="on_read", below=0), "export", device=device)
    statistics = asked.statistics(names)
    assert statistics is not None, "the method asks for moments"
    of_whom = {"model": source.checkpoint.fingerprint(), "text": statistics.folder.name}
    identity = fingerprint(export="mla", rank=rank, published=published, epsilon=epsilon, **of_whom)
    with new_folder(out, identity, overwrite=overwrite) as partial:

        def tensors(names_of_file: list[str]) -> dict[str, Tensor]:
            copied = {name: source.checkpoint.read(name) for name in names_of_file if name in source.checkpoint.tensors}
            made = (index for index in range(len(source.layers)) if _names(source, index)[0] in names_of_file)
            for index in made:
                copied |= _layer(source, index, statistics.layer(index, names), rank, published, epsilon, scaling)
            return copied

        write_weights(partial, _files(source), tensors)
        facts = {"name": out.name, "source": model, "width": rank + layer.head_dim}
        write_files(
            partial,
            {
                "config.json": deepseek_config(source, rank, scaling),
                "README.md": CARD.format(before=2 * layer.num_kv_heads * layer.head_dim, **facts),
                EXPORT_MARKER: {"format": "mla", "source": str(model)},
            },
            beside=source.checkpoint,
        )
    return rank + layer.head_dim


def rank_of(layer: AttentionLayer, kv_budget: float) -> int:
    """Numbers of the latent that leaves a rotated head in the budget. Raises BudgetError."""
    if not 0 < kv_budget <= 1:
        raise BudgetError(
            f"kv_budget is {kv_budget}; it is a share of the original cache's bytes, above 0 and at most 1."
        )
    numbers = 2 * layer.num_kv_heads * layer.head_dim
    rank = whole(kv_budget * numbers) - layer.head_dim
    if rank < 1:
        least = (layer.head_dim + 1) / numbers
        raise BudgetError(
            f"kv_budget {kv_budget:.4g} leaves nothing beside the rotated head; the least is {least:.4g}."
        )
    return rank


def _check(source: Source) -> None:
    layer, config = source.layers[0], source.checkpoint.config
    plain = config.get("hidden_act", "silu") == "silu" and not config.get("mlp_bias")
    wrong = {
        "biases of attention": layer.qkv_bias or layer.o_bias,
        "norms of queries and keys": layer.qk_norm,
        "another MLP than Llama's": source.arch.mlp_in != ("mlp.gate_proj", "mlp.up_proj") or not plain,
        "rotation of a part, of neighbours or of no numbers": layer.rotary_dim != layer.head_dim or layer.interleaved,
        "a rotation whose tables change": not layer.rotary_speeds,
        "sliding windows": any(x.window for x in source.layers),
        "capped scores": layer.softcap is not None,
        "experts": bool(source.arch.experts),
        "factors of its own (embedding_multiplier and the like)": any("multiplier" in name for name in config),
        "quantized weights": bool(source.checkpoint.packed),
    }
    if found := [name for name, is_so in wrong.items() if is_so]:
        raise CheckpointError(
            f"{source.arch.model_type} models with {found[0]} have no place in DeepSeek's class; llama and mistral models do."
        )


MADE = ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
"""Of a layer's attention."""


def _names(source: Source, index: int) -> list[str]:
    return [f"{source.arch.attention_prefix(index)}{name}.weight" for name in MADE]


def _files(source: Source) -> dict[str, str]:
    """Name -> file: one for each layer, and the first for all else, which keeps its name."""
    layers = range(len(source.layers))
    file = {index: f"model-{index + 2:05d}-of-{len(layers) + 1:05d}.safetensors" for index in range(-1, len(layers))}
    attention = tuple(map(source.arch.attention_prefix, layers))
    found = {name: file[index] for index in layers for name in _names(source, index)}
    for name in source.checkpoint.tensors:
        if not name.startswith(attention):
            found[name] = file[next((i for i in layers if name.startswith(source.arch.prefix(i))), -1)]
    return found


def _layer(
    source: Source,
    index: int,
    moments: Mapping[str, Moment],
    rank: int,
    published: bool,
    epsilon: float,
    scaling: float,
) -> dict[str, Tensor]:
    layer = source.layers[index]
    dtype = getattr(torch, dtype_of(source, layer))
    weights = read_layer(source.checkpoint, source.arch, layer)
    made = mla_weights(layer, weights, moments, rank, published, epsilon, scaling)
    return {name: made[part].to(dtype).contiguous() for name, part in zip(_names(source, index), MADE, strict=True)}


def mla_weights(
    layer: AttentionLayer,
    weights: AttentionWeights,
    moments: Mapping[str, Moment],
    rank: int,
    published: bool = False,
    epsilon: float = EPSILONS["transformers"],
    scaling: float = 1.0,
) -> dict[str, Tensor]:
    """Of one layer, by DeepSeek's names, in float64. moments: of keys before rotation and values, and of what errors cost.
    scaling: of cosines and sines (YaRN), which in DeepSeek's class do not scale what is left unrotated."""
    K, N, H = layer.num_kv_heads, layer.num_attention_heads, layer.head_dim
    metric, second_FF = BlockDiagonal(moments[METRIC + BOTH].second_FF), moments[WEIGHTED + BOTH].second_FF
    costs_KH = metric.dense().diagonal()[: K * H].unflatten(0, (K, H))
    parts = decouple(second_FF[: K * H, : K * H], costs_KH, layer.rotary_speeds, DISTANCE, published=published)
    made_FF = torch.block_diag(parts.rest_FF, torch.eye(K * H, dtype=torch.float64))
    wanted_FF = made_FF @ second_FF @ made_FF.T
    latents = solve(lambda _: Term(wanted_FF, wanted_FF, metric), 1, 1, rank)
    a_RF, back_FR = latents.a_CRF[0] @ made_FF, latents.back(0)[0]
    stored_RD = a_RF @ torch.cat([weights.k_proj, weights.v_proj])
    size = (a_RF @ second_FF @ a_RF.T).trace().clamp_min(1e-300).div(rank).sqrt()
    pairs = torch.arange(H).view(2, -1).T.flatten()  # DeepSeek's rotation turns neighbours
    q_NHD = weights.q_proj.unflatten(0, (N, H)) * layer.scaling * (2 * H) ** 0.5
    back_NHH = parts.back_KHH.repeat_interleave(N // K, 0)
    rotated_NHD = (back_NHH.mT @ q_NHD)[:, pairs]
    up_KHR, v_KHR = (x.unflatten(0, (K, H)) for x in back_FR.chunk(2))
    of_heads = torch.cat([up_KHR, v_KHR], 1).repeat_interleave(N // K, 0)
    return {
        "q_proj": torch.cat([parts.phase_HH @ q_NHD * scaling**2, rotated_NHD], 1).flatten(0, 1),
        "kv_a_proj_with_mqa": torch.cat([stored_RD * (SMALL / size), (parts.shared_HF @ weights.k_proj)[pairs]]),
        "kv_a_layernorm": torch.full((rank,), float(epsilon**0.5 / (SMALL / size)), dtype=torch.float64),
        "kv_b_proj": of_heads.flatten(0, 1),
        "o_proj": weights.o_proj,
    }
