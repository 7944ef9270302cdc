"""repeated: what the queries of a second reading of the prompt would lose."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer


class Repeated(Scorer):
    """As `observed`, by queries that look back, for which the prompt is read twice."""

    repeats = True

    def score(self, prompt: Prompt) -> Tensor:
        total: Any = sum(prompt.effect(prompt.probabilities(rows)) for rows in prompt.pieces())
        return prompt.by_stored_head(total)
