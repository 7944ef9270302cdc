"""What is gathered of one layer while its queries, keys and values pass, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvfold import distributed as processes
from kvfold.calibration.cross_moments import CrossMoments
from kvfold.calibration.statistics import GRADIENTS, VECTORS, Seen
from kvfold.linalg.eigen import Moment
from kvfold.linalg.sensitivity import METRIC, RECENT, TOKENS, WEIGHTED, WEIGHTS, fit
from kvfold.plan.layer import AttentionLayer

SENSITIVITIES = frozenset(
    age + part + name for name in GRADIENTS for part in (WEIGHTED, METRIC) for age in ("", RECENT)
)
"""Statistics that need gradients."""

OF_TOKENS = frozenset(TOKENS + name for name in GRADIENTS)
"""The calibration tokens themselves, which can be kept beside their moments."""

STATISTICS = frozenset({*VECTORS, *SENSITIVITIES})
"""The moments that can be gathered of a layer; `statistics.py` and `sensitivity.py` say what each is."""


@dataclass
class LayerObserver:
    """Gathers the statistics `needs` of one layer. Tokens themselves are kept in `dtype`: the checkpoint's, in which the
    model itself knows no more of them."""

    needs: frozenset[str]
    cross: CrossMoments
    device: str
    layer: AttentionLayer
    dtype: torch.dtype = torch.float32
    own: dict[str, Moment] = field(default_factory=dict)
    kept: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sensitive = [name for name in GRADIENTS if {WEIGHTED + name, METRIC + name} & self.needs]
        self.tells_ages = any(name.startswith(RECENT) for name in self.needs)

    def __call__(self, seen: Seen) -> None:
        for name in sorted((self.needs | self.cross.needs) & set(VECTORS)):
            vectors = VECTORS[name](seen)
            if name in self.needs:
                self._update(name, vectors)
            if name in self.cross.needs:
                self.cross.observe(name, vectors)
        for (
            name
        ) in self.sensitive:  # tokens are weighed by each other's gradients: all of a layer are kept till the end
            gradients = [GRADIENTS[name](s) for s in ((seen, seen.of_recent) if self.tells_ages else (seen,))]
            self.kept.setdefault(name, []).append((VECTORS[name](seen), *gradients))

    def _update(self, name: str, vectors: Tensor) -> None:
        self.own.setdefault(name, Moment.zeros(*vectors.shape[1:], device=self.device)).update(vectors)

    def gather(self) -> None:
        """Finish, with what other processes saw."""
        if processes.world_size() > 1:
            self.own = {name: _of_all(self.own[name]) for name in sorted(self.own)}
            self.cross.sums = {label: processes.summed(self.cross.sums[label]) for label in sorted(self.cross.sums)}
        for name in sorted(self.kept):
            x_TF, gradient_TF, *near_TF = (torch.cat(parts) for parts in zip(*self.kept.pop(name), strict=True))
            heads = x_TF.shape[1] // self.layer.head_dim
            moment, metric, weight_T = fit(x_TF, gradient_TF, heads, processes.summed)
            self.own |= {WEIGHTED + name: moment, METRIC + name: metric}
            if TOKENS + name in self.needs:
                # rounding them without their mean loses nothing to large biases
                self._keep(TOKENS + name, (x_TF - moment.mean_F.to(x_TF)).to(self.dtype))
                self._keep(WEIGHTS + name, weight_T)
            for gradient_TF in near_TF:  # both forms of a token are made of it without the same mean
                near = fit(x_TF, gradient_TF, heads, processes.summed, moment.mean_F)
                self.own |= {RECENT + WEIGHTED + name: near.moment, RECENT + METRIC + name: near.metric}
                if TOKENS + name in self.needs:
                    self._keep(RECENT + WEIGHTS + name, near.weight_T)

    def _keep(self, label: str, rows: Tensor) -> None:
        self.tokens[label] = processes.gathered(rows).cpu()

    def moments(self, tokens: int) -> dict[str, Tensor]:
        """The tensors of the layer's file."""
        tensors = {f"{name}.mean": moment.mean_F.cpu() for name, moment in self.own.items()}
        tensors |= {f"{name}.second": moment.second_FF.cpu() for name, moment in self.own.items()}
        return tensors | self.tokens | self.cross.moments(tokens)


def _of_all(own: Moment) -> Moment:
    """The moment of what all processes saw."""
    count = int(processes.summed(torch.tensor(own.count, device=own.mean_F.device)))
    mean_F, second_FF = (processes.summed(part * own.count) / count for part in (own.mean_F, own.second_FF))
    return Moment(mean_F, second_FF, count)
