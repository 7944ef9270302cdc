"""Moments between two layers, gathered while only one of them is in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvfold.linalg.eigen import outer_sum


@dataclass
class CrossMoments:
    """E[x_layer x_earlier^T] for `pairs` of (layer, earlier layer) and the statistics `needs`.

    The vectors of a layer are kept, in float32 on the CPU, until the last layer that is paired with it has passed.
    """

    pairs: frozenset[tuple[int, int]]
    needs: frozenset[str]
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    layer: int = -1

    def __post_init__(self) -> None:
        self.needs = self.needs if self.pairs else frozenset()

    @property
    def labels(self) -> frozenset[str]:
        """What is gathered, for statistics on disk to be found again."""
        return frozenset(f"{name}.cross.{later}-{earlier}" for name in self.needs for later, earlier in self.pairs)

    def most_kept(self) -> int:
        """Layers whose vectors are kept at once, at most."""
        layers = range(max((later for later, _ in self.pairs), default=0) + 1)
        return max(len({early for later, early in self.pairs if early <= layer < later}) for layer in layers)

    def start(self, layer: int) -> None:
        self.layer, self.sums, self.seen = layer, {}, {}

    def observe(self, name: str, vectors_TF: Tensor) -> None:
        """Take the next batch of the current layer's vectors; batches come in the same order in every layer."""
        part = self.seen.get(name, 0)
        self.seen[name] = part + 1
        for layer, earlier in self.pairs:
            if layer == self.layer:
                other = self.kept[f"{name}.{earlier}"][part].to(vectors_TF.device, torch.float64)
                label = f"{name}.cross.{earlier}"
                self.sums[label] = self.sums.get(label, 0) + outer_sum(vectors_TF.double(), other)
        if any(earlier == self.layer for _, earlier in self.pairs):
            self.kept.setdefault(f"{name}.{self.layer}", []).append(vectors_TF.float().cpu())

    def moments(self, tokens: int) -> dict[str, Tensor]:
        """Those of the current layer, by their names on disk."""
        return {label: (total / tokens).cpu() for label, total in self.sums.items()}

    def forget_after(self, layer: int) -> None:
        """Let go of layers that no later one is paired with."""
        wanted = {earlier for later, earlier in self.pairs if later > layer}
        self.kept = {label: parts for label, parts in self.kept.items() if int(label.rpartition(".")[2]) in wanted}
