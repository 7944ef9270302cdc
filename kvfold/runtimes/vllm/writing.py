"""New tokens of one layer into its pages, in all their forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from vllm.forward_context import get_forward_context

from kvfold.runtimes.kernels.cpu_store import LayerWriter, Storage, stores
from kvfold.runtimes.kernels.packed_tokens import by_age
from kvfold.runtimes.vllm.pages import RECENT, Kind


class _Form(NamedTuple):
    """One form of tokens: its kind of pages, these pages, and where in them the tokens go."""

    kind: Kind
    pages: Tensor
    slots_T: Tensor


class _Part(NamedTuple):
    """One side of a form, and how many numbers it has."""

    form: _Form
    side: str
    width: int

    def of(self, x_CTE: Tensor) -> Tensor:
        return by_age(x_CTE, self.width, self.width)[self.form.kind == RECENT]


class PageWriter:
    """Of one layer."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.described: tuple[Any, LayerWriter | None] = None, None

    def write(self, new: Sequence[Tensor], far: Tensor, slots_T: Tensor) -> list[Tensor | None]:
        """Keys, and values where they are others, [C, T, numbers] of all forms side by side. far: pages of the layer's own
        kind. Returns the keys [C, T, R] of each form as they are stored, where layers above are said by them."""
        forms = [_Form(self.attention.attn.kind, far, slots_T), *self._recent()]
        parts = [(part, part.of(x)) for form in forms for part, x in zip(self._parts(form), new, strict=False)]
        stored = self._by_one_call(parts) or [self._by_itself(*one) for one in parts]
        return [x for (part, _), x in zip(parts, stored, strict=True) if part.side == "k"]

    def _recent(self) -> list[_Form]:
        if not self.attention.spec.recent:
            return []
        pages = self.attention.pages.recent
        return [_Form(RECENT, pages.kv_cache, get_forward_context().slot_mapping[pages.layer_name])]

    def _parts(self, form: _Form) -> Iterator[_Part]:
        spec = self.attention.spec.of_recent if form.kind == RECENT else self.attention.spec.of_all
        for name, side in zip("kv", spec.sides, strict=True):
            yield _Part(form, name, side.width)

    def _by_one_call(self, parts: Sequence[tuple[_Part, Tensor]]) -> list[Tensor | None] | None:
        """None where the device's kernel does not serve."""
        state = parts[0][1].dtype, *(part.form.pages.data_ptr() for part, _ in parts)
        if self.described[0] != state:
            self.described = state, self._describe(parts)
        writer = self.described[1]
        return None if writer is None else writer([x for _, x in parts], [part.form.slots_T for part, _ in parts])

    def _describe(self, parts: Sequence[tuple[_Part, Tensor]]) -> LayerWriter | None:
        storages = []
        for part, x in parts:
            format, key = self._format(part), self._key(part)
            packed = format.regions[key].side.format
            storage = packed and Storage(format.rows(part.form.pages, key), packed, self._again(part))
            if storage is None or not stores(storage, x):
                return None
            storages.append(storage)
        return LayerWriter(storages)

    def _by_itself(self, part: _Part, x_CTR: Tensor) -> Tensor | None:
        form = part.form
        return self._format(part).write(form.pages, self._key(part), form.slots_T, x_CTR, read=self._again(part))

    def _format(self, part: _Part) -> Any:
        return self.attention.pages.layout.formats[part.form.kind]

    def _key(self, part: _Part) -> tuple[int, str]:
        return self.attention.layer_idx, part.side

    def _again(self, part: _Part) -> bool:
        return part.side == "k" and self.attention.layer_idx in self.attention.pages.last_reader
