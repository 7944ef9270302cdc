"""The basis in which latents lose least to quantization: leading directions first, all of one size, turned within a tier.

Any invertible T may stand between A and B: z = T A kappa, B T^-1. Let C be the covariance of A kappa, and G the cost of an
error of a latent, sum_i B_i^T M_i B_i. In the basis E^T G^(1/2), E the eigenvectors of G^(1/2) C G^(1/2), numbers are
uncorrelated and an error costs the same in each; their variances say how many bits each deserves (reverse water-filling).
Within a tier, which shares its bits and its scale, a random orthogonal matrix turns them, so that no number is an outlier.
Before, numbers are divided by the fourth root of their variance: undivided, small ones drown in the error that all share;
brought to equal variance, the error of large ones grows, though the sum stays the same. Half way measured best
(docs/log.md). All of it is absorbed by A and B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.eigen import eigh_descending, largest_of, powers
from kvfold.linalg.reduced_rank import Latents, Terms, blocks
from kvfold.plan.number_format import LEAST_VARIANCE, NumberFormat


def arranged(latents: Latents, terms: Terms, layers: int, covariance_FF: Tensor, format: NumberFormat) -> Latents:
    """The same latents in that basis, as many of the leading ones as `format` has. covariance_FF: of the owner's keys or
    values."""
    kept = format.width
    a_CRF, all_of = latents.a_CRF[:, :kept], latents
    latents = Latents(a_CRF, lambda position: all_of.back(position)[:, :, :kept])
    turns = [
        _turn(a_RF @ block @ a_RF.T, cost_RR, format)
        for a_RF, block, cost_RR in zip(
            a_CRF, blocks(covariance_FF, len(a_CRF)), _costs(latents, terms, layers), strict=True
        )
    ]
    inverse_CRR = torch.stack([inverse for _, inverse in turns])
    return Latents(
        torch.cat([torch.stack([turn for turn, _ in turns]) @ a_CRF, all_of.a_CRF[:, kept:]], dim=1),
        lambda position: torch.cat([latents.back(position) @ inverse_CRR, all_of.back(position)[:, :, kept:]], dim=2),
    )


def centred(latents: Latents, mean_F: Tensor) -> Latents:
    """Latents that are stored without their mean."""
    return latents._replace(
        centre_CR=torch.einsum("crf,cf->cr", latents.a_CRF, mean_F.unflatten(0, (len(latents.a_CRF), -1)))
    )


def _costs(latents: Latents, terms: Terms, layers: int) -> Tensor:
    """G [C, R, R]."""
    total = torch.zeros(())
    for position in range(layers):
        back_CFR, metric = latents.back(position), terms(position).metric
        weighed = back_CFR if metric is None else _weighed(metric, back_CFR)
        total = total + back_CFR.transpose(1, 2) @ weighed
    return total


def _weighed(metric: BlockDiagonal, back_CFR: Tensor) -> Tensor:
    return torch.stack([part @ back for part, back in zip(metric.groups(len(back_CFR)), back_CFR, strict=True)])


def _turn(covariance_RR: Tensor, cost_RR: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """T and its inverse."""
    eye = torch.eye(len(cost_RR)).to(cost_RR)
    solved = _alike(cost_RR, eye)  # in this very metric
    root, inverse = (eye, eye) if solved else powers(cost_RR, 0.5, -0.5)
    variances, vectors = _eigen(covariance_RR if solved else root @ covariance_RR @ root)
    largest = largest_of(variances)  # what never varies is stored as zeros
    roots = (variances / largest).clamp_min(LEAST_VARIANCE) ** 0.25
    sizes = roots * largest.sqrt()
    turn = torch.block_diag(*(_orthogonal(elements) for elements, _ in format.tiers)).to(root)
    return turn @ (vectors / sizes).T @ root, inverse @ (vectors * sizes) @ turn.T


def _eigen(covariance_RR: Tensor) -> tuple[Tensor, Tensor]:
    """As `eigh_descending`, at once where the matrix is diagonal: 1,500 numbers take seconds."""
    variances = covariance_RR.diagonal()
    if not _alike(covariance_RR, torch.diag(variances)):
        return eigh_descending(covariance_RR)
    order = variances.argsort(descending=True, stable=True)
    return variances[order].clamp_min(0), torch.eye(len(order)).to(covariance_RR)[:, order]


def _alike(x_RR: Tensor, y_RR: Tensor) -> bool:
    """But for rounding."""
    return bool((x_RR - y_RR).abs().max() <= 1e-10 * y_RR.abs().max())


def _orthogonal(size: int) -> Tensor:
    """A random orthogonal matrix, always the same for a size."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0]
