"""What a token will be worth to a head, by what enters its layer: a ridge regression on what calibration tokens turned out
to be worth when their text was repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold import distributed as processes
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.scorers.base import Prompt

RIDGE = 0.03
"""Of the mean square of an input."""
LEAST = 1e-12
"""Of a worth, before its logarithm is taken."""


class Foresight:
    """Of one layer; sums in float64."""

    def __init__(self, layer: AttentionLayer) -> None:
        size = layer.hidden_size
        self.moments_xx = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        self.moments_xK = torch.zeros(size + 1, layer.num_kv_heads, dtype=torch.float64)

    def see(self, hidden_TD: Tensor, worth_KT: Tensor) -> None:
        """Tokens, and what they turned out to be worth."""
        x = torch.cat([hidden_TD, torch.ones_like(hidden_TD[:, :1])], dim=1).double().cpu()
        self.moments_xx += x.T @ x
        self.moments_xK += x.T @ worth_KT.T.double().cpu().clamp_min(LEAST).log()

    def gather(self) -> Tensor:
        """[K, D], by what all processes saw: the logarithm of a token's worth, but for a constant."""
        xx, xK = processes.summed(self.moments_xx), processes.summed(self.moments_xK)
        count, mean_D, mean_K = xx[-1, -1], xx[-1, :-1] / xx[-1, -1], xK[-1] / xx[-1, -1]
        covariance_DD = xx[:-1, :-1] / count - mean_D[:, None] * mean_D
        together_DK = xK[:-1] / count - mean_D[:, None] * mean_K
        ridge = RIDGE * covariance_DD.diagonal().mean()
        return torch.linalg.solve(covariance_DD + ridge * torch.eye(len(mean_D)).to(xx), together_DK).T


def turned_out(prompt: Prompt) -> Tensor:
    """[K, T] of one prompt that is read twice: the most that a query of the second reading loses without a token, as
    it is seen in what the layer adds to the residual stream."""
    most_BnS = torch.stack([prompt.effects(prompt.probabilities(rows)).amax(2) for rows in prompt.pieces()]).amax(0)
    return prompt.by_stored_head(most_BnS)[0, :, : prompt.keys_BCSR.shape[2] - prompt.again]
