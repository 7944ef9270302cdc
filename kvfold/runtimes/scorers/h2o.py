"""h2o: the attention that a token got from all queries of the prompt (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvfold.runtimes.scorers.base import AT_ONCE, Prompt, Scorer


class H2O(Scorer):
    """Heavy hitters. Early tokens had more queries to get it from."""

    def score(self, prompt: Prompt) -> Tensor:
        total: Any = 0
        for start in range(0, prompt.steps, AT_ONCE):
            total = total + prompt.probabilities(slice(start, min(start + AT_ONCE, prompt.steps))).sum(2)
        return prompt.by_stored_head(total)
