"""knorm: tokens whose keys are short (arXiv 2406.11430)."""

from __future__ import annotations

from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer


class KNorm(Scorer):
    """Long keys turn away from most queries."""

    def score(self, prompt: Prompt) -> Tensor:
        return -prompt.keys_BCSR.float().norm(dim=-1)
