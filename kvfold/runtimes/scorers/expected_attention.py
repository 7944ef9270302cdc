"""expected_attention: what queries to come would attend to, if they were spread as the prompt's are (arXiv 2510.00636)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.runtimes.kernels.attention import exact
from kvfold.runtimes.kernels.rotary import apply_rotary
from kvfold.runtimes.scorers.base import Prompt, Scorer

AHEAD = 512
"""Positions over which rotations are averaged."""
QUERIES = 256


class ExpectedAttention(Scorer):
    """Queries are taken as normally distributed, with the mean and covariance of the prompt's own at one position, turned on
    in the mean over the next ones; attention times the length of the value is what a token is worth."""

    def score(self, prompt: Prompt) -> Tensor:
        q_BnQR = prompt.absorb(self._ahead(prompt)).to(exact(prompt.keys_BCSR))
        keys = prompt.keys_BCSR.to(q_BnQR.dtype)
        keys_BnSR = keys.repeat_interleave(q_BnQR.shape[1] // keys.shape[1], dim=1) * prompt.layer.scaling
        mean_Bn1R = q_BnQR.mean(2, keepdim=True)
        spread = (q_BnQR - mean_Bn1R) @ keys_BnSR.transpose(2, 3)
        logs_BnS = (mean_Bn1R @ keys_BnSR.transpose(2, 3))[:, :, 0] + spread.square().mean(2) / 2
        probs_BnS = logs_BnS.masked_fill(~prompt.shown_BS[:, None], torch.finfo(logs_BnS.dtype).min).softmax(-1)
        return prompt.by_stored_head(probs_BnS) * prompt.values_BCSV.float().norm(dim=-1)

    def _ahead(self, prompt: Prompt) -> Tensor:
        """The prompt's queries at its end, each as the mean over the next positions turns it."""
        at_BQ = prompt.spread(QUERIES)
        q_BnQH = prompt.ahead(at_BQ, torch.ones_like(at_BQ))
        cos, sin = (table.mean(0)[None, None] for table in prompt.turns(torch.arange(AHEAD, device=at_BQ.device)))
        return apply_rotary(q_BnQH, cos, sin)
