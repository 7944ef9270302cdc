"""snapkv: what the last queries attend to, and its neighbours (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer

WINDOW, NEIGHBOURS = 64, 5
"""Queries, and tokens over which attention is averaged."""


class SnapKV(Scorer):
    """Made for prompts that end with the question. Neighbours are those of one step."""

    def score(self, prompt: Prompt) -> Tensor:
        probs = prompt.probabilities(slice(max(prompt.steps - WINDOW, 0), prompt.steps)).mean(2)
        worth_BCS = prompt.by_stored_head(probs)
        before, own = worth_BCS[..., : -prompt.steps], worth_BCS[..., -prompt.steps :]
        own = F.avg_pool1d(own, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)
        return torch.cat([before, own], dim=-1)
