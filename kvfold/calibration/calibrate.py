"""Checkpoint + tokens -> Statistics: streamed second moments, with one layer of the model in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvfold import distributed as processes
from kvfold.architectures.base import Architecture
from kvfold.calibration.cross_moments import CrossMoments
from kvfold.calibration.layerwise_model import StreamedModel
from kvfold.calibration.observing import OF_TOKENS, SENSITIVITIES, STATISTICS, LayerObserver
from kvfold.calibration.passes import Passes, layer_file
from kvfold.checkpoint.atomic import make_folder, require_space, write_tensors, write_text
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.reader import Checkpoint, read_json
from kvfold.checkpoint.source import source_dtype
from kvfold.errors import DataError
from kvfold.linalg.eigen import Moment
from kvfold.linalg.sensitivity import RECENT, TOKENS, WEIGHTS
from kvfold.methods.width.base import Tokens
from kvfold.plan.cache_spec import ITEMSIZE
from kvfold.plan.layer import AttentionLayer
from kvfold.progress import STDERR

__all__ = ["STATISTICS", "Statistics", "calibrate"]

STATISTICS_VERSION = 6
"""To be raised when a statistic is computed differently, so that old ones on disk are not taken for new ones."""

FINISHED = "statistics.json"


@dataclass(frozen=True)
class Statistics:
    """Moments of every layer, on disk in `folder`, read one layer at a time. `tokens` is how many went in."""

    folder: Path
    tokens: int

    def layer(self, index: int, needs: Iterable[str]) -> dict[str, Moment]:
        moments = {}
        with safe_open(layer_file(self.folder, index), framework="pt") as file:
            for name in sorted(set(needs) - OF_TOKENS):
                mean, second = file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.second")
                moments[name] = Moment(mean.clone(), second.clone(), self.tokens)
        return moments

    def of_tokens(self, index: int, name: str) -> Tokens:
        """The calibration tokens of one layer, as `TOKENS` + `name` asks for them."""
        with safe_open(layer_file(self.folder, index), framework="pt") as file:
            recent = RECENT + WEIGHTS + name
            return Tokens(
                file.get_tensor(TOKENS + name).float(),
                file.get_tensor(WEIGHTS + name),
                file.get_tensor(recent) if recent in file.keys() else None,  # noqa: SIM118 (a file is no mapping)
            )

    def cross(self, layer: int, earlier: int, needs: Iterable[str]) -> dict[str, Tensor]:
        """E[x_layer x_earlier^T] of each statistic."""
        with safe_open(layer_file(self.folder, layer), framework="pt") as file:
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
    seed: int = 0,
    recent: int = 0,
) -> Statistics:
    """Moments of all layers over the given sequences, in float64.

    `pairs`: (layer, earlier layer) between which the moments of `needs_cross` are gathered as well. `seed`: of the labels
    that gradients are of. `recent`: gradients by what queries see that stand at least so many tokens behind are
    told apart from those by what all others see. All are kept in `run_dir` and reused whenever model and tokens are the
    same; an interrupted run continues where it last wrote its hidden states.
    Peak memory: the hidden states, one layer in float32 and its moments, and the vectors of layers that a later one is
    paired with; with gradients also those of one layer. Several processes share the sequences, and add up what they saw.
    """
    cross = CrossMoments(frozenset(pairs), needs_cross)
    key, wanted = _key(checkpoint, tokens_BT, seed, recent), needs | cross.labels
    if (finished := _finished(run_dir, key, wanted)) is not None:
        return Statistics(finished, tokens_BT.numel())
    made_of = {"model": checkpoint.fingerprint(), "version": STATISTICS_VERSION}
    _say_what_is_left_alone(run_dir, made_of)
    folder = run_dir / f"statistics-{key}-{_short('+'.join(sorted(wanted)))}"
    make_folder(folder)
    total = tokens_BT.numel()
    model = StreamedModel(checkpoint, arch, device, recent)
    downward, dtype = bool(needs & SENSITIVITIES), source_dtype(checkpoint, arch, model.layers[0])
    assert not (downward and cross.labels), "gradients are seen from the last layer down, pairs from the first up"
    require_space(folder, _bytes(model, needs, cross, tokens_BT, downward * ITEMSIZE[dtype]))
    draws_BT = torch.rand(tokens_BT.shape, generator=torch.Generator().manual_seed(seed))
    passes = Passes(model, own_sequences(tokens_BT), folder, cross, getattr(torch, dtype))

    def observer(layer: AttentionLayer) -> LayerObserver:
        return LayerObserver(needs, cross, device, layer, getattr(torch, dtype))

    def keep(seen: LayerObserver) -> None:
        seen.gather()
        if not processes.rank():
            write_tensors(layer_file(folder, seen.layer.index), seen.moments(total), {})

    if downward:
        passes.down(observer, keep, own_sequences(draws_BT))
    else:
        passes.up(observer, keep)
    if not processes.rank():
        write_text(folder / FINISHED, json.dumps({"needs": sorted(wanted), "tokens": total} | made_of))
    processes.wait_for_all()
    passes.forget()
    return Statistics(folder, total)


def own_sequences(tokens_BT: Tensor) -> Tensor:
    """The sequences that this process looks at. Raises DataError where there is none for some."""
    if len(tokens_BT) < processes.world_size():
        raise DataError(
            f"{len(tokens_BT)} calibration sequences for {processes.world_size()} processes; start fewer, or give more"
            " text (--num-samples)."
        )
    return tokens_BT[processes.rank() :: processes.world_size()]


def _bytes(
    model: StreamedModel, needs: frozenset[str], cross: CrossMoments, tokens_BT: Tensor, entering_itemsize: int
) -> int:
    """On disk, at most: moments of all layers, hidden states, and what enters every layer where gradients come back."""
    size = max(x.num_kv_heads * x.head_dim for x in model.layers)
    wide = sum("keys_and_values" in name for name in needs)  # four times the size
    tokens = len(needs & OF_TOKENS) * 4 * 2 * size * len(model.layers)  # of keys and values, in float32 at most
    matrices = (len(needs) + 3 * wide) * len(model.layers) + len(cross.labels)
    hidden = model.layers[0].hidden_size
    per_token = 4 * (hidden + size * len(cross.needs) * cross.most_kept())
    per_token += tokens + entering_itemsize * hidden * len(model.layers)
    return 8 * matrices * size**2 + per_token * tokens_BT.numel()


def _key(checkpoint: Checkpoint, tokens_BT: Tensor, seed: int, recent: int) -> str:
    facts = {"model": checkpoint.fingerprint(), "tokens": tokens_BT.to(torch.int64), "seed": seed}
    facts |= {"recent": recent} if recent else {}
    return fingerprint(version=STATISTICS_VERSION, **facts)[:12]


def _say_what_is_left_alone(run_dir: Path, made_of: Mapping[str, Any]) -> None:
    """Statistics of other text may be those of another preset, and are nothing to speak of."""
    known = [read_json(file) for file in run_dir.glob(f"statistics-*/{FINISHED}")]
    if any({name: facts.get(name) for name in made_of} != made_of for facts in known):
        STDERR.print(
            f"{run_dir} holds statistics of another model or version of kvfold; gathering those of this one.",
            highlight=False,
        )


def _short(label: str) -> str:
    """A name that fits into a file name."""
    return label if len(label) <= 80 else fingerprint(label=label)[:12]


def _finished(run_dir: Path, key: str, needs: frozenset[str]) -> Path | None:
    """The folder of an earlier run over the same model and tokens that gathered at least these statistics."""
    for file in sorted(run_dir.glob(f"statistics-{key}-*/{FINISHED}")):
        if needs <= set(read_json(file)["needs"]):
            return file.parent
    return None
