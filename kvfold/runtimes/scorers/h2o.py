"""h2o: the attention that a token got from all queries of the prompt (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer


class H2O(Scorer):
    """Heavy hitters. Early tokens had more queries to get it from."""

    def score(self, prompt: Prompt) -> Tensor:
        total: Any = sum(prompt.probabilities(rows).sum(2) for rows in prompt.pieces())
        return prompt.by_stored_head(total)
