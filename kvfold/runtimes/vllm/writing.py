"""New tokens of one layer into its pages, in all their forms, by which layers above are then said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from kvfold.plan.cache_spec import CacheSpec
from kvfold.runtimes.kernels.cpu_store import LayerWriter, Storage, stores
from kvfold.runtimes.kernels.paging import scatter
from kvfold.runtimes.vllm.pages import RECENT, Kind


class _Part(NamedTuple):
    """One side of one form, `form` counted from the one that all tokens have: where in what comes in its numbers are."""

    form: int
    kind: Kind
    side: int
    first: int
    width: int

    @property
    def name(self) -> str:
        return "kv"[self.side]

    def of(self, x_CTE: Tensor) -> Tensor:
        return x_CTE[..., self.first : self.first + self.width]


class PageWriter:
    """Of one layer."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.parts: list[_Part] = []
        self.described: tuple[Any, LayerWriter | None, list[Tensor]] = None, None, []

    def write(self, new: Sequence[Tensor], far: Tensor, slots_T: Tensor) -> list[Tensor | None]:
        """Keys, and values where they are others, [C, T, numbers] of all forms side by side, less what the numbers of layers
        below say. far: pages of the layer's own kind. Returns the keys [C, T, R] of each form as they are stored, where
        layers above are said by them."""
        attention, pages, slots = self.attention, [far], [slots_T]
        self.parts = self.parts or list(self._parts(new))
        if attention.spec.recent:
            recent = attention.pages.recent
            pages.append(recent.kv_cache)
            slots.append(get_forward_context().slot_mapping[recent.layer_name])
            if recent.step.fresh is not None:
                return self._write_fresh(new, pages, slots, recent.step)
        state = new[0].dtype, *(x.data_ptr() for x in pages), self._ways()
        if self.described[0] != state:
            rows = [self._format(part).rows(pages[part.form], self._key(part)) for part in self.parts]
            self.described = state, self._describe(new, rows), rows
        return self._stored(*self.described[1:], new, [slots[part.form] for part in self.parts])

    def _write_fresh(
        self, new: Sequence[Tensor], pages: Sequence[Tensor], slots: Sequence[Tensor], step: Any
    ) -> list[Tensor | None]:
        """The finer form of recent tokens to where prompts read it, and from there into pages that are kept."""
        far, near = pages
        self._drop(step.fresh)
        kept = step.kept(slots[1], near.shape[2])
        everywhere, rows, recent = torch.arange(len(kept), device=kept.device), [], []
        for part in self.parts:
            format, key = self._format(part), self._key(part)
            if part.kind == RECENT:
                step.fresh[key] = format.fresh(key, len(kept), near.device)
                recent.append((format.rows(near, key), step.fresh[key][0]))
            rows.append(step.fresh[key] if part.kind == RECENT else format.rows(far, key))
        to = [everywhere if part.kind == RECENT else slots[0] for part in self.parts]
        stored = self._stored(self._describe(new, rows), rows, new, to)
        for pages_PCtX, new_CTX in recent:
            scatter(pages_PCtX, kept, new_CTX)
        return stored

    def _drop(self, fresh: dict[tuple[int, str], Tensor]) -> None:
        """What no layer reads any more."""
        last, here = self.attention.pages.last_user, self.attention.layer_idx
        for key in [key for key in fresh if last[key[0]] < here]:
            del fresh[key]

    def _stored(
        self, writer: LayerWriter | None, rows: Sequence[Tensor], new: Sequence[Tensor], slots: Sequence[Tensor]
    ) -> list[Tensor | None]:
        if writer is None:
            stored = self._part_by_part(new, rows, slots)
        else:
            known = self._known() if self.attention.spec.predicted_from else ()
            stored = writer(new, slots, known)
        return [x for part, x in zip(self.parts, stored, strict=True) if not part.side]

    def _ways(self) -> Any:
        """By which numbers of layers below say something, as they are now."""
        if not self.attention.spec.predicted_from:
            return None
        weight = self.attention.k_p_proj.weight
        return weight.data_ptr(), weight._version

    def _parts(self, new: Sequence[Tensor]) -> Iterator[_Part]:
        attention = self.attention
        kinds = (attention.attn.kind, RECENT) if attention.spec.recent else (attention.attn.kind,)
        for form, kind in enumerate(kinds):
            for side, (x, stored) in enumerate(zip(new, self._form(kind).sides, strict=False)):
                first = x.shape[2] - stored.width if kind == RECENT else 0
                yield _Part(form, kind, side, first, stored.width)

    def _form(self, kind: Kind) -> CacheSpec:
        spec: CacheSpec = self.attention.spec
        return spec.of_recent if kind == RECENT else spec.of_all

    def _describe(self, new: Sequence[Tensor], rows: Sequence[Tensor]) -> LayerWriter | None:
        """None where the device's kernel does not serve."""
        predicted = bool(self.attention.spec.predicted_from)
        numbers = self._numbers() if predicted else []
        ways = self._ways_of_parts(numbers) if predicted else [None] * len(self.parts)
        storages = []
        for part, way, own in zip(self.parts, ways, rows, strict=True):
            packed = self._format(part).regions[self._key(part)].side.format
            storage = packed and Storage(own, packed, self._again(part), part.side, part.first, way)
            if storage is None or not stores(storage, part.of(new[part.side])):
                return None
            storages.append(storage)
        return LayerWriter(storages, numbers)

    def _ways_of_parts(self, numbers: Sequence[Sequence[int]]) -> list[Tensor]:
        """[known numbers, R] of each: where in the map its own numbers and those that are known of its form meet."""
        columns = self.attention.k_p_proj.weight.detach().T.split([sum(own) for own in numbers])
        return [part.of(way_PE).float().contiguous() for part, way_PE in zip(self.parts, columns, strict=True)]

    def _known(self) -> list[list[Tensor]]:
        """Of each part [C, T, R] of what layers below have just stored, whose first numbers say something of it."""
        new = [self.attention.pages.new[i] for i in self.attention.spec.predicted_from]
        return [[x[part.form].contiguous() for x in new] for part in self.parts]

    def _numbers(self) -> list[list[int]]:
        """How many these are."""
        parts = zip(self.parts, self._known(), strict=True)
        return [[self._form(part.kind).predicting(x.shape[2]) for x in known] for part, known in parts]

    def _part_by_part(self, new: Sequence[Tensor], rows: Sequence[Tensor], slots: Sequence[Tensor]) -> list[Any]:
        if self.attention.spec.predicted_from:
            known = zip(self._known(), self._numbers(), strict=True)
            below = [x[..., :count] for own, counts in known for x, count in zip(own, counts, strict=True)]
            new = [new[0] - self.attention.k_p_proj(torch.cat(below, dim=2))]
        return [
            self._by_itself(part, new[part.side], *where) for part, *where in zip(self.parts, rows, slots, strict=True)
        ]

    def _by_itself(self, part: _Part, x_CTE: Tensor, rows: Tensor, slots_T: Tensor) -> Tensor | None:
        return self._format(part).write(rows, self._key(part), slots_T, part.of(x_CTE), read=self._again(part))

    def _format(self, part: _Part) -> Any:
        return self.attention.pages.layout.formats[part.kind]

    def _key(self, part: _Part) -> tuple[int, str]:
        return self.attention.layer_idx, part.name

    def _again(self, part: _Part) -> bool:
        return not part.side and self.attention.layer_idx in self.attention.pages.last_reader
