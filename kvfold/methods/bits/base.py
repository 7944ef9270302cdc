"""The contract of a bits method: in which formats one side of a cache can be stored, and what noise that makes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvfold.errors import RecipeError
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import LEAST_VARIANCE, NumberFormat, StoredShape


@dataclass(frozen=True, kw_only=True)
class BitsMethod(ABC):
    """A way to spend bits on stored numbers. Its dataclass fields are its hyper-parameters, by name in recipes.

    `by_spectrum`: it gives leading numbers more bits, and asks a width method how the numbers differ.
    """

    by_spectrum: ClassVar[bool] = False

    @abstractmethod
    def format(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat | None:
        """How numbers of `side` ("keys" or "values") in heads of `width` are stored where all are alike (methods that go
        by the spectrum: with the fewest bits); None: as they are."""

    def fits(self, width: int) -> bool:
        """Whether numbers in heads of `width` can be stored so."""
        return True

    def stored(self, layer: AttentionLayer, side: str, shapes: Sequence[StoredShape]) -> list[StoredShape]:
        """Those of `shapes` that fit, each in the one format that this method has for it. Raises RecipeError if none does."""
        fitting = [shape for shape in shapes if self.fits(shape.width)]
        if not fitting:
            raise RecipeError(
                f"bits: {self} does not divide the {shapes[-1].width} numbers of a head of layer {layer.index}; choose a"
                " divisor."
            )
        return [shape._replace(format=self.format(layer, side, shape.width)) for shape in fitting]

    def curve(
        self, shapes: Sequence[StoredShape], spectrum: Sequence[float], noise: float
    ) -> list[tuple[StoredShape, float]]:
        """Of methods that go by the spectrum: what to store, and the expected distortion, from few bytes to many. Never fewer
        numbers than the first of `shapes`, nor more than the last.

        spectrum: distortion that every number of a head saves, from the first on. noise: distortion of an error that
        changes from token to token, per distortion of one of the same size that does not.
        """
        raise AssertionError("this method stores all numbers alike")


CONTRACT = BitsMethod


def plain_tiers(width: int, bits: int, **fields: object) -> NumberFormat:
    """All numbers alike."""
    return dataclasses.replace(NumberFormat(tiers=((width, bits),)), **fields)  # type: ignore[arg-type]


def shared_energy(spectrum: Sequence[float], starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Energy of which numbers `starts` to `ends`, one tier, lose `noise_share` to quantization; 0 where there are none.

    Every number is divided by w, w^4 its variance, then all are turned and share the error: in sum the mean of variance / w^2
    times the sum of w^2, (sum of roots)^2 / numbers, which is never more than their energy.
    """
    variances = np.asarray(spectrum)
    squares = np.sqrt(np.maximum(variances, LEAST_VARIANCE * variances.max(initial=0.0)))
    squares = np.maximum(squares, np.finfo(float).tiny)
    sums = [np.concatenate([[0.0], np.cumsum(terms)]) for terms in (variances / squares, squares)]
    divided, back = (of[ends] - of[starts] for of in sums)
    return np.where(ends > starts, divided * back / np.maximum(ends - starts, 1), 0.0)


def noise_share(format: NumberFormat | None) -> float:
    """Expected squared error as a share of the energy of what is stored, about; 0 for numbers that stay as they are."""
    if format is None:
        return 0.0
    return format.codec.noise(format)
