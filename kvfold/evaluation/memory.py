"""How many sequences fit into a memory, for a model as it is and at smaller budgets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.checkpoint.hub import headers
from kvfold.checkpoint.source import plan_of_headers
from kvfold.errors import RecipeError

BUDGETS = tuple(1 / 2**power for power in range(6))
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
USED = 0.9
"""Of the memory, what weights and cache may take together; servers leave about as much for activations."""


@dataclass(frozen=True)
class Fitting:
    """One cache: bytes of one sequence, and how many sequences fit beside the weights."""

    label: str
    kv_budget: float
    bytes_per_sequence: int
    sequences: int


@dataclass(frozen=True)
class Capacity:
    """What fits into `memory` bytes, of which `weights` are taken, at `context` tokens per sequence.

    `needed`: the budget at which `wanted` sequences fit, 0.0 where even the weights leave no room; None where none are.
    """

    memory: int
    context: int
    weights: int
    rows: tuple[Fitting, ...]
    wanted: int | None
    needed: float | None

    def to_json(self) -> dict[str, Any]:
        rows = [vars(row) for row in self.rows]
        return vars(self) | {"rows": rows}


def capacity(model: str | Path, *, memory: int, context: int, wanted: int | None = None) -> Capacity:
    """Of a folder's own cache and, where it is not folded, of every budget of BUDGETS.

    Cache and weights share `USED` of `memory`. Weights are those of the folder: a fold's maps back to heads add to attention
    what `kvfold compress` and the card say, once for all sequences.
    """
    plan, folded, _ = plan_of_headers(model)
    weights = sum(stored.nbytes for stored in headers(model).tensors.values())
    room = max(int(USED * memory) - weights, 0)
    whole = plan.source_kv_bytes(context)
    rows = [Fitting("original's cache" if folded else "original", 1.0, whole, room // whole)]
    if folded:
        own = plan.kv_bytes(context)
        rows.append(Fitting("this model", own / whole, own, room // own))
    else:
        rows += [_at(budget, whole, room) for budget in BUDGETS[1:]]
    needed = None if wanted is None else min(room / wanted / whole, 1.0)
    return Capacity(memory, context, weights, tuple(rows), wanted, needed)


def _at(budget: float, whole: int, room: int) -> Fitting:
    size = math.ceil(budget * whole)
    return Fitting(f"kv_budget 1/{1 / budget:.0f}", budget, size, room // size)


def parse_size(text: str, *, binary: bool = False) -> int:
    """80GB, 24GiB, 32k. binary: k and m are 1,024 and 1,048,576, as context lengths are named. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\d{1,3}(?:,\d{3})+)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else None
    if found is None or unit not in UNITS:
        raise RecipeError(f"{text!r} is not a size; give 80GB, 24GiB, 32k or a number.")
    scale = {"K": 2**10, "M": 2**20}.get(unit, UNITS[unit]) if binary else UNITS[unit]
    size = int(float(found.group(1).replace(",", "")) * scale)
    if size < 1:
        raise RecipeError(f"{text!r} is nothing; give 80GB, 24GiB, 32k or a number.")
    return size
