"""Checkpoint + tokens -> Statistics: streamed second moments, with one layer of the model in memory at a time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kvfold import processes
from kvfold.architectures.base import Architecture
from kvfold.attention import AttentionLayer
from kvfold.checkpoint import Checkpoint, read_json
from kvfold.cross_moments import CrossMoments
from kvfold.errors import DataError
from kvfold.fold import read_layer
from kvfold.linalg import Moment
from kvfold.movement import Halves
from kvfold.progress import track
from kvfold.seen import EFFECTS, VECTORS, Attended, Seen
from kvfold.storage import make_folder, require_space, write_tensors, write_text
from kvfold.streaming import StreamedModel

SECONDS_BETWEEN_SAVES = 60.0
"""How often the hidden states of all sequences are written, for an interrupted run to go on from."""

STATISTICS_VERSION = 4
"""To be raised when a statistic is computed differently, so that old ones on disk are not taken for new ones."""

STATISTICS = frozenset({*VECTORS, *EFFECTS})
"""What can be gathered of a layer; `seen.py` says what each is the moment of."""

FINISHED = "statistics.json"


@dataclass(frozen=True)
class Statistics:
    """Moments of every layer, on disk in `folder`, read one layer at a time. `tokens` is how many went in.

    `moved`: how far the leading directions of the first, a middle and the last layer differ between the two halves of the
    text (see `movement.py`).
    """

    folder: Path
    tokens: int
    moved: float = 0.0

    def layer(self, index: int, needs: Iterable[str]) -> dict[str, Moment]:
        moments = {}
        with safe_open(_layer_file(self.folder, index), framework="pt") as file:
            for name in sorted(needs):
                mean, second = file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.second")
                moments[name] = Moment(mean.clone(), second.clone(), self.tokens)
        return moments

    def cross(self, layer: int, earlier: int, needs: Iterable[str]) -> dict[str, Tensor]:
        """E[x_layer x_earlier^T] of each statistic."""
        with safe_open(_layer_file(self.folder, layer), framework="pt") as file:
            return {name: file.get_tensor(f"{name}.cross.{earlier}").clone() for name in sorted(needs)}


def calibrate(
    checkpoint: Checkpoint,
    arch: Architecture,
    tokens_BT: Tensor,
    *,
    needs: frozenset[str],
    run_dir: Path,
    pairs: Iterable[tuple[int, int]] = (),
    needs_cross: frozenset[str] = frozenset(),
    device: str = "cpu",
) -> Statistics:
    """Moments of all layers over the given sequences, in float64.

    `pairs`: (layer, earlier layer) between which the moments of `needs_cross` are gathered as well. All are kept in
    `run_dir` and reused whenever model and tokens are the same; an interrupted run continues where
    it last wrote its hidden states. Peak memory: the hidden states, one layer in float32 and its moments, and the vectors
    of layers that a later one is paired with. Several processes share the sequences, and add up what they saw.
    """
    cross = CrossMoments(frozenset(pairs), needs_cross)
    key, wanted = _key(checkpoint, tokens_BT), needs | cross.labels
    if (finished := _finished(run_dir, key, wanted)) is not None:
        return Statistics(finished, tokens_BT.numel(), read_json(finished / FINISHED)["moved"])
    folder = run_dir / f"statistics-{key}-{_short('+'.join(sorted(wanted)))}"
    make_folder(folder)
    total, tokens_BT = tokens_BT.numel(), _own(tokens_BT)
    model = StreamedModel(checkpoint, arch, device)
    size = max(x.num_kv_heads * x.head_dim for x in model.layers)
    matrices = len(needs) * len(model.layers) + len(cross.labels)
    numbers_per_token = model.layers[0].hidden_size + size * len(cross.needs) * cross.most_kept()
    require_space(folder, 8 * matrices * size**2 + 4 * numbers_per_token * tokens_BT.numel())
    with torch.no_grad():
        resumed = _resume(folder, cross)
        # masks and rotary tables are the same for every sequence: a resumed run needs one to make them again
        hidden_BTD = model.embed(tokens_BT if resumed is None else tokens_BT[:1])
        first, hidden_BTD = resumed or (0, hidden_BTD)
        saved = time.monotonic()
        for layer in track(model.layers[first:], "calibrating layers", len(model.layers) - first):
            observer = _Observer(
                needs, cross, device, layer, _output_metric(checkpoint, arch, layer, needs), len(tokens_BT)
            )
            cross.start(layer.index)
            model.advance(layer, hidden_BTD, observer)
            observer.gather()
            if not processes.rank():
                moved = observer.halves.moved(observer.own) if layer.index in _watched(len(model.layers)) else 0.0
                write_tensors(_layer_file(folder, layer.index), observer.moments(total), {"moved": repr(moved)})
            cross.forget_after(layer.index)
            if any(processes.values_of_all(time.monotonic() - saved >= SECONDS_BETWEEN_SAVES)):
                _save_hidden(folder, layer.index + 1, hidden_BTD, cross)
                saved = time.monotonic()
    if not processes.rank():
        moved = max(_moved(_layer_file(folder, index)) for index in _watched(len(model.layers)))
        write_text(folder / FINISHED, json.dumps({"needs": sorted(wanted), "tokens": total, "moved": moved}))
    processes.wait_for_all()
    _hidden_file(folder).unlink(missing_ok=True)
    return Statistics(folder, total, read_json(folder / FINISHED)["moved"])


def _own(tokens_BT: Tensor) -> Tensor:
    """The sequences that this process looks at. Raises DataError where there is none for some."""
    if len(tokens_BT) < processes.world_size():
        raise DataError(
            f"{len(tokens_BT)} calibration sequences for {processes.world_size()} processes; start fewer, or give more"
            " text (--num-samples)."
        )
    return tokens_BT[processes.rank() :: processes.world_size()]


def _watched(layers: int) -> set[int]:
    """The layers whose movement stands for all."""
    return {0, layers // 2, layers - 1}


def _moved(file: Path) -> float:
    with safe_open(file, framework="pt") as tensors:
        return float(tensors.metadata()["moved"])


class _Observer:
    """Gathers the moments of one layer, batch by batch."""

    def __init__(
        self,
        needs: frozenset[str],
        cross: CrossMoments,
        device: str,
        layer: AttentionLayer,
        output_NHH: Tensor,
        sequences: int,
    ) -> None:
        self.halves = Halves(sequences)
        self.needs, self.cross, self.device = needs, cross, device
        self.layer, self.output_NHH = layer, output_NHH.to(device)
        self.own: dict[str, Moment] = {}

    def __call__(self, seen: Seen) -> None:
        for name in sorted((self.needs | self.cross.needs) & set(VECTORS)):
            vectors = VECTORS[name](seen)
            if name in self.needs:
                self._update(name, vectors)
            if name in self.cross.needs:
                self.cross.observe(name, vectors)
        if effects := sorted(self.needs & set(EFFECTS)):
            for sequence in seen.sequences():
                attended = Attended(self.layer, sequence, self.output_NHH)
                for name in effects:
                    for vectors in EFFECTS[name](attended):
                        self._update(name, vectors)
        self.halves.take(len(seen.q), self.own)

    def _update(self, name: str, vectors: Tensor) -> None:
        self.own.setdefault(name, Moment.zeros(*vectors.shape[1:], device=self.device)).update(vectors)

    def gather(self) -> None:
        """Add what other processes saw."""
        if processes.world_size() > 1:
            self.own, self.halves.first = _of_all(self.own), _of_all(self.halves.first)
            self.cross.sums = {label: processes.summed(self.cross.sums[label]) for label in sorted(self.cross.sums)}

    def moments(self, tokens: int) -> dict[str, Tensor]:
        """The tensors of the layer's file."""
        tensors = {f"{name}.mean": moment.mean_F.cpu() for name, moment in self.own.items()}
        tensors |= {f"{name}.second": moment.second_FF.cpu() for name, moment in self.own.items()}
        return tensors | self.cross.moments(tokens)


def _of_all(moments: dict[str, Moment]) -> dict[str, Moment]:
    """The moments of what all processes saw."""
    found = {}
    for name in sorted(moments):
        own = moments[name]
        count = int(processes.summed(torch.tensor(own.count, device=own.mean_F.device)))
        mean_F, second_FF = (processes.summed(part * own.count) / count for part in (own.mean_F, own.second_FF))
        found[name] = Moment(mean_F, second_FF, count)
    return found


def _output_metric(checkpoint: Checkpoint, arch: Architecture, layer: AttentionLayer, needs: frozenset[str]) -> Tensor:
    """W_O^n.T W_O^n of every query head [N, H, H], in float32; nothing where no statistic asks."""
    if not needs & set(EFFECTS):
        return torch.empty(0)
    heads_DNH = read_layer(checkpoint, arch, layer).o_proj.unflatten(1, (layer.num_attention_heads, -1))
    return torch.einsum("dnh,dni->nhi", heads_DNH, heads_DNH).float()


def _key(checkpoint: Checkpoint, tokens_BT: Tensor) -> str:
    digest = hashlib.sha256(f"{STATISTICS_VERSION} {checkpoint.fingerprint()} {tuple(tokens_BT.shape)}".encode())
    digest.update(tokens_BT.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:12]


def _short(label: str) -> str:
    """A name that fits into a file name."""
    return label if len(label) <= 80 else hashlib.sha256(label.encode()).hexdigest()[:12]


def _finished(run_dir: Path, key: str, needs: frozenset[str]) -> Path | None:
    """The folder of an earlier run over the same model and tokens that gathered at least these statistics."""
    for file in sorted(run_dir.glob(f"statistics-{key}-*/{FINISHED}")):
        if needs <= set(read_json(file)["needs"]):
            return file.parent
    return None


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def _hidden_file(folder: Path) -> Path:
    """Of this process."""
    if processes.world_size() == 1:
        return folder / "hidden.safetensors"
    return folder / f"hidden-{processes.rank()}-of-{processes.world_size()}.safetensors"


def _save_hidden(folder: Path, next_layer: int, hidden_BTD: Tensor, cross: CrossMoments) -> None:
    tensors = {"hidden": hidden_BTD}
    tensors |= {f"{label}/{i:06d}": part for label, parts in cross.kept.items() for i, part in enumerate(parts)}
    write_tensors(_hidden_file(folder), tensors, {"next_layer": str(next_layer)})


def _resume(folder: Path, cross: CrossMoments) -> tuple[int, Tensor] | None:
    """The layer at which an interrupted run goes on, and the hidden states that enter it."""
    hidden_file, reached = _hidden_file(folder), 0
    if hidden_file.exists():
        with safe_open(hidden_file, framework="pt") as file:
            reached = int(file.metadata()["next_layer"])
    if processes.values_of_all(reached) != {reached} or not reached:
        return None  # killed before all had written
    with safe_open(hidden_file, framework="pt") as file:
        for name in sorted(set(file.keys()) - {"hidden"}):
            cross.kept.setdefault(name.partition("/")[0], []).append(file.get_tensor(name).clone())
        return reached, file.get_tensor("hidden").clone()
