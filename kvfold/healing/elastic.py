"""Training for every width at once: each step uses only the leading numbers of what is stored, as many as it draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvfold.plan.nested import kept_width
from kvfold.runtimes.transformers.attention import FoldedAttention


class Elastic:
    """Draws a share of every stored head, from `least` to all, and hides the numbers beyond it while the model trains.

    Nested widths, as in Matryoshka representations (arXiv 2205.13147): whatever width is kept later, its numbers were
    trained to do without the rest. A quarter of the steps takes all, a quarter the least: the ends matter most (the
    "sandwich" of arXiv 1903.05134).
    """

    def __init__(self, model: nn.Module, *, least: float, seed: int) -> None:
        self.least, self.seed, self.share = least, seed, 1.0
        for attention in model.modules():
            if isinstance(attention, FoldedAttention) and attention.owner == attention.layer_idx:
                keys, values = attention.spec.sides
                self._watch(attention.k_a_proj or attention.k_proj, keys.width)
                self._watch(attention.k_u_proj, keys.width)
                self._watch(attention.v_proj, values.width)

    def draw(self, step: int) -> None:
        """The same for the same step, in every process and after an interruption."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        kind, position = torch.rand(2, generator=generator).tolist()
        self.share = 1.0 if kind < 0.25 else self.least if kind < 0.5 else self.least + (1 - self.least) * position

    def _watch(self, module: nn.Module | None, width: int) -> None:
        def hide(part: nn.Module, args: Any, out: Tensor) -> Tensor:
            kept = kept_width(width, self.share)
            if not part.training or kept == width:
                return out
            shown = torch.arange(width, device=out.device) < kept
            return (out.unflatten(-1, (-1, width)) * shown).flatten(-2)

        if module is not None:
            module.register_forward_hook(hide)
