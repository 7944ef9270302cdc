"""keydiff: tokens whose keys differ from the others (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer


class KeyDiff(Scorer):
    """By the angle to the mean direction of all."""

    def score(self, prompt: Prompt) -> Tensor:
        keys = prompt.keys_BCSR.float()
        directions = F.normalize(keys, dim=-1) * prompt.shown_BS[:, None, :, None]
        mean = directions.sum(2, keepdim=True)  # whose length does not matter
        return -F.cosine_similarity(keys, mean, dim=-1)
