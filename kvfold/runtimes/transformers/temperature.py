"""Queries that grow with their position (scalable softmax, arXiv 2501.19399, in steps)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.transformers.forward_state import ForwardState


def tempered(layer: AttentionLayer, q_BNTH: Tensor, state: ForwardState | None, cache: Any) -> Tensor:
    """Queries as they meet keys. Positions are those of the model's own rotary tables, so that padding does not count."""
    if layer.temperature is None:
        return q_BNTH
    factors_BT = temperatures(layer.temperature, _positions(layer, q_BNTH, state, cache))
    return (q_BNTH * factors_BT[:, None, :, None].to(q_BNTH.device)).to(q_BNTH.dtype)


def temperatures(temperature: tuple[float, int], positions_BT: Tensor) -> Tensor:
    """[B, T] in float32: 1 + scale * log(1 + n), where n whole floors were passed."""
    scale, floor = temperature
    passed_BT = torch.floor((positions_BT.float() + 1) / floor)
    return torch.log1p(passed_BT) * scale + 1


def _positions(layer: AttentionLayer, q_BNTH: Tensor, state: ForwardState | None, cache: Any) -> Tensor:
    """[B or 1, T]; from 0 on where no model told them and nothing is cached."""
    if state is not None and state.along_ABT is not None:
        return state.along_ABT
    if cache is not None:
        raise ValueError(f"layer {layer.index} needs positions; call the whole ...ForCausalLM model, not a part of it.")
    return torch.arange(q_BNTH.shape[2], device=q_BNTH.device)[None]
