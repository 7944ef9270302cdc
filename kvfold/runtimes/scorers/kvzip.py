"""kvzip: the most attention that a token gets when the prompt is read a second time (KVzip, arXiv 2505.23416)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer


class KVzip(Scorer):
    """What a model needs to say the prompt again. In the paper heads compete for tokens when a prompt was read; here how many
    a head keeps is in the plan."""

    repeats = True

    def score(self, prompt: Prompt) -> Tensor:
        most_BnS = functools.reduce(torch.maximum, (prompt.probabilities(rows).amax(2) for rows in prompt.pieces()))
        return most_BnS.unflatten(1, (prompt.keys_BCSR.shape[1], -1)).amax(2)
