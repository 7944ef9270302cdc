"""Which text the statistics come from."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold import registry
from kvfold.errors import RecipeError

SELECTIONS = ("random", "diverse")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which text the statistics come from.

    data: a .txt, .jsonl or .parquet file (also .xz and .gz), a data set name on the hub, or `self` (the model samples
        its own text). None where the method reads weights only.
    num_samples, seq_len: sequences, and tokens per sequence; 0 takes 64 of 256, or 16 of 1,024 where keys are stored after
        rotation.
    own: share of the sequences that the model samples itself, beside those of `data`: they lose less on text of another kind.
    select: `random` places of the text, or `diverse`: of eight times as many those whose words differ most.
    config, split, text_field: of a data set.
    """

    data: str | None = None
    num_samples: int = 0
    seq_len: int = 0
    own: float = 0.0
    select: str = "random"
    config: str | None = None
    split: str = "train"
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.num_samples < 0 or self.seq_len < 0:
            raise RecipeError(
                f"calibration.num_samples is {self.num_samples} and seq_len {self.seq_len}; neither can be below 0."
            )
        if self.seq_len == 1:
            raise RecipeError("calibration.seq_len is 1; nothing looks back in a sequence of one token.")
        if not 0 <= self.own < 1:
            raise RecipeError(
                f"calibration.own is {self.own}; it is a share of the sequences, from 0 to below 1 (--data self for all)."
            )
        if self.select not in SELECTIONS:
            raise RecipeError(registry.unknown("selection of calibration text", self.select, SELECTIONS))
