"""How far the leading directions still move with more calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.linalg import Moment, top_eigenvectors

SHARE = 4
"""Movement is that of the leading 1/4 of the directions."""


class Halves:
    """The moments of the first half of a layer's sequences, kept beside those of all."""

    def __init__(self, sequences: int) -> None:
        self.sequences, self.seen = sequences, 0
        self.first: dict[str, Moment] = {}

    def take(self, sequences: int, moments: dict[str, Moment]) -> None:
        """So many more sequences went into `moments`; remember them when half of all are in."""
        self.seen += sequences
        if not self.first and 2 * self.seen >= self.sequences:
            self.first = {
                name: Moment(moment.mean_F.clone(), moment.second_FF.clone(), moment.count)
                for name, moment in moments.items()
                if moment.second_FF.ndim == 2
            }

    def moved(self, moments: dict[str, Moment]) -> float:
        """The largest movement of any statistic, infinite where there is only one half."""
        rest = {name: _difference(moments[name], first) for name, first in self.first.items()}
        if any(moment is None for moment in rest.values()):
            return float("inf")
        return max(
            (movement(self.first[n].second_FF, m.second_FF) for n, m in rest.items() if m is not None), default=0.0
        )


def _difference(whole: Moment, part: Moment) -> Moment | None:
    """The moment of what is in `whole` and not in `part`."""
    count = whole.count - part.count
    if not count:
        return None
    mean, second = (
        (whole.count * a - part.count * b) / count
        for a, b in ((whole.mean_F, part.mean_F), (whole.second_FF, part.second_FF))
    )
    return Moment(mean, second, count)


def movement(one_FF: Tensor, other_FF: Tensor) -> float:
    """Energy of `other` outside the leading directions of `one`, beyond that outside its own, as a share of the latter.

    For two halves of a text it falls as one over their length; what is solved from both halves is about half as far off.
    """
    rank = max(len(one_FF) // SHARE, 1)
    theirs, own = (other_FF.trace() - _held(top_eigenvectors(m, rank), other_FF) for m in (one_FF, other_FF))
    return float(theirs / own.clamp_min(1e-12 * other_FF.trace().clamp_min(torch.finfo(torch.float64).tiny)) - 1)


def _held(basis_FR: Tensor, moment_FF: Tensor) -> Tensor:
    return (basis_FR * (moment_FF @ basis_FR)).sum()
