"""Keys of several heads as one rotated head and a rest that does not rotate (decoupled rotation, arXiv 2405.04434; heads are
mixed as in TransMLA, arXiv 2502.07864, here by complex numbers).

A pair of numbers that turns by an angle is a complex number; those of all heads that turn at one speed may be mixed by any
complex matrix before or after they turn. So of each speed one mixture, the leading one, can be rotated for all heads, and
what is left of the others is read as if it did not turn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.linalg.eigen import DEAD, RELATIVE_FLOOR


class Decoupled(NamedTuple):
    """Linear maps of keys [K*H] before rotation, halves of a head being its pairs' first and second numbers.

    shared_HF: to the one head that rotates. back_KHH: from there to what each head has of it. rest_FF: what is left of the
    keys, times how much of a turn's cosine is left in the mean, `share_H` of each pair. phase_HH: of queries that meet the
    rest.
    """

    shared_HF: Tensor
    back_KHH: Tensor
    rest_FF: Tensor
    phase_HH: Tensor


def decouple(
    second_FF: Tensor, costs_KH: Tensor, speeds: tuple[float, ...], distance: int, *, published: bool = False
) -> Decoupled:
    """second_FF: E[k k^T] of the keys of K heads [K*H]. costs_KH: what an error of each number costs. speeds: radians per
    token of each pair. distance: tokens that a query looks back at most, weighed by 1 / (1 + how far).

    published: as TransMLA does it, by real numbers that keep most of the keys, and the rest as if nothing ever turned.
    """
    K, H = costs_KH.shape
    half, eye_FF = H // 2, torch.eye(K * H, dtype=torch.float64)
    real = (
        torch.arange(K)[:, None] * H + torch.arange(half)
    ).T  # [H/2, K]: of each speed the first numbers of all heads
    shared_HF, back_KHH = torch.zeros(H, K * H, dtype=torch.float64), torch.zeros(K, H, H, dtype=torch.float64)
    for pair in range(half):
        i, j = real[pair], real[pair] + half
        cost_K = torch.ones(K, dtype=torch.float64)
        if not published:
            cost_K = _roots((costs_KH[:, pair] + costs_KH[:, pair + half]) / 2)
        a, b = second_FF[i][:, i] + second_FF[j][:, j], second_FF[j][:, i] - second_FF[i][:, j]
        b = torch.zeros_like(b) if published else b
        u_K = torch.linalg.eigh(torch.complex(a, b) * (cost_K[:, None] * cost_K))[1][:, -1]
        into_K, out_K = u_K.conj() * cost_K, u_K / cost_K
        shared_HF[pair, i], shared_HF[pair, j] = into_K.real, -into_K.imag
        shared_HF[pair + half, i], shared_HF[pair + half, j] = into_K.imag, into_K.real
        back_KHH[:, pair, pair], back_KHH[:, pair, pair + half] = out_K.real, -out_K.imag
        back_KHH[:, pair + half, pair], back_KHH[:, pair + half, pair + half] = out_K.imag, out_K.real
    mean_h = mean_turn(speeds, 1 if published else distance)
    share_H, phase_h = mean_h.abs().repeat(2), mean_h / mean_h.abs().clamp_min(torch.finfo(torch.float64).tiny)
    rest_FF = share_H.repeat(K)[:, None] * (eye_FF - back_KHH.flatten(0, 1) @ shared_HF)
    return Decoupled(shared_HF, back_KHH, rest_FF, turned_by(phase_h.conj()))


def _roots(costs_K: Tensor) -> Tensor:
    """Of costs, none of which is nothing beside the others; all alike where nothing costs anything."""
    largest = costs_K.max()
    return costs_K.clamp_min(RELATIVE_FLOOR * largest).sqrt() if largest > DEAD else torch.ones_like(costs_K)


def mean_turn(speeds: tuple[float, ...], distance: int) -> Tensor:
    """[H/2] complex: the mean of e^(-i speed * far) over how far a token stands back."""
    far = torch.arange(distance, dtype=torch.float64)
    weight = 1 / (1 + far)
    angles = torch.tensor(speeds, dtype=torch.float64)[:, None] * far
    return (torch.polar(torch.ones_like(angles), -angles) * weight).sum(1) / weight.sum()


def turned_by(factor_h: Tensor) -> Tensor:
    """[H, H]: multiplication of each pair by a complex number."""
    real, imaginary = torch.diag(factor_h.real), torch.diag(factor_h.imag)
    return torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])
