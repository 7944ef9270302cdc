"""What one cache costs the model: KL of the final distribution when only one side of one cache is folded.

Expected damages are comparable within a layer and a side, not between them. A few measured points per curve make them so.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvfold.allocate import Curves, Groups
from kvfold.checkpoint import read_json
from kvfold.loading import Source, default_dtype, load_weights
from kvfold.progress import track
from kvfold.runtime.attention import CURRENT_STATE, FoldedAttention, ForwardState
from kvfold.storage import make_folder, write_text
from kvfold.width.base import StoredShape, WidthMethod

PROBE_TOKENS = 4096
"""Calibration tokens on which KL is measured."""
TOKENS_PER_BATCH = 2048
SIZES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Where it is measured, as shares of the numbers that lose nothing."""
LEAST = 1e-12
"""KL below which nothing can be measured."""


def measure_curves(
    source: Source, width: WidthMethod, curves: Curves, groups: Groups, *, tokens_BT: Tensor, file: Path, device: str
) -> Curves:
    """Curves of (shape, KL) in place of `curves` of (shape, expected damage), which give the form between measured points.

    Needs the whole model in memory, in the dtype that evaluation uses. What was measured is kept in `file`: it serves other
    budgets, and the same run after an interruption.
    """
    make_folder(file.parent)
    rows = max(PROBE_TOKENS // tokens_BT.shape[1], 1)
    probe = _Probe(source, width, groups, tokens_BT[:rows], device, read_json(file) if file.exists() else {})
    measured = {}
    for key, points in track(curves.items(), "probing", len(curves)):
        measured[key] = probe.curve(*key, points)
        write_text(file, json.dumps(probe.known))
    return measured


class _Probe:
    """The original model, in which one cache at a time is folded. `known`: what was measured already."""

    def __init__(
        self,
        source: Source,
        width: WidthMethod,
        groups: Groups,
        tokens_BT: Tensor,
        device: str,
        known: dict[str, float],
    ) -> None:
        self.source, self.width, self.groups, self.device, self.known = source, width, groups, device, known
        self.batches = tokens_BT.split(max(TOKENS_PER_BATCH // tokens_BT.shape[1], 1))
        self.tokens = tokens_BT.numel()

    @functools.cached_property
    def model(self) -> Any:
        return load_weights(self.source.checkpoint.path, default_dtype(self.source.dtype, self.device), self.device)

    @functools.cached_property
    def original(self) -> list[Tensor]:
        """Log-probabilities of every batch."""
        return [self._log_probs(batch) for batch in self.batches]

    def curve(
        self, owner: int, side: str, points: Sequence[tuple[StoredShape, float]]
    ) -> list[tuple[StoredShape, float]]:
        """KL of every point: measured at SIZES, elsewhere by the expected damage, as power laws between measured points."""
        full = points[-1][0].numbers
        wanted = {min(range(len(points)), key=lambda i: abs(points[i][0].numbers - share * full)) for share in SIZES}
        measured = {}
        for i in sorted(wanted - {len(points) - 1}):  # the last loses nothing
            label = f"{owner} {side} {points[i][0].num_heads}x{points[i][0].width}"
            if label not in self.known:
                self.known[label] = self._kl(owner, side, points[i][0])
            measured[i] = self.known[label]
        kls = interpolate([damage for _, damage in points], measured)
        return [(shape, kl) for (shape, _), kl in zip(points, kls, strict=True)]

    @torch.no_grad()
    def _kl(self, owner: int, side: str, shape: StoredShape) -> float:
        before, group = self.original, self.groups(owner)  # `original` is made while the model is still itself
        other = (self.width.value_shapes if side == "keys" else self.width.key_shapes)(group.owner, len(group))[-1]
        keys, values = (shape, other) if side == "keys" else (other, shape)
        spec = self.width.spec(group.owner, keys, values)
        stock = {layer.index: self.source.arch.modules(self.model)[layer.index] for layer in group.layers}
        for layer, folded in zip(group.layers, self.width.fold(group, spec), strict=True):
            old = stock[layer.index]
            weight = next(old.parameters())
            options = {"device": weight.device, "dtype": weight.dtype}
            new = FoldedAttention(self.model.config, layer, spec, self.source.arch.norms(old), owner, **options)
            new.load_state_dict(folded.state_dict(weight.dtype))
            self._put(layer.index, new.eval())
        try:
            after = [self._log_probs(batch) for batch in self.batches]
        finally:
            for index, module in stock.items():
                self._put(index, module)
        pairs = zip(before, after, strict=True)
        kl = sum(F.kl_div(now, then, log_target=True, reduction="sum").item() for then, now in pairs)
        return max(kl / self.tokens, LEAST)

    def _log_probs(self, tokens_BT: Tensor) -> Tensor:
        token = CURRENT_STATE.set(ForwardState())  # readers find what owners wrote
        try:
            with torch.no_grad():
                logits = self.model(tokens_BT.to(self.model.device), use_cache=False).logits
        finally:
            CURRENT_STATE.reset(token)
        return logits.float().log_softmax(-1)

    def _put(self, index: int, module: nn.Module) -> None:
        setattr(
            self.model.get_submodule(self.source.arch.prefix(index).rstrip(".")), self.source.arch.attention, module
        )


def interpolate(damages: Sequence[float], measured: dict[int, float]) -> list[float]:
    """KL at every damage, from the KL at some: log KL is piecewise linear in log damage, and goes on in proportion beyond.

    It never rises with more numbers, and the last point loses nothing.
    """
    if not measured:
        return list(damages)
    logs = np.log(np.maximum(damages, LEAST))
    at = sorted(measured, reverse=True)  # from little damage to much
    x, y = logs[at], np.maximum.accumulate([math.log(measured[i]) for i in at])
    kls = np.exp(np.interp(logs, x, y) + np.clip(logs - x[-1], 0, None) + np.clip(logs - x[0], None, 0))
    kls[-1] = 0.0
    return np.minimum.accumulate(kls).tolist()
