"""Everything that one healing run needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvfold import registry
from kvfold.compression.recipe import check_types
from kvfold.errors import RecipeError
from kvfold.healing.presets import HEALING_PRESETS
from kvfold.healing.trainable import CHOICES

OBJECTIVES = ("ce", "kd", "mix", "layers")


@dataclass(frozen=True, kw_only=True)
class Healing:
    """One healing run.

    folded: the folder to heal; out: the folder to write; data: text, as in calibration (no `self`); teacher: the original,
    needed for all objectives but ce.
    objective: `ce` (the next token), `kd` (KL to the original's distribution), `mix` (alpha * kd + beta * ce), `layers`
        (every attention layer answers as the original's). train: all, attention, fold (its own projections) or lora.
    max_tokens: to train on, in rows of seq_len (0: the model's context, at most 2,048); epochs over them.
    batch_size rows per device and step, times accumulate, times processes.
    warmup: share of the steps; then a cosine down to 0. cross_documents: rows cut from one stream.
    shard: split weights, gradients and optimizer state over all processes (FSDP2) instead of having all of them in each.
    elastic: the least share of every stored head that is to do alone (0: only all of it counts). Each step then trains a
        share between that and all, and `kvfold truncate` cuts the healed model to any of them.
    teacher_top: keep so many of the teacher's likeliest tokens on disk, instead of the teacher in memory (0: in memory).
    """

    folded: str
    out: str
    data: str
    teacher: str | None = None
    preset: str | None = None
    objective: str = "kd"
    train: str = "attention"
    alpha: float = 1.0
    beta: float = 1.0
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.0
    max_tokens: int = 1_000_000
    epochs: float = 1.0
    seq_len: int = 0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    warmup: float = 0.05
    cross_documents: bool = False
    gradient_checkpointing: bool = False
    bf16: bool = False
    shard: bool = False
    elastic: float = 0.0
    teacher_top: int = 0
    eval_data: str | None = None
    eval_tokens: int = 16_384
    eval_every: int = 0
    save_every: int = 100
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("objective", OBJECTIVES), ("train", CHOICES)):
            if getattr(self, name) not in allowed:
                raise RecipeError(registry.unknown(name, getattr(self, name), allowed))
        if self.objective != "ce" and not self.teacher:
            raise RecipeError(f"objective {self.objective!r} learns from the original model; give it: --teacher MODEL.")
        if self.teacher_top and self.objective not in ("kd", "mix"):
            raise RecipeError("teacher_top goes with objective kd or mix.")
        if self.objective == "layers" and self.gradient_checkpointing:
            raise RecipeError(
                "objective layers keeps what every layer answers; it does not go with gradient_checkpointing."
            )
        least = dict.fromkeys(
            ("max_tokens", "batch_size", "accumulate", "save_every", "log_every", "lora_rank", "lora_alpha"), 1
        )
        least |= {"seq_len": 0, "teacher_top": 0, "eval_every": 0, "eval_tokens": 2}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be at least {limit}.")
        if self.seq_len == 1:
            raise RecipeError("seq_len is 1; a row needs a token before the one it predicts: at least 2, or 0.")
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"lora_dropout is {self.lora_dropout}; it is a share below 1.")
        if not 0 <= self.elastic < 1:
            raise RecipeError(f"elastic is {self.elastic}; it is the least share of a stored head, below 1.")
        if self.learning_rate <= 0 or self.weight_decay < 0 or not 0 <= self.warmup < 1 or self.epochs <= 0:
            raise RecipeError(
                "learning_rate and epochs must be above 0, weight_decay at least 0, warmup a share of the steps below 1."
            )


def make_healing(data: dict[str, Any]) -> Healing:
    """From plain data, of a preset filled up with what is given; what is None is not given."""
    given = {name: value for name, value in data.items() if value is not None}
    if preset := given.get("preset"):
        if preset not in HEALING_PRESETS:
            raise RecipeError(registry.unknown("healing preset", preset, HEALING_PRESETS))
        given = HEALING_PRESETS[preset].fragment | given
    known = {f.name: f for f in dataclasses.fields(Healing)}
    for name in given:
        if name not in known:
            raise RecipeError(registry.unknown("healing field", name, known))
    if missing := [name for name in ("folded", "out", "data") if name not in given]:
        raise RecipeError(f"healing needs {', '.join(missing)}.")
    check_types(Healing, given, "")
    return Healing(**given)
