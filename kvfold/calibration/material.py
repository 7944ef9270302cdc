"""What a recipe's methods ask for: calibration tokens, statistics of them, and samples of keys and values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvfold import distributed as processes
from kvfold.calibration import text as data
from kvfold.calibration.calibrate import Statistics, calibrate
from kvfold.calibration.calibration import Calibration
from kvfold.calibration.forgetting import Choice, Forgetting, forgetting
from kvfold.calibration.layerwise_model import StreamedModel
from kvfold.calibration.observing import OF_TOKENS, SENSITIVITIES
from kvfold.calibration.statistics import VECTORS, Seen
from kvfold.checkpoint.atomic import make_folder, write_tensors
from kvfold.checkpoint.source import Source, context_len, read_layer, warn_if_too_long
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.errors import CheckpointError, DataError
from kvfold.linalg.eigen import Moment
from kvfold.linalg.sensitivity import RECENT, TOKENS, WEIGHTED
from kvfold.methods.depth.base import Sample, Targets
from kvfold.methods.width.base import LayerGroup, Tokens, WidthMethod
from kvfold.plan.layer import AttentionWeights
from kvfold.plan.plan import source_layer, source_plan
from kvfold.progress import track
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.load import load_weights

TRAINING_TOKENS = 16_384
"""So many show their vectors to a width method that is trained."""

SAMPLE_TOKENS = 4096
"""Of the calibration tokens, so many show their keys and values to a depth method."""


NUM_SAMPLES, SEQ_LEN = 64, 256
"""Calibration sequences, and tokens of each, where the recipe leaves them open: more buys little (docs/log.md)."""

ROTATED = frozenset({"keys", WEIGHTED + "keys", WEIGHTED + "banded_keys"})
NUM_LONG, LONG = 16, 1024
"""The same where rotated keys are seen, which differ from position to position, and where tokens far behind are told apart
from recent ones: only long text has them."""

NUM_FAR, FAR = 8, 4096
"""The same where bytes are counted over more than twice as many tokens: what stands that far behind is found again by queries
that were calibrated on (results/context-4096-smollm2-135m.md)."""

FEW = 8
"""Sequences that are repeated to learn which heads look back."""

POOL = 8
"""`select: diverse` chooses among so many times the sequences that are wanted."""


@dataclass
class Material:
    """The calibration text of one recipe, and what is made of it when a method asks.

    `width`: the method whose needs choose how much text is taken where nothing says so. `asked_by`: what to name where
    text is missing. `looks_back`: text must be long enough to show which heads do.
    `context_len`: tokens over which bytes are counted.
    """

    calibration: Calibration
    source: Source
    run_dir: Path
    width: WidthMethod
    asked_by: str
    seed: int = 0
    recent: int = 0
    looks_back: bool = False
    context_len: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        rotated = bool(self.width.needs & ROTATED) and any(layer.rotary_dim for layer in self.source.layers)
        is_long = rotated or self.recent > 0 or self.looks_back
        # those that look back read text twice, and a model takes long to say so much
        far = is_long and not self.looks_back and self.calibration.data != "self" and self.context_len > 2 * LONG
        number, length = (NUM_FAR, FAR) if far else (NUM_LONG, LONG) if is_long else (NUM_SAMPLES, SEQ_LEN)
        longest = context_len(self.source.checkpoint.config) or length
        self.num_samples = self.calibration.num_samples or number
        self.seq_len = self.calibration.seq_len or min(length, longest, self.context_len if far else length)

    def statistics(
        self,
        needs: frozenset[str],
        needs_cross: frozenset[str] = frozenset(),
        targets: Targets = (),
        joint: bool = False,
    ) -> Statistics | None:
        """Moments of all layers, calibrated now or reused; None if none are needed. Raises DataError where gradients
        are wanted of what stands further behind than sequences reach."""
        if not needs:
            return None
        needs = of_all_ages(needs) if self.recent else needs
        if needs & SENSITIVITIES and self.seq_len < 2 * self.recent:
            raise DataError(
                f"sequences of {self.seq_len} tokens say little of what queries see {self.recent} tokens behind: at least"
                f" --seq-len {2 * self.recent}, or fewer tokens in length.tokens, or --set length.method=identity."
            )
        return calibrate(
            self.source.checkpoint,
            self.source.arch,
            self.tokens(),
            needs=needs,
            run_dir=self.run_dir,
            pairs=_pairs(targets, joint),
            needs_cross=needs_cross,
            device=self.device,
            seed=self.seed,
            recent=self.recent,
        )

    @property
    def was_read(self) -> bool:
        """Whether anything asked for the text."""
        return "_tokens" in vars(self)

    @torch.no_grad()
    def sample(self, names: Iterable[str] = ("keys", "values"), tokens: int = SAMPLE_TOKENS) -> Sample:
        """The vectors of these statistics for the first `tokens` calibration tokens, in every layer."""
        tokens_BT = self.tokens()
        tokens_BT = tokens_BT[: max(tokens // tokens_BT.shape[1], 1)]
        model = StreamedModel(self.source.checkpoint, self.source.arch, self.device)
        hidden_BTD = model.embed(tokens_BT)
        vectors: list[dict[str, Tensor]] = []
        for layer in track(model.layers, "sampling layers", len(model.layers)):
            parts: dict[str, list[Tensor]] = {name: [] for name in sorted(names)}
            model.advance(layer, hidden_BTD, functools.partial(_keep, parts))
            vectors.append({name: torch.cat(kept) for name, kept in parts.items()})
        return vectors.__getitem__

    def tokens(self) -> Tensor:
        """[num_samples, seq_len] calibration tokens. Raises DataError where the recipe names no text."""
        return self._tokens

    def forgetting(self, sinks: int, choice: Choice | None = None) -> Forgetting:
        """What forgetting costs every head, measured now or reused, on FEW calibration sequences that are no longer than the
        model can read twice. All processes take part."""
        tokens_BT = self.tokens()
        longest = context_len(self.source.checkpoint.config) or 2 * tokens_BT.shape[1]
        where: dict[str, Any] = {"run_dir": self.run_dir, "device": self.device}
        return forgetting(
            self.source, tokens_BT[:FEW, : longest // 2], seed=self.seed, sinks=sinks, choice=choice, **where
        )

    @functools.cached_property
    def _tokens(self) -> Tensor:
        with processes.first_before_others():  # what a model samples is kept
            return self._draw()

    def _draw(self) -> Tensor:
        calibration = self.calibration
        if calibration.data is None:
            raise DataError(
                f"{self.asked_by} needs calibration text: give --data FILE, a data set name, or `--data self` (the model"
                " samples its own)."
            )
        warn_if_too_long(self.seq_len, self.source.checkpoint.config)
        if calibration.data == "self":
            return self._chosen(self._own, self.num_samples)
        own = math.ceil(round(calibration.own * self.num_samples, 6))  # 0.07 of 100 are 7
        own = min(own, self.num_samples - 1)
        tokens_BT = self._chosen(self._text, self.num_samples - own)
        return torch.cat([tokens_BT, self._chosen(self._own, own)]) if own else tokens_BT

    def _chosen(self, draw: Callable[[dict[str, Any]], Tensor], wanted: int) -> Tensor:
        """[wanted, seq_len] of one kind of text."""
        is_diverse = self.calibration.select == "diverse"
        size = {"num_samples": wanted * (POOL if is_diverse else 1), "seq_len": self.seq_len, "seed": self.seed}
        return data.most_diverse(draw(size), wanted) if is_diverse else draw(size)

    def _own(self, size: dict[str, Any]) -> Tensor:
        return self_sampled(self.source, self.run_dir, device=self.device, **size)

    def _text(self, size: dict[str, Any]) -> Tensor:
        calibration = self.calibration
        assert calibration.data is not None, "_draw asks for a text first"
        return data.sequences(
            load_tokenizer(self.source.checkpoint.path),
            calibration.data,
            config=calibration.config,
            split=calibration.split,
            text_field=calibration.text_field,
            **size,
        )


def _keep(parts: dict[str, list[Tensor]], seen: Seen) -> None:
    for name, kept in parts.items():
        kept.append(VECTORS[name](seen).float().cpu())


def _pairs(targets: Targets, joint: bool) -> set[tuple[int, int]]:
    """(reader, owner), or any two layers of a group."""
    owners = [layer if target is None else target for layer, target in enumerate(targets)]
    return {
        (later, earlier)
        for later, owner in enumerate(owners)
        for earlier in range(later)
        if (owners[earlier] == owner if joint else earlier == owner)
    }


def self_sampled(source: Source, run_dir: Path, *, num_samples: int, seq_len: int, seed: int, device: str) -> Tensor:
    """[num_samples, seq_len] tokens that the original model draws, half of them as chats where it has a chat template; kept
    in `run_dir`, since drawing them takes long."""
    chat = _chat_opening(source.checkpoint.path)
    kind = f"{num_samples}x{seq_len}-{seed}{'-chat' if chat else ''}"
    file = run_dir / f"samples-{source.checkpoint.fingerprint()}-{kind}.safetensors"
    if not file.exists():
        model = load_weights(source.checkpoint.path, source.dtype, device)
        plan = source_plan([source_layer(layer) for layer in source.layers], source.dtype)
        cache = (lambda: None) if source.arch.repeats_heads else (lambda: FoldedCache(plan))
        tokens_BT = data.sample_from_model(
            model, num_samples=num_samples, seq_len=seq_len, seed=seed, chat=chat, new_cache=cache
        )
        make_folder(file.parent)
        write_tensors(file, {"tokens": tokens_BT}, {})
    return load_file(file)["tokens"]


def _chat_opening(path: Path) -> list[int]:
    """Models without a tokenizer, which only tests have, have no chats."""
    try:
        return data.chat_opening(load_tokenizer(path))
    except CheckpointError:
        return []


def of_all_ages(needs: frozenset[str]) -> frozenset[str]:
    """With the statistics of recent tokens."""
    return needs | {RECENT + name for name in needs & SENSITIVITIES}


def layer_group(
    source: Source,
    targets: Targets,
    owner: int,
    statistics: Statistics | None,
    method: WidthMethod,
    sample: Sample | None = None,
    *,
    recent: int = 0,
) -> LayerGroup:
    """The layers that use the cache of `owner`, with what `method` may read of them. recent: of how many tokens there is
    another form."""
    needs = of_all_ages(method.needs) if recent else method.needs
    layers = [source.layers[i] for i, target in enumerate(targets) if owner in (i, target)]

    @functools.lru_cache(maxsize=2)
    def weights(position: int) -> AttentionWeights:
        return read_layer(source.checkpoint, source.arch, layers[position])

    @functools.lru_cache(maxsize=2)
    def moments(position: int) -> Mapping[str, Moment]:
        return statistics.layer(layers[position].index, needs) if statistics else {}

    @functools.lru_cache(maxsize=1)
    def cross(position: int, other: int = 0) -> Mapping[str, Tensor]:
        if position == other:
            return {name: moments(position)[name].second_FF for name in method.needs_cross}
        assert statistics is not None, "moments between layers come from calibration"
        return statistics.cross(layers[position].index, layers[other].index, method.needs_cross)

    def vectors(position: int) -> Mapping[str, Tensor]:
        return sample(layers[position].index) if sample else {}

    def tokens() -> Tokens:
        (name,) = (need.removeprefix(TOKENS) for need in method.needs & OF_TOKENS)
        assert statistics is not None, "tokens come from calibration"
        return statistics.of_tokens(owner, name)

    return LayerGroup(
        layers=tuple(layers), weights=weights, moments=moments, cross=cross, vectors=vectors, tokens=tokens
    )
