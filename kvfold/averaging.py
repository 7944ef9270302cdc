"""Value latents that keep what attention makes of them: least squares over each head's averaged values.

Head k of the source adds W_O^k ybar_kk to the output, where ybar_k = sum_s p_ks nu_s are all values of the group as head k
averages them, and ybar_kk its own. With latents it adds W_O^k B_k A ybar_k. So the loss is
sum_k tr M_k (S_k - B_k A) Y_k (S_k - B_k A)^T, with Y_k the covariance of ybar_k, M_k = W_O^k.T W_O^k and S_k the choice of
head k. Given A every B_k has a closed form; given the B_k, A solves a linear system, here by conjugate gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.latents import TINY, Latents, Term, blocks, solve

RIDGE = 1e-7
"""Of the mean variance of the latents."""
STEPS = 12
"""Of conjugate gradients per sweep; sweeps start where the last one stopped."""


def solve_averaged(moments_KFF: Tensor, metric_FF: Tensor, heads: int, width: int, sweeps: int) -> Latents:
    """`heads` latents of `width` numbers for K source heads. moments_KFF: covariances Y_k [K, F, F], or [1, F, F] where all
    heads share one: then the start in closed form is the answer. metric_FF: blocks M_k on its diagonal."""
    pooled = moments_KFF.mean(0)
    start = solve(lambda i: Term(pooled, pooled, metric_FF), 1, heads, width)
    if len(moments_KFF) == 1 or heads * width == len(metric_FF):  # which loses nothing
        return start
    parts = [
        _Group(moments_tFF, metric_tFF, start.a_CRF[u])
        for u, (moments_tFF, metric_tFF) in enumerate(_groups(moments_KFF, metric_FF, heads))
    ]
    back_UFV = torch.stack([part.solve(sweeps) for part in parts])
    return Latents(torch.stack([part.a_VF for part in parts]), lambda position: back_UFV)


def _groups(moments_KFF: Tensor, metric_FF: Tensor, heads: int) -> list[tuple[Tensor, Tensor]]:
    """Per stored head: Y_k [t, tH, tH] and M_k [t, H, H] of its source heads."""
    K, F = len(moments_KFF), len(metric_FF)
    t, size = K // heads, F // heads
    metrics = blocks(metric_FF, K)
    return [
        (moments_KFF[u * t : (u + 1) * t, u * size : (u + 1) * size, u * size : (u + 1) * size], metrics[u * t :][:t])
        for u in range(heads)
    ]


class _Group:
    def __init__(self, moments_tFF: Tensor, metric_tHH: Tensor, a_VF: Tensor) -> None:
        self.moments_tFF, self.metric_tHH, self.a_VF = moments_tFF, metric_tHH, a_VF
        self.heads = len(moments_tFF)
        # rows of Y_k that belong to head k itself: S_k Y_k
        rows = [moment.unflatten(0, (self.heads, -1))[k] for k, moment in enumerate(moments_tFF)]
        self.own_tHF = torch.stack(rows)

    def solve(self, sweeps: int) -> Tensor:
        """The way back [F, V]; a_VF becomes the way in."""
        for _ in range(sweeps):
            self._improve(self._back())
        return self._back().flatten(0, 1)

    def _back(self) -> Tensor:
        """B_k = S_k Y_k A^T (A Y_k A^T)^-1, [t, H, V]."""
        seen_tVV = self.a_VF @ self.moments_tFF @ self.a_VF.T
        ridge = RIDGE * seen_tVV.diagonal(dim1=1, dim2=2).mean(1).clamp_min(TINY)
        seen_tVV = seen_tVV + ridge[:, None, None] * torch.eye(len(self.a_VF)).to(seen_tVV)
        return torch.linalg.solve(seen_tVV, (self.own_tHF @ self.a_VF.T).transpose(1, 2)).transpose(1, 2)

    def _improve(self, back_tHV: Tensor) -> None:
        """A closer to sum_k G_k A Y_k = sum_k B_k^T M_k S_k Y_k with G_k = B_k^T M_k B_k."""
        weighed_tVH = back_tHV.transpose(1, 2) @ self.metric_tHH
        grams_tVV = weighed_tVH @ back_tHV
        # as if all Y_k were equal: the system then falls apart, which makes a good preconditioner
        left_VV, right_FF = _inverse(grams_tVV.sum(0)), _inverse(self.moments_tFF.mean(0))

        def apply(x_VF: Tensor) -> Tensor:
            return sum((g @ x_VF @ y for g, y in zip(grams_tVV, self.moments_tFF, strict=True)), torch.zeros_like(x_VF))

        rest = (weighed_tVH @ self.own_tHF).sum(0) - apply(self.a_VF)
        conditioned = left_VV @ rest @ right_FF
        direction, energy = conditioned, (rest * conditioned).sum()
        for _ in range(STEPS):
            if energy <= TINY:
                return
            ahead = apply(direction)
            step = energy / (direction * ahead).sum()
            self.a_VF = self.a_VF + step * direction
            rest = rest - step * ahead
            conditioned = left_VV @ rest @ right_FF
            energy, last = (rest * conditioned).sum(), energy
            direction = conditioned + energy / last * direction


def _inverse(gram: Tensor) -> Tensor:
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(TINY)
    return torch.linalg.inv(gram + ridge * torch.eye(len(gram)).to(gram))
