"""What one process has of a packed layer under tensor parallelism.

Query heads are shared out, and stored heads where there are enough of them. A latent that serves heads of several processes
is stored by all of these, and each rebuilds only the keys and values of its own heads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.plan import CachePlan
from kvfold.plan.tensors import Shape, tensor_shapes

READERS = ("q_proj", "k_b_proj", "v_b_proj", "o_proj")
"""Have to do with this process's query heads; all other tensors with the heads that it stores."""


@dataclass(frozen=True)
class Rank:
    """One of `count` processes."""

    index: int = 0
    count: int = 1

    def heads(self, total: int) -> slice:
        """Of `total` heads those of this process; where there are fewer than processes, one, which others have too."""
        first = self.index * total // self.count
        return slice(first, first + max(total // self.count, 1))

    def spec(self, spec: CacheSpec) -> CacheSpec:
        """What it stores."""
        keys, values = (_count(self.heads(total)) for total in (spec.num_kv_heads, spec.num_v_heads))
        return dataclasses.replace(spec, num_kv_heads=keys, num_v_heads=values)

    def reader(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer as far as its query heads are concerned."""
        return dataclasses.replace(
            layer,
            num_attention_heads=_count(self.heads(layer.num_attention_heads)),
            num_kv_heads=_count(self.heads(layer.num_kv_heads)),
        )

    def shapes(self, layer: AttentionLayer, spec: CacheSpec, *, owns: bool) -> dict[str, Shape]:
        """Of its tensors."""
        reads = tensor_shapes(self.reader(layer), self.spec(spec), owns=owns)
        makes = {side: tensor_shapes(self._maker(layer, spec, side), self.spec(spec), owns=owns) for side in "kv"}
        return {name: self._of(name, reads, makes)[name] for name in reads}

    def _of(self, name: str, reads: dict[str, Shape], makes: dict[str, dict[str, Shape]]) -> dict[str, Shape]:
        return reads if name.startswith(READERS) else makes["v" if name.startswith("v_") else "k"]

    def _maker(self, layer: AttentionLayer, spec: CacheSpec, side: str) -> AttentionLayer:
        """The layer with the source's heads that go into what this process stores."""
        return dataclasses.replace(layer, num_kv_heads=self.made_heads(layer, spec, side))

    def made_heads(self, layer: AttentionLayer, spec: CacheSpec, side: str = "k") -> int:
        """How many of the source's heads go into what it stores."""
        total = spec.num_kv_heads if side == "k" else spec.num_v_heads
        return _count(self.heads(total)) * layer.num_kv_heads // total

    def cut(self, name: str, full: Tensor, layer: AttentionLayer, spec: CacheSpec) -> Tensor:
        """Its part of a tensor of the checkpoint."""
        for place, axis in enumerate(tensor_shapes(layer, spec)[name]):
            total, part = self._heads_of(axis.head_letter or axis.name, name, layer, spec)
            if part is not None:
                full = (
                    full.unflatten(place, (total, -1)).narrow(place, part.start, _count(part)).flatten(place, place + 1)
                )
        return full

    def _heads_of(self, axis: str, name: str, layer: AttentionLayer, spec: CacheSpec) -> tuple[int, slice | None]:
        """(heads of an axis, those of this process); None where it has the whole axis."""
        stored = spec.num_v_heads if name.startswith("v_") else spec.num_kv_heads
        if axis == "N":
            return layer.num_attention_heads, self.heads(layer.num_attention_heads)
        if axis in ("C", "U", "K"):  # the source's heads go with the stored head that they are in
            return stored, self.heads(stored)
        if axis.startswith("K/") and name.startswith(READERS):  # of a stored head, those that its queries read
            within, mine = layer.num_kv_heads // stored, self.heads(layer.num_kv_heads)
            count = min(_count(mine), within)
            return within, slice(mine.start % within, mine.start % within + count)
        return 1, None


def not_shared_out(plan: CachePlan, processes: int) -> int | None:
    """The first layer whose heads so many processes cannot share out evenly; None where they can."""
    for layer, (spec, source) in enumerate(zip(plan.caches, plan.source, strict=True)):
        counts = (source.num_kv_heads, *(() if spec is None else (spec.num_kv_heads, spec.num_v_heads)))
        if source.num_attention_heads % processes or any(heads % processes and processes % heads for heads in counts):
            return layer
    return None


def bytes_per_process(plan: CachePlan, processes: int) -> float:
    """Of one token in the cache of each of so many processes."""
    rank = Rank(0, processes)
    return sum(rank.spec(spec).bytes_per_token(plan.itemsize()) for spec in plan.owned)


def _count(part: slice) -> int:
    return part.stop - part.start
