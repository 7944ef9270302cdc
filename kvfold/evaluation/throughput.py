"""Throughput of a runtime that serves requests: many at once, a cache of fixed size, all engines asked in turn."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.checkpoint.source import load_plan
from kvfold.compression.recipe import Recipe
from kvfold.errors import KvfoldError
from kvfold.evaluation.geometries import Shape
from kvfold.plan.plan import CachePlan
from kvfold.progress import track
from kvfold.runtimes.base import runtime

WARM_UP = 8
"""Tokens of the requests that do not count."""
FOLLOW_UP = 64
"""Tokens by which a request is longer when it comes back, beside its answer."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of one engine: medians over the rounds. Seconds to a request's first token, waiting included, and per further token;
    generated tokens of all requests per second. cache_tokens: those that the engine says its cache holds."""

    label: str
    kv_budget: float
    cache_tokens: int
    tokens_per_second: float
    ttft: float
    tpot: float


@dataclass(frozen=True, kw_only=True)
class ThroughputBenchmark:
    """What was measured, and how: the first row is what others are compared with."""

    settings: dict[str, Any]
    rows: tuple[Throughput, ...]

    def to_json(self) -> dict[str, Any]:
        return self.settings | {"rows": [dataclasses.asdict(row) for row in self.rows]}


def of_shape(shape: Shape, recipes: Mapping[str, Recipe], folder: Path, dtype: str = "bfloat16") -> dict[str, Path]:
    """Folders with random weights by label: the original, and what recipes make of it."""
    folders = {"original": folder / "original"}
    shape.stock(dtype, "cpu").save_pretrained(folders["original"])
    for number, (label, recipe) in enumerate(recipes.items()):
        folders[label] = folder / str(number)
        shape.folded(shape.plan(recipe, dtype), dtype, "cpu").save_pretrained(folders[label])
    return folders


def measure(
    folders: Mapping[str, Path],
    *,
    engine: str,
    requests: int,
    prompt: int,
    tokens: int,
    memory: int,
    turns: int = 1,
    rounds: int = 3,
    dtype: str = "auto",
    compiled: bool = False,
    max_num_batched_tokens: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> ThroughputBenchmark:
    """`requests` random prompts of `prompt` tokens, each answered with `tokens` tokens, from a cache of `memory` bytes.

    `turns`: so often every request comes, each time with its answer and FOLLOW_UP tokens more, as chats and questions about a
    document do: an engine that has kept its tokens reads the new ones only.
    Folders by label, the original first; facts: for the table's title. `engine`: a runtime that serves requests. In another
    `dtype` than the checkpoint's every cache holds as many tokens as `memory` holds in that. `max_num_batched_tokens`: of
    prompts in one step; None leaves it to the engine. Raises KvfoldError where the
    engine is not installed, or where a cache does not hold one request.
    """
    plans = {label: load_plan(folder)[0] for label, folder in folders.items()}
    length = prompt + turns * tokens + (turns - 1) * FOLLOW_UP
    for label, plan in plans.items():
        need = plan.kv_bytes_per_token() * length + plan.recent_bytes()
        if need > memory:
            raise KvfoldError(
                f"one request takes {need:,} bytes of {folders[label]}'s cache, and --memory gives {memory:,}."
            )
    engines = {
        label: runtime(engine).engine(
            folders[label],
            length=length,
            memory=_memory(plan, memory, dtype),
            dtype=dtype,
            compiled=compiled,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        for label, plan in plans.items()
    }
    for one in engines.values():
        one.answer(_prompts(2, prompt, seed=rounds), min(WARM_UP, tokens))
    found: dict[str, list[tuple[float, float, float]]] = {label: [] for label in engines}
    for number in track(range(rounds), "rounds", rounds):
        for label, one in engines.items():
            found[label].append(answer_turns(one, _prompts(requests, prompt, seed=number), tokens, turns))
    first = next(iter(engines.values()))
    described = {"engine": first.name, "requests": requests, "prompt": prompt, "new_tokens": tokens}
    described |= {"turns": turns} if turns > 1 else {}
    described |= {"cache_bytes": memory, "counted_in": next(iter(plans.values())).dtype}
    described |= {"rounds": rounds, "dtype": first.dtype, "compiled": compiled}
    described |= {"max_num_batched_tokens": first.max_num_batched_tokens}
    rows = tuple(_row(label, folders[label], engines[label].cache_tokens, found[label]) for label in engines)
    return ThroughputBenchmark(settings=described | dict(facts or {}), rows=rows)


def answer_turns(engine: Any, prompts: list[list[int]], tokens: int, turns: int) -> tuple[float, float, float]:
    """(tokens per second of all together, seconds to the first token, seconds per further token; medians of the turns)."""
    found = []
    for turn in range(turns):
        found.append(engine.answer(prompts, tokens))
        more = _prompts(len(prompts), FOLLOW_UP, seed=turn)
        prompts = [[*was, *answer, *new] for was, answer, new in zip(prompts, found[-1].tokens, more, strict=True)]
    seconds = sum(one.seconds for one in found)
    ttft, tpot = (statistics.median(getattr(one, name) for one in found) for name in ("ttft", "tpot"))
    return len(prompts) * tokens * turns / seconds, ttft, tpot


def _memory(plan: CachePlan, memory: int, dtype: str) -> int:
    """Bytes that hold in `dtype` as many tokens as `memory` in the checkpoint's own."""
    return memory if dtype == "auto" else round(memory * plan.kv_bytes_per_token(dtype) / plan.kv_bytes_per_token())


def _prompts(count: int, length: int, *, seed: int) -> list[list[int]]:
    """New ones for every round, which no prefix cache knows."""
    generator = random.Random(seed)
    return [[generator.randrange(3, 250) for _ in range(length)] for _ in range(count)]


def _row(label: str, folder: Path, cache_tokens: int, found: list[tuple[float, float, float]]) -> Throughput:
    speed, ttft, tpot = (statistics.median(elements) for elements in zip(*found, strict=True))
    return Throughput(
        label=label,
        kv_budget=load_plan(folder)[0].kv_budget,
        cache_tokens=cache_tokens,
        tokens_per_second=speed,
        ttft=ttft,
        tpot=tpot,
    )
