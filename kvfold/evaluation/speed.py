"""How fast: time to the first token and per further token, bytes stored and read, share of the device's memory bandwidth.

All contestants take their steps in turn, so that a noisy machine is equally noisy for all; medians.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from kvfold.architectures.base import architecture, empty_model
from kvfold.checkpoint.folder import by_name
from kvfold.checkpoint.source import load_plan
from kvfold.compression.recipe import Recipe, preset_recipe
from kvfold.evaluation.geometries import Shape
from kvfold.evaluation.memory import USED
from kvfold.evaluation.standard_errors import defined
from kvfold.plan.plan import CachePlan
from kvfold.progress import track
from kvfold.runtimes.kernels import gpu, native
from kvfold.runtimes.transformers.attention import FoldedAttention
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.joint import JointAttention
from kvfold.runtimes.transformers.load import default_dtype, load_weights, resolve_device

WARM_UP = 3
PREFILLS = 3
HEADS = "svd_a:width.latent=group,width.v_latent=group,width.kv_heads={}"
"""Latents that are read as heads of ordinary size."""
COPIED_BYTES = 2**28
"""Of the copy whose speed counts as the device's memory bandwidth: larger than the caches of processors."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model and the cache that it decodes with. plan: what the cache stores, for random contents and bytes."""

    model: Any
    plan: CachePlan
    new_cache: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one contestant. Seconds are medians: `ttft` of a prompt of the whole context (nan if not measured), `tpot` of a
    decode step of the whole batch, `attention` of what of it reads the cache (nan for stock models).

    stored_bytes: allocated for the whole batch. read_bytes: of the cache, per step. bandwidth: read_bytes / attention over
    the speed of a copy in the same run. peak_bytes: of the device's allocator during decode steps (0: not on a CPU).
    fitting: sequences of this context that fit into a given memory beside the weights (None where none is given).
    """

    label: str
    ttft: float
    tpot: float
    attention: float
    tokens_per_second: float
    kv_budget: float
    stored_bytes: int
    read_bytes: int
    bandwidth: float
    peak_bytes: int
    fitting: int | None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured, and how: the first row is what others are compared with."""

    settings: dict[str, Any]
    copy_bytes_per_second: float
    rows: tuple[Speed, ...]

    def to_json(self) -> dict[str, Any]:
        return self.settings | {
            "copy_gb_per_second": self.copy_bytes_per_second / 1e9,
            "rows": [defined(dataclasses.asdict(row)) for row in self.rows],
        }


def bench(
    folded: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    shape: Shape | None = None,
    presets: Sequence[str] = (),
    kv_heads: Sequence[int] = (),
    batch: int = 8,
    context: int = 2048,
    steps: int = 20,
    prefills: int = PREFILLS,
    dtype: str = "auto",
    threads: int = 0,
    device: str = "auto",
    memory: int | None = None,
) -> Benchmark:
    """Folders against the original under transformers' own caches; or, with `shape`, presets on a geometry's random weights,
    and latents in `kv_heads` heads of ordinary size.

    The cache is filled with random numbers up to `context`; a prompt is a batch of one. memory: bytes, to say how many
    sequences fit. Raises KvfoldError.
    """
    device = resolve_device(device)
    if threads:
        torch.set_num_threads(threads)
    if shape is None:
        assert against is not None, "the command line asks for it"
        dtype = default_dtype(load_plan(against)[0].dtype, device) if dtype == "auto" else dtype
        contestants = _of_folders(folded, against, dtype, device, context + steps)
    else:
        dtype = "bfloat16" if dtype == "auto" else dtype
        recipes = recipes_of(("identity", *presets), kv_heads)
        contestants = _of_shape(shape, recipes, dtype, device, context + steps)
    settings = {"batch": batch, "context": context, "dtype": dtype, "steps": steps, "device": _hardware(device)}
    if device == "cpu":
        settings |= {"threads": torch.get_num_threads(), "kernel": "torch" if native.library() is None else "kvfold"}
    elif device.startswith("cuda"):
        works = gpu.works_for(torch.empty(0, device=device, dtype=getattr(torch, dtype)))
        settings["kernel_of_packed"] = "triton" if works else "torch"
        torch.backends.cuda.enable_cudnn_sdp(False)  # the original plans anew at every step with it (attention.py)
    settings |= {"memory": memory} if memory else {}
    settings |= shape.facts() if shape else {}
    return _race(contestants, settings, device, prefills)


def recipes_of(presets: Sequence[str], kv_heads: Sequence[int]) -> dict[str, Recipe]:
    """What is made of a shape, by label. Raises RecipeError."""
    named = {name: name for name in presets} | {f"{heads} heads": HEADS.format(heads) for heads in kv_heads}
    return {label: preset_recipe(preset, {"model": "-", "out": "-"}) for label, preset in named.items()}


def _of_folders(
    folded: Sequence[str | Path], against: str | Path, dtype: str, device: str, tokens: int
) -> dict[str, Contestant]:
    original = load_weights(Path(against), dtype, device)
    contestants = _stock(original, load_plan(against)[0], tokens)
    for name, folder in by_name(folded, taken=contestants).items():
        plan, _ = load_plan(folder)
        cache = _cache_of(plan)
        contestants[name] = Contestant(model=load_weights(folder, dtype, device), plan=plan, new_cache=cache)
    return contestants


def _of_shape(
    shape: Shape, recipes: Mapping[str, Recipe], dtype: str, device: str, tokens: int
) -> dict[str, Contestant]:
    """The original, and what the recipes make of it; `identity` is the original in kvfold's cache."""
    plans = {name: shape.plan(recipe, dtype) for name, recipe in recipes.items()}
    contestants = _stock(shape.stock(dtype, device), plans["identity"], tokens)
    for name, plan in plans.items():
        model = shape.folded(plan, dtype, device)
        contestants[name] = Contestant(model=model, plan=plan, new_cache=_cache_of(plan))
    return contestants


def _cache_of(plan: CachePlan) -> Callable[[], FoldedCache]:
    return lambda: FoldedCache(plan)


def _stock(model: Any, plan: CachePlan, tokens: int) -> dict[str, Contestant]:
    config, room = model.config, tokens + WARM_UP
    arch = architecture(config.model_type)
    first = arch.describe(empty_model(arch, config))[0]
    found = {
        "original, DynamicCache": Contestant(model=model, plan=plan, new_cache=lambda: DynamicCache(config=config))
    }
    # the biases of alibi have the length of the mask, not that of a cache of fixed size
    if getattr(model, "_can_compile_fullgraph", False) and not first.alibi:
        static = lambda: StaticCache(config=config, max_cache_len=room)  # noqa: E731
        found["original, StaticCache"] = Contestant(model=model, plan=plan, new_cache=static)
    return found


@torch.inference_mode()
def _race(contestants: Mapping[str, Contestant], settings: dict[str, Any], device: str, prefills: int) -> Benchmark:
    runners = [_Runner(name, contestant, settings, device) for name, contestant in contestants.items()]
    copies, steps = [], settings["steps"] + WARM_UP
    for step in track(range(steps), "decoding", steps):
        for runner in runners:
            runner.step(counts=step >= WARM_UP)
        copies.append(_copy_speed(device))
    for runner in runners:
        runner.stop_decoding()
    prompt = torch.randint(3, 200, (1, settings["context"]), device=device)
    for _ in track(range(prefills), "prompts", prefills):
        for runner in runners:
            runner.prompt(prompt)
    copy = statistics.median(copies)
    rows = tuple(runner.speed(copy) for runner in runners)
    return Benchmark(settings=settings, copy_bytes_per_second=copy, rows=rows)


class _Runner:
    """One contestant with its full cache, and what was measured of it."""

    def __init__(self, label: str, contestant: Contestant, settings: Mapping[str, Any], device: str) -> None:
        self.label, self.contestant, self.device = label, contestant, device
        self.batch, self.context = settings["batch"], settings["context"]
        self.memory: int | None = settings.get("memory")
        self.clock = _Clock(contestant.model, device)
        self.cache = contestant.new_cache()
        self.folded = isinstance(self.cache, FoldedCache)
        self.dtype = settings["dtype"]
        dtype = getattr(torch, self.dtype)
        fill(self.cache, contestant.plan, self.batch, self.context, dtype, device)
        self.token = torch.full((self.batch, 1), 5, device=device)
        self.tpot: list[float] = []
        self.attention: list[float] = []
        self.ttft: list[float] = []
        self.peak = self.stored = 0

    def step(self, *, counts: bool) -> None:
        """One token for every sequence; the first few do not count."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.clock.seconds = 0.0
        model, cache = self.contestant.model, self.cache
        seconds = timed(lambda: model(self.token, past_key_values=cache, use_cache=True), self.device)
        attention = self.clock.read()
        if counts:
            self.tpot.append(seconds)
            self.attention.append(attention)
            self.peak = max(self.peak, 0 if self.device == "cpu" else torch.cuda.max_memory_allocated(self.device))

    def stop_decoding(self) -> None:
        """Note what the cache holds, and let go of it."""
        self.stored, self.cache = allocated(self.cache), None

    def prompt(self, prompt_BT: Tensor) -> None:
        """One prompt into a new cache."""
        model, cache = self.contestant.model, self.contestant.new_cache()
        self.ttft.append(
            timed(lambda: model(prompt_BT, past_key_values=cache, use_cache=True, logits_to_keep=1), self.device)
        )

    def speed(self, copy: float) -> Speed:
        """What all of it says. copy: bytes per second."""
        plan, tpot = self.contestant.plan, statistics.median(self.tpot)
        of_one = plan.kv_read_bytes if self.folded else plan.source_kv_bytes
        read = self.batch * of_one(self.context, dtype=self.dtype)
        attention = statistics.median(self.attention) if self.folded else math.nan
        return Speed(
            label=self.label,
            ttft=statistics.median(self.ttft) if self.ttft else math.nan,
            tpot=tpot,
            attention=attention,
            tokens_per_second=self.batch / tpot,
            kv_budget=plan.kv_budget if self.folded else 1.0,
            stored_bytes=self.stored,
            read_bytes=read,
            bandwidth=read / attention / copy,
            peak_bytes=self.peak,
            fitting=None if self.memory is None else self._fitting(self.memory),
        )

    def _fitting(self, memory: int) -> int:
        """Sequences whose caches fit beside the weights, as `kvfold inspect --memory` counts them."""
        plan = self.contestant.plan
        one = (plan.kv_bytes if self.folded else plan.source_kv_bytes)(self.context, dtype=self.dtype)
        weights = sum(parameter.nbytes for parameter in self.contestant.model.parameters())
        return max(int(USED * memory) - weights, 0) // one


def fill(cache: Any, plan: CachePlan, batch: int, context: int, dtype: torch.dtype, device: str) -> None:
    """Random keys and values for every layer."""
    for index, spec in enumerate(plan.caches):
        if spec is None:
            continue
        width, v_width = spec.made_widths
        z = torch.randn(batch, spec.num_kv_heads, context, width, dtype=dtype, device=device)
        y = torch.randn(batch, spec.num_v_heads, context, v_width, dtype=dtype, device=device)
        cache.update(z, y, index)
        if isinstance(cache, FoldedCache):
            cache.layers[index].settle_runs()
    if plan.position_bytes:
        cache.see(torch.arange(context, device=device)[None], batch)


def allocated(cache: Any) -> int:
    """Bytes that a cache object holds, kvfold's or transformers'."""
    if isinstance(cache, FoldedCache):
        return cache.nbytes_allocated
    tensors = (getattr(layer, side, None) for layer in cache.layers for side in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call, until the device has finished."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _copy_speed(device: str) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.empty(COPIED_BYTES // 2, dtype=torch.bfloat16, device=device).fill_(1)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device)


class _Clock:
    """Seconds that a folded model spends on reading its cache: scores, softmax and sums, without projections."""

    def __init__(self, model: Any, device: str) -> None:
        self.seconds, self.device = 0.0, device
        self.events: list[tuple[Any, Any]] = []
        for module in model.modules():
            if isinstance(module, FoldedAttention):
                name = "_attend_past" if isinstance(module, JointAttention) else "_read"
                setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.device == "cpu":
                start = time.perf_counter()
                out = attend(*args, **kwargs)
                self.seconds += time.perf_counter() - start
                return out
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = attend(*args, **kwargs)
            end.record()
            self.events.append((begin, end))
            return out

        return watched

    def read(self) -> float:
        """Since it was set to 0; the device has finished."""
        self.seconds += sum(begin.elapsed_time(end) for begin, end in self.events) / 1e3
        self.events.clear()
        return self.seconds


def _hardware(device: str) -> str:
    return "cpu" if device == "cpu" else str(torch.cuda.get_device_name(device))
