"""repeated: what the queries of a second reading of the prompt would lose."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvfold.runtimes.scorers.base import AT_ONCE, Prompt, Scorer


class Repeated(Scorer):
    """As `observed`, by queries that look back, for which the prompt is read twice."""

    repeats = True

    def score(self, prompt: Prompt) -> Tensor:
        total: Any = 0
        for start in range(0, prompt.steps, AT_ONCE):
            rows = slice(start, min(start + AT_ONCE, prompt.steps))
            total = total + prompt.effects(prompt.probabilities(rows)).sum(2)
        return prompt.by_stored_head(total)
