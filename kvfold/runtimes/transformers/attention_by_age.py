"""What the attention module of folded families does where the newest tokens are seen in a finer form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.kernels import aged_kernels, cpu_decode
from kvfold.runtimes.kernels.aged_attention import attend_by_age, beside
from kvfold.runtimes.kernels.aged_prefill import prefill_by_age
from kvfold.runtimes.kernels.attention import kernels_for
from kvfold.runtimes.kernels.cpu_layer import Steps
from kvfold.runtimes.kernels.dispatch import FEW_TOKENS, roundtrip
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, by_age
from kvfold.runtimes.transformers.on_read import KeysOnRead, all_keys, all_values, value_map


class AttentionByAge(nn.Module):
    """The part of `FoldedAttention` that knows of ages."""

    spec: CacheSpec
    layer: AttentionLayer
    scaling: float
    sinks: nn.Parameter | None
    steps: Steps
    k_b_proj: Any
    v_b_proj: Any
    _absorb: Callable[[Tensor], Tensor]
    _lead_values_back: Callable[[Tensor], Tensor]
    _eager: Callable[[], bool]

    @property
    def _elements_at_a_time(self) -> int:
        """Of one side of one token, stored or rebuilt."""
        return max(self.spec.widest, self.layer.num_kv_heads * self.layer.head_dim)

    @property
    def _scores(self) -> dict[str, Any]:
        """How products of queries and keys become probabilities."""
        return {"scale": self.scaling, "softcap": self.layer.softcap, "sinks": self.sinks}

    def _aged(self, x_BHTW: Tensor, side: int) -> Any:
        common = self.spec.sides[side]
        if not self.spec.recent:
            return roundtrip(x_BHTW, common.format)
        finer = self.spec.recent_sides[side]
        far, near = by_age(x_BHTW, common.width, finer.width)
        return AgedTokens(roundtrip(far, common.format), roundtrip(near, finer.format), self.spec.recent)

    def _attend_by_age(
        self,
        q: Tensor,
        z: AgedTokens,
        y: AgedTokens,
        mask: Tensor | None,
        keys: KeysOnRead | None = None,
        *,
        wants_probs: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The same as `_attend`, where the newest tokens are seen in a finer form."""
        dropout = self.layer.attention_dropout if self.training else 0.0
        by_masks = self._eager() or wants_probs or dropout > 0
        few = q.shape[2] <= FEW_TOKENS
        if not few and not by_masks:
            return self._prefill_by_age(q, z, y, mask, keys), None
        rebuilt = (keys, functools.partial(keys, near=True)) if keys else None
        absorbed = q if keys else self._absorb(q)
        meeting = (q, q) if keys else by_age(absorbed, z.far.shape[-1], z.near.shape[-1])
        ways = (keys.by_kernel(z.far, q.dtype), keys.by_kernel(z.near, q.dtype, near=True)) if keys else None
        capped = self.layer.softcap is not None and not wants_probs and not dropout  # which the kernel does as well
        if few and (capped or not by_masks) and (ways is None or all(ways)):
            out = self._aged_by_kernel(meeting, z, y, mask, ways)
            if out is not None:
                return out, None
        out, probs = attend_by_age(
            meeting, z, y, mask, keys=rebuilt, width=self.spec.read_widths[1], dropout=dropout,
            by_masks=by_masks, elements=self._elements_at_a_time, **self._scores,
        )  # fmt: skip
        return self._lead_values_back(out), probs

    def _aged_by_kernel(
        self, q: tuple[Tensor, Tensor], z: AgedTokens, y: AgedTokens, mask: Tensor | None, ways: Any
    ) -> Tensor | None:
        """Few queries as they meet both forms; None where the device's kernels do not serve."""
        back, width = value_map(self, q[0].dtype), self.spec.read_widths[1]
        out: Tensor | None = None
        if kernels_for(q[0]) is cpu_decode:
            out = aged_kernels.by_one_call(self.steps, q, z, y, mask, width, rebuild=ways, map=back, **self._scores)
        elif aged_kernels.serves(q, z, y):
            out = aged_kernels.attend(q, z, y, mask, width, rebuild=ways, map=back, **self._scores)
        return out if out is None or back else self._lead_values_back(out)

    def _prefill_by_age(
        self, q: Tensor, z: AgedTokens, y: AgedTokens, mask: Tensor | None, keys: KeysOnRead | None
    ) -> Tensor:
        """Over the source's heads, which are made once for all queries."""
        far_k, near_k = all_keys(self, z.far, keys), all_keys(self, z.near, keys, near=True)
        far_v, near_v = all_values(self, y.far), all_values(self, y.near, near=True)
        keys_width, width = self.spec.read_widths
        if not keys and self.k_b_proj is None:  # q_proj has columns for both
            far_k, near_k = beside(far_k, near_k, keys_width)
        if self.v_b_proj is None:  # o_proj too
            far_v, near_v = beside(far_v, near_v, width)
        return prefill_by_age(
            q, (far_k, near_k), (far_v, near_v), mask, recent=z.recent, scale=self.scaling, sinks=self.sinks
        )
