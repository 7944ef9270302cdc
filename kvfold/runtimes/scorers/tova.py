"""tova: what the last query attends to, alike for all heads (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer


class Tova(Scorer):
    """The mean over the heads of a run."""

    agree = True

    def score(self, prompt: Prompt) -> Tensor:
        probs_BnS = prompt.probabilities(slice(prompt.steps - 1, prompt.steps))[:, :, 0]
        return probs_BnS.mean(1, keepdim=True).expand(-1, prompt.keys_BCSR.shape[1], -1)
