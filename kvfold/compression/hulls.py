"""Curves of (bytes, distortion) and one budget for all: what to take of each, so that the distortion in sum is least."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence

from kvfold.plan.number_format import StoredShape
from kvfold.plan.rounding import SLACK

Key = tuple[int, str]
"""Owner of a cache, and a side of it."""

Curve = list[tuple[StoredShape, float]]
"""What a side can store with the distortion of each, from few bytes to many."""

Curves = dict[Key, Curve]
Choice = dict[Key, StoredShape]
Cost = Callable[[Key, StoredShape], float]
"""Bytes per token."""
Price = Callable[[StoredShape], float]
"""The same of one side."""


def best_within(budget: float, curves: Curves, cost: Cost) -> Choice:
    """Of every curve one shape, of at most `budget` bytes per token in sum where the smallest shapes allow it."""
    return _spent(curves, _cheapest(curves, budget, cost), budget, cost)


def _cheapest(curves: Curves, budget: float, cost: Cost) -> Choice:
    """Start from the smallest shapes and buy, step by step, where a stored byte saves the most distortion.

    Steps lie on the lower convex hull of each (bytes, distortion) curve, so that gains fall and greedy is optimal but for
    the last step.
    """
    price = {key: functools.partial(cost, key) for key in curves}
    hulls = {key: lower_hull(points, price[key]) for key, points in curves.items()}
    position = dict.fromkeys(hulls, 0)
    left = budget * SLACK - sum(cost(key, hull[0][0]) for key, hull in hulls.items())
    steps = [(-_gain(hull[0], hull[1], price[key]), key) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, key = heapq.heappop(steps)
        hull, at = hulls[key], position[key]
        more = cost(key, hull[at + 1][0]) - cost(key, hull[at][0])
        if more > left:
            continue
        left -= more
        position[key] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull[at + 1], hull[at + 2], price[key]), key))
    return {key: hull[position[key]][0] for key, hull in hulls.items()}


def _spent(curves: Curves, chosen: Choice, budget: float, cost: Cost) -> Choice:
    """What is left of the budget buys the best steps that still fit, of all points and not only those of the hulls."""
    chosen = dict(chosen)
    distortion = {key: dict(points) for key, points in curves.items()}
    while True:
        left = budget * SLACK - sum(cost(key, shape) for key, shape in chosen.items())
        gains = {
            (key, shape): distortion[key][chosen[key]] - lost
            for key, points in curves.items()
            for shape, lost in points
            if cost(key, shape) - cost(key, chosen[key]) <= left
        }
        if not any(gain > 0 for gain in gains.values()):  # nor where distortions are no numbers
            return chosen
        key, shape = max(gains, key=lambda step: gains[step])
        chosen[key] = shape


def _gain(point: tuple[StoredShape, float], larger: tuple[StoredShape, float], price: Price) -> float:
    return (point[1] - larger[1]) / (price(larger[0]) - price(point[0]))


def lower_hull(points: Sequence[tuple[StoredShape, float]], price: Price) -> Curve:
    """The points of a falling curve that no line between two others undercuts, from few bytes to many."""
    hull: Curve = []
    for point in points:
        if hull and price(point[0]) <= price(hull[-1][0]) * SLACK:
            if point[1] >= hull[-1][1]:
                continue
            hull.pop()
        while len(hull) > 1 and _gain(hull[-2], hull[-1], price) <= _gain(hull[-1], point, price):
            hull.pop()
        hull.append(point)
    return hull
