"""The two ways through a model with one layer in memory at a time: up, and, with gradients, up and down again.

Both write down how far they are, so that an interrupted run goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kvfold import distributed as processes
from kvfold.calibration.cross_moments import CrossMoments
from kvfold.calibration.layerwise_model import StreamedModel, ignore
from kvfold.checkpoint.atomic import write_tensors
from kvfold.plan.layer import AttentionLayer
from kvfold.progress import say_if_long, track

SECONDS_BETWEEN_SAVES = 60.0
"""How often the state of all sequences is written, for an interrupted run to go on from."""

DOWN_COSTS = 3.5
"""Time of a layer on the way down, per time on the way up: it runs again, then gradients, then their fit."""

Observers = Callable[[AttentionLayer], Any]
"""What looks at one layer: a function of what passes there (Seen)."""
Keep = Callable[[Any], None]


@dataclass
class Passes:
    """The passes of this process's sequences. `folder` holds what a later run goes on from; `dtype` is the one in which
    hidden states wait for the way down: the checkpoint's, which the model itself carries between layers."""

    model: StreamedModel
    tokens_BT: Tensor
    folder: Path
    cross: CrossMoments
    dtype: torch.dtype
    saved: float = field(default_factory=time.monotonic)

    @torch.no_grad()
    def up(self, observer: Observers, keep: Keep) -> None:
        """Every layer once, from the first to the last; `keep` gets each layer's observer when it has seen everything."""
        first, hidden_BTD = self._resumed("hidden")
        hidden_BTD = self._embedded(hidden_BTD)
        for layer in track(self.model.layers[first:], "calibrating layers", len(self.model.layers) - first):
            watching = observer(layer)
            self.cross.start(layer.index)
            with self._forecast(layer, 1.0):
                self.model.advance(layer, hidden_BTD, watching)
            keep(watching)
            self.cross.forget_after(layer.index)
            kept = {
                f"{label}/{i:06d}": part for label, parts in self.cross.kept.items() for i, part in enumerate(parts)
            }
            self._save("hidden", layer.index + 1, {"hidden": hidden_BTD} | kept)

    @torch.no_grad()
    def down(self, observer: Observers, keep: Keep, draws_BT: Tensor) -> None:
        """Every layer from the last to the first, with the gradients of labels that `draws_BT` draw."""
        last, gradient_BTD = self._resumed("gradient")
        hidden_BTD = self._ascended()
        if gradient_BTD is None:
            last, gradient_BTD = (
                len(self.model.layers),
                self.model.label_gradients(self.tokens_BT, hidden_BTD, draws_BT),
            )
        for layer in track(self.model.layers[:last][::-1], "weighing errors", last):
            watching = observer(layer)
            self.model.retreat(layer, self._entering(layer.index), gradient_BTD, watching)
            keep(watching)
            self._save("gradient", layer.index, {"gradient": gradient_BTD})

    def forget(self) -> None:
        """Remove what only an interrupted run needs."""
        for name in ("hidden", "gradient", *(f"entering-{i:05d}" for i in range(len(self.model.layers) + 1))):
            self._file(name).unlink(missing_ok=True)

    def _ascended(self) -> Tensor:
        """The hidden states that leave the last layer; what enters every layer is on disk then."""
        layers = len(self.model.layers)
        first = max((i for i in range(layers + 1) if self._file(f"entering-{i:05d}").exists()), default=0)
        first = min(processes.values_of_all(first))
        hidden_BTD = self._embedded(self._entering(first) if first else None)
        for layer in track(self.model.layers[first:], "running layers", layers - first):
            self._write_entering(layer.index, hidden_BTD)
            with self._forecast(layer, 1.0 + DOWN_COSTS):
                self.model.advance(layer, hidden_BTD, ignore)
        self._write_entering(layers, hidden_BTD)
        return hidden_BTD

    def _embedded(self, hidden_BTD: Tensor | None) -> Tensor:
        """Hidden states that enter the first layer, unless later ones are known. Masks and rotary tables are the same for
        every sequence: a resumed run needs one to make them again."""
        embedded_BTD = self.model.embed(self.tokens_BT if hidden_BTD is None else self.tokens_BT[:1])
        return embedded_BTD if hidden_BTD is None else hidden_BTD

    def _forecast(self, layer: AttentionLayer, costs: float) -> AbstractContextManager[None]:
        times = costs * len(self.model.layers) if not layer.index else 0.0
        return say_if_long(f"calibrating on {self.tokens_BT.shape[0]} x {self.tokens_BT.shape[1]} tokens", times)

    def _write_entering(self, layer: int, hidden_BTD: Tensor) -> None:
        write_tensors(self._file(f"entering-{layer:05d}"), {"hidden": hidden_BTD.to(self.dtype)}, {})

    def _entering(self, layer: int) -> Tensor:
        return load_file(self._file(f"entering-{layer:05d}"))["hidden"].float()

    def _save(self, name: str, layer: int, tensors: dict[str, Tensor]) -> None:
        """Once in a while; layer: the next one, or on the way down the last that is done."""
        if any(processes.values_of_all(time.monotonic() - self.saved >= SECONDS_BETWEEN_SAVES)):
            write_tensors(self._file(name), tensors, {"layer": str(layer)})
            self.saved = time.monotonic()

    def _resumed(self, name: str) -> tuple[int, Tensor | None]:
        """The layer that an interrupted run had come to, and its state; 0 and None where it had written nothing."""
        file, layer = self._file(name), 0
        if file.exists():
            with safe_open(file, framework="pt") as tensors:
                layer = int(tensors.metadata()["layer"])
        if processes.values_of_all(layer) != {layer} or not layer:
            return 0, None  # killed before all had written
        with safe_open(file, framework="pt") as tensors:
            for label in sorted(set(tensors.keys()) - {name}):
                self.cross.kept.setdefault(label.partition("/")[0], []).append(tensors.get_tensor(label).clone())
            return layer, tensors.get_tensor(name).clone()

    def _file(self, name: str) -> Path:
        """Of this process."""
        own = "" if processes.world_size() == 1 else f"-{processes.rank()}-of-{processes.world_size()}"
        return self.folder / f"{name}{own}.safetensors"


def layer_file(folder: Path, layer: int) -> Path:
    """What a pass found of one layer: written when the layer has run, so that an interrupted run goes on with the others."""
    return folder / f"layer-{layer:05d}.safetensors"
