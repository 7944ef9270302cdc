"""kvzip: the most attention that a token gets when the prompt is read a second time (KVzip, arXiv 2505.23416)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.runtimes.scorers.base import AT_ONCE, Prompt, Scorer


class KVzip(Scorer):
    """What a model needs to say the prompt again. In the paper heads compete for tokens when a prompt was read; here how many
    a head keeps is in the plan."""

    repeats = True

    def score(self, prompt: Prompt) -> Tensor:
        parts = (slice(start, min(start + AT_ONCE, prompt.steps)) for start in range(0, prompt.steps, AT_ONCE))
        most_BnS = torch.stack([prompt.probabilities(rows).amax(2) for rows in parts]).amax(0)
        return most_BnS.unflatten(1, (prompt.keys_BCSR.shape[1], -1)).amax(2)
