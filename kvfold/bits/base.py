"""The contract of a bits method: in which formats one side of a cache can be stored, and what noise that makes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfold.attention import AttentionLayer
from kvfold.number_format import NumberFormat, StoredShape


@dataclass(frozen=True, kw_only=True)
class BitsMethod(ABC):
    """A way to spend bits on stored numbers. Its dataclass fields are its hyper-parameters, by name in recipes.

    `by_spectrum`: it gives leading numbers more bits, and asks a width method how the numbers differ.
    """

    by_spectrum: ClassVar[bool] = False

    @abstractmethod
    def form(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat | None:
        """How numbers of `side` ("keys" or "values") in heads of `width` are stored where all are alike (methods that go
        by the spectrum: with the fewest bits); None: as they are."""

    def stored(self, layer: AttentionLayer, side: str, shapes: Sequence[StoredShape]) -> list[StoredShape]:
        """`shapes`, each in the one format that this method has for it."""
        forms = {width: self.form(layer, side, width) for width in {shape.width for shape in shapes}}
        return [shape._replace(form=forms[shape.width]) for shape in shapes]

    def curve(
        self, shapes: Sequence[StoredShape], spectrum: Sequence[float], noise: float
    ) -> list[tuple[StoredShape, float]]:
        """Of methods that go by the spectrum: what to store, and the expected damage, from few bytes to many.

        spectrum: damage that every number of a head saves, from the first on. noise: damage of an error that changes from
        token to token, per damage of one of the same size that does not.
        """
        raise AssertionError("this method stores all numbers alike")


CONTRACT = BitsMethod


def plain_tiers(width: int, bits: int, **fields: object) -> NumberFormat:
    """All numbers alike."""
    return dataclasses.replace(NumberFormat(tiers=((width, bits),)), **fields)  # type: ignore[arg-type]
