"""What one cache costs the model: KL of the final distribution when only one side of one cache is folded.

Expected distortions are comparable within a layer and a side, not between them. A few measured points per curve make them so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvfold.checkpoint.atomic import make_folder, write_text
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.reader import read_json
from kvfold.checkpoint.source import Source
from kvfold.compression.allocate import expected_curve
from kvfold.compression.fold import Folds, folded_weights
from kvfold.compression.hulls import Curve, Curves
from kvfold.compression.prediction import Prediction
from kvfold.compression.request import Groups, Request
from kvfold.methods.bits.base import shared_energy
from kvfold.methods.width.base import WidthMethod, method_name
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.number_format import NumberFormat, StoredShape
from kvfold.plan.plan import CachePlan
from kvfold.progress import track
from kvfold.runtimes.kernels.codec import roundtrip
from kvfold.runtimes.transformers.attention import FoldedAttention
from kvfold.runtimes.transformers.forward_state import CURRENT_STATE, ForwardState
from kvfold.runtimes.transformers.load import default_dtype, load_weights

PROBE_VERSION = 4
"""To be raised when something is measured differently, so that what is on disk is not taken for it."""

PROBE_TOKENS = 4096
"""Calibration tokens on which KL is measured."""
TOKENS_PER_BATCH = 2048
SIZES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Where it is measured, as shares of the bytes of a side."""
NOISE_BITS = 3
"""Of the measurement that compares quantization with leaving numbers out."""
MOST_NOISE = 16.0
"""Their ratio is not trusted further than this."""
LEAST = 1e-12
"""KL below which nothing can be measured."""


class Probe:
    """The original model, in which some caches are folded. What was measured is kept in `file`: it serves other budgets, and
    the same run after an interruption. Needs the whole model in memory, in the dtype that evaluation uses."""

    def __init__(
        self, source: Source, request: Request, groups: Groups, *, tokens_BT: Tensor, file: Path, device: str
    ) -> None:
        self.source, self.request, self.groups, self.device = source, request, groups, device
        self.width = request.axes.width
        tokens_BT = tokens_BT[: max(PROBE_TOKENS // tokens_BT.shape[1], 1)]
        self.batches = tokens_BT.split(max(TOKENS_PER_BATCH // tokens_BT.shape[1], 1))
        self.tokens = tokens_BT.numel()
        make_folder(file.parent)
        self.file = file
        self.known: dict[str, float] = read_json(file) if file.exists() else {}

    def curves(self) -> Curves:
        """What every side can store, with the KL of storing it so while all others are as they were."""
        keys = list(self.request.options)
        return {key: self._curve(*key) for key in track(keys, "probing", len(keys))}

    def kl_of(self, plan: CachePlan, width: WidthMethod | None = None) -> float:
        """KL of a whole plan, in nats per token. width: the method that it is of, unless it is the one of the request."""
        width = width or self.width
        label = fingerprint(width=method_name(width), plan=plan.to_dict())
        specs = {i: spec for i, spec in enumerate(plan.caches) if spec is not None}
        return self._known(label, specs, Prediction(self.groups, plan, width).folded)

    @functools.cached_property
    def model(self) -> Any:
        return load_weights(self.source.checkpoint.path, default_dtype(self.source.dtype, self.device), self.device)

    @functools.cached_property
    def original(self) -> list[Tensor]:
        """Log-probabilities of every batch."""
        return [self._log_probs(batch) for batch in self.batches]

    def _curve(self, owner: int, side: str) -> Curve:
        """KL is measured at SIZES; elsewhere expected distortion gives the form, as power laws between measured points."""
        noise = 1.0
        if self.request.axes.bits.by_spectrum and owner not in self.request.limits.keep_layers:
            noise = self._noise(owner, side)
        points = expected_curve(self.request, self.groups, owner, side, noise)
        full = self.request.cost((owner, side), self.request.shapes(self.request.layers[owner], side)[-1])
        costs = [self.request.cost((owner, side), shape) for shape, _ in points]
        wanted = {min(range(len(points)), key=lambda i: abs(math.log(costs[i] / (share * full)))) for share in SIZES}
        wanted |= {len(points) - 1}  # where numbers are quantized not even all of them lose nothing
        measured = {i: self.of_side(owner, side, points[i][0]) for i in sorted(wanted) if points[i][1] > LEAST}
        kls = interpolate([distortion for _, distortion in points], measured)
        return [(shape, kl) for (shape, _), kl in zip(points, kls, strict=True)]

    def _noise(self, owner: int, side: str) -> float:
        """KL per expected distortion of quantization, over that of leaving numbers out, at about the same distortion."""
        group, shapes = self.groups(owner), self.request.shapes(self.request.layers[owner], side)
        spectrum = self.width.spectrum(side, group, shapes[-1].num_heads)
        format = NumberFormat(tiers=((shapes[-1].width, NOISE_BITS),))
        elements = torch.randn(1, 1, 256, shapes[-1].width, generator=torch.Generator().manual_seed(0))
        share = float((roundtrip(elements, format) - elements).square().mean())
        lost = share * float(shared_energy(spectrum, np.array(0), np.array(len(spectrum))))
        distortion, shape = min(
            zip(self.width.distortion(side, group, shapes), shapes, strict=True),
            key=lambda point: abs(math.log(max(point[0], LEAST) / lost)),
        )
        if distortion <= LEAST:  # numbers without rank: there is nothing to leave out
            return 1.0
        noisy = self.of_side(owner, side, shapes[-1]._replace(format=format)) / lost
        return min(max(noisy / (self.of_side(owner, side, shape) / distortion), 1 / MOST_NOISE), MOST_NOISE)

    def of_side(self, owner: int, side: str, shape: StoredShape) -> float:
        """KL of storing one side so, all else being as it was."""
        layer = self.request.layers[owner]
        # the other side loses nothing: the widest shape of all, whatever a runtime would serve
        whole = {(owner, other): self.request.widest(layer, other) for other in self.request.parts}
        chosen = whole | {(owner, side): shape}
        format = "" if shape.format is None else f" {dataclasses.astuple(shape.format)}"
        label = f"{owner} {side} {shape.num_heads}x{shape.width}{format}"
        spec = self.request.spec(layer, chosen)
        return self._known(label, {owner: spec}, lambda i: folded_weights(self.width, self.groups(i), spec))

    def _known(self, label: str, specs: Mapping[int, CacheSpec], folded: Folds) -> float:
        if label not in self.known:
            self.known[label] = self._kl(specs, folded)
            write_text(self.file, json.dumps(self.known))
        return self.known[label]

    @torch.no_grad()
    def _kl(self, specs: Mapping[int, CacheSpec], folded: Folds) -> float:
        before = self.original  # made while the model is still itself
        stock = dict(enumerate(self.source.arch.modules(self.model)))
        try:
            for owner, spec in specs.items():
                self._fold(owner, spec, folded, stock)
            after = [self._log_probs(batch) for batch in self.batches]
        finally:
            for index, module in stock.items():
                self._put(index, module)
        pairs = zip(before, after, strict=True)
        kl = sum(F.kl_div(now, then, log_target=True, reduction="sum").item() for then, now in pairs)
        return max(kl / self.tokens, LEAST)

    def _fold(self, owner: int, spec: CacheSpec, folded: Folds, stock: Mapping[int, nn.Module]) -> None:
        for layer, weights in zip(self.groups(owner).layers, folded(owner), strict=True):
            old = stock[layer.index]
            weight = next(old.parameters())
            options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
            new = FoldedAttention(self.model.config, layer, spec, self.source.arch.norms(old), owner, **options)
            stored = weights.state_dict(getattr(torch, self.source.dtype))  # what is rounded there is lost here too
            new.load_state_dict({name: tensor.to(weight.dtype) for name, tensor in stored.items()})
            self._put(layer.index, new.eval())

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


def interpolate(distortions: Sequence[float], measured: dict[int, float]) -> list[float]:
    """KL at every distortion, from the KL at some: log KL is piecewise linear in log distortion, in proportion beyond.

    It never rises with more bytes, and what is expected to lose nothing loses nothing.
    """
    if not measured:
        return list(distortions)
    logs = np.log(np.maximum(distortions, LEAST))
    at = sorted(measured, reverse=True)  # from little distortion to much
    x, y = logs[at], np.maximum.accumulate([math.log(measured[i]) for i in at])
    kls = np.exp(np.interp(logs, x, y) + np.clip(logs - x[-1], 0, None) + np.clip(logs - x[0], None, 0))
    kls[np.asarray(distortions) <= LEAST] = 0.0
    return np.minimum.accumulate(kls).tolist()
