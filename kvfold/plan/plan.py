"""CachePlan: what is cached, who reads it, how wide, in how many bytes. The one format between methods and runtimes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.errors import PlanError
from kvfold.plan.number_format import NumberFormat, StoredShape, tokens_at_once
from kvfold.runtimes.vllm.limits import vllm_obstacle

FORMAT_VERSION = 1
CONFIG_KEY = "kv_compression_config"
"""Key of config.json under which the plan lives."""

CACHE_BLOCK = 256
"""Tokens by which a cache grows. Part of the format, since allocated bytes follow from it."""

POSITION_BYTES = 4
"""A token's position, where keys are rotated on read."""

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number, by the name that config.json uses."""


@dataclass(frozen=True, kw_only=True)
class SourceLayer:
    """What one layer of the original model caches, under stock transformers.

    `window` is the sliding window in tokens, None where a layer sees everything.
    """

    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def numbers_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim

    def tokens_stored(self, context_len: int) -> int:
        """Tokens that a stock DynamicCache holds after `context_len` tokens (a window keeps one fewer than its width)."""
        return context_len if self.window is None else min(context_len, self.window - 1)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What one owning layer stores for each token.

    Keys are `num_kv_heads` heads of `head_dim` numbers, values `num_v_heads` heads of `v_head_dim` numbers.
    `rope`: `applied` stores keys as they are after rotation; `on_read` before it, and every step rotates what it reads;
    `none`: the family does not rotate, so that projections of keys are part of the ordinary weights.
    `readers_rotate`: whether the layers that read this cache see rotated keys, as its owner does (only published MLKV weights
    do not; such a cache stores its keys before rotation).
    `joint`: what is stored is made of the keys and values of ALL layers that use this cache, after they have run; so tokens
    of the running step are seen exactly, and only past tokens through the latents.
    `k_projection`: keys go through `k_a_proj` before they are stored, `k_b_proj` leads back to the source's heads.
    `k_partial`: of heads that are rotated in part, k_proj gives the rotated numbers alone, which pass `k_a_proj`; what the
    rest adds to the latents comes from `k_u_proj` at once.
    `k_offset`: a fixed vector is added to keys that are rebuilt on read, before they are rotated.
    `hidden`: width of the hidden layer of small networks that are added to the linear ways in and back, of keys and values;
    both are then rebuilt on read. 0 for none.
    `v_projection`: the way back to the source's value heads is kept apart (`v_b_proj`) instead of being fused into `o_proj`.
    `output_bias`: the fold added a bias to `o_proj` that the source does not have.
    `k_bits`, `v_bits`: how stored numbers are quantized; None keeps them in the checkpoint's dtype.
    `stored_bias`: what makes stored keys and values has a bias that the source does not have (numbers are quantized around
    their mean).
    """

    num_kv_heads: int
    head_dim: int
    num_v_heads: int
    v_head_dim: int
    rope: str = "applied"
    readers_rotate: bool = True
    joint: bool = False
    k_projection: bool = False
    k_partial: bool = False
    k_offset: bool = False
    hidden: int = 0
    v_projection: bool = False
    output_bias: bool = False
    k_bits: NumberFormat | None = None
    v_bits: NumberFormat | None = None
    stored_bias: bool = False
    window: int | None = None
    sinks: int = 0

    @property
    def numbers_per_token(self) -> int:
        return self.num_kv_heads * self.head_dim + self.num_v_heads * self.v_head_dim

    @property
    def sides(self) -> tuple[StoredShape, StoredShape]:
        """Keys and values."""
        return (
            StoredShape(self.num_kv_heads, self.head_dim, self.k_bits),
            StoredShape(self.num_v_heads, self.v_head_dim, self.v_bits),
        )

    @property
    def widest(self) -> int:
        """Numbers per token of the larger side."""
        return max(side.numbers for side in self.sides)

    def bytes_per_token(self, itemsize: int) -> float:
        """Stored for one token, scales included; what several tokens share is shared out."""
        return sum(side.bytes_per_token(itemsize) for side in self.sides)

    def bytes_allocated(self, context_len: int, itemsize: int) -> int:
        """Of the storage that `context_len` tokens need."""
        tokens = self.tokens_allocated(context_len)
        return sum(side.bytes_allocated(tokens, itemsize) for side in self.sides)

    def tokens_allocated(self, context_len: int) -> int:
        """Tokens for which a cache has room after `context_len` tokens: whole blocks, at most a window and a block more."""
        capacity = round_up(context_len)
        return capacity if self.window is None else min(capacity, round_up(self.window) + CACHE_BLOCK)

    def tokens_read(self, context_len: int) -> int:
        """Tokens that one decode step attends to."""
        return context_len if self.window is None else min(context_len, self.window)


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The whole cache of a folded model.

    `caches[i]` is what layer i stores; it is None where the layer reads the cache of the EARLIER layer
    `kv_sharing_target_layer[i]`. `dtype` is the checkpoint's, in which bytes are counted unless another one is asked for.
    Raises PlanError if the parts contradict each other.
    """

    dtype: str
    source: tuple[SourceLayer, ...]
    caches: tuple[CacheSpec | None, ...]
    kv_sharing_target_layer: tuple[int | None, ...]
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def num_layers(self) -> int:
        return len(self.source)

    def owner(self, layer: int) -> int:
        """The layer whose cache `layer` reads: itself, or the one it shares."""
        target = self.kv_sharing_target_layer[layer]
        return layer if target is None else target

    def readers(self, owner: int) -> list[int]:
        """The layers that use the cache of `owner`, itself first; none if it owns none."""
        return [layer for layer in range(self.num_layers) if self.owner(layer) == owner]

    def cache_of(self, layer: int) -> CacheSpec:
        spec = self.caches[self.owner(layer)]
        assert spec is not None, f"layer {layer} reads layer {self.owner(layer)}, which stores nothing"
        return spec

    @property
    def owned(self) -> list[CacheSpec]:
        return [spec for spec in self.caches if spec is not None]

    @property
    def kv_budget(self) -> float:
        """Bytes kept per token / bytes per token of the original cache in its own dtype."""
        return self.kv_bytes_per_token() / self.source_kv_bytes_per_token()

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes stored for one more token of one sequence, over all layers (inside every window)."""
        itemsize = self.itemsize(dtype)
        return math.ceil(sum(spec.bytes_per_token(itemsize) for spec in self.owned)) + self.position_bytes

    @property
    def position_bytes(self) -> int:
        """Bytes per token of the positions that rotation on read needs; one cache of them serves all layers."""
        return POSITION_BYTES if any(spec.rope == "on_read" for spec in self.owned) else 0

    def source_kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """The same for the original model."""
        return self.itemsize(dtype) * sum(layer.numbers_per_token for layer in self.source)

    def kv_bytes(self, context_len: int, *, batch_size: int = 1, dtype: str | None = None) -> int:
        """Bytes allocated for `batch_size` sequences of `context_len` tokens, unfilled blocks and windows included."""
        itemsize = self.itemsize(dtype)
        stored = sum(spec.bytes_allocated(context_len, itemsize) for spec in self.owned)
        return batch_size * (stored + self.position_bytes * round_up(context_len))

    def source_kv_bytes(self, context_len: int, *, batch_size: int = 1, dtype: str | None = None) -> int:
        """Bytes that the original model's DynamicCache holds after `context_len` tokens."""
        numbers = sum(layer.numbers_per_token * layer.tokens_stored(context_len) for layer in self.source)
        return batch_size * self.itemsize(dtype) * numbers

    @property
    def joint(self) -> bool:
        """Whether some cache shows past tokens through latents and those of the running step exactly."""
        return any(spec.joint for spec in self.owned)

    @property
    def depends_on_steps(self) -> bool:
        """Whether the result depends on the steps in which tokens came: some caches show the last tokens exactly."""
        return self.joint or any(
            side.form is not None and side.form.block > 1 for spec in self.owned for side in spec.sides
        )

    def kv_workspace_bytes(self, *, batch_size: int = 1, dtype: str | None = None, device: str = "cpu") -> int:
        """Packed keys and values that one decode step turns back into numbers at a time, of one layer; with keys that are
        rebuilt on read, those too. Unpacking them takes up to three times as much for a moment."""
        sizes = []
        for spec, source in zip(self.caches, self.source, strict=True):
            if spec is not None:
                full = source.numbers_per_token // 2
                numbers = sum(side.numbers for side in spec.sides if side.form is not None)
                numbers += full if spec.rope == "on_read" else 0
                sizes.append(numbers * tokens_at_once(batch_size * max(spec.widest, full), device))
        return batch_size * self.itemsize(dtype) * max(sizes)

    def kv_read_bytes(self, context_len: int, *, dtype: str | None = None) -> int:
        """Bytes of cache read by one decode step of one sequence; a shared cache is read by each of its readers."""
        specs = [self.cache_of(layer) for layer in range(self.num_layers)]
        itemsize = self.itemsize(dtype)
        read = sum(spec.bytes_per_token(itemsize) * spec.tokens_read(context_len) for spec in specs)
        return math.ceil(read) + self.position_bytes * context_len

    def itemsize(self, dtype: str | None = None) -> int:
        return ITEMSIZE[dtype or self.dtype]

    def servable_by(self) -> dict[str, str | None]:
        """Runtime -> None if it serves this plan, else the obstacle and what to change."""
        return {"transformers": None, "vllm": vllm_obstacle(self)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {
            "version": self.version,
            "dtype": self.dtype,
            "source": [dataclasses.asdict(layer) for layer in self.source],
            "caches": [spec and dataclasses.asdict(spec) for spec in self.caches],
            "kv_sharing_target_layer": list(self.kv_sharing_target_layer),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CachePlan:
        """The plan that `to_dict` wrote. Raises PlanError on unknown or missing fields."""
        if data.get("version") != FORMAT_VERSION:
            raise PlanError(
                f"{CONFIG_KEY} has version {data.get('version')!r}; this kvfold reads version {FORMAT_VERSION}."
                " Install the kvfold that wrote the folder, or fold the original model again."
            )
        _check_fields(data, cls, "plan")
        return cls(
            version=data["version"],
            dtype=data["dtype"],
            source=tuple(_build(SourceLayer, entry, f"source[{i}]") for i, entry in enumerate(data["source"])),
            caches=tuple(entry and _build(CacheSpec, entry, f"caches[{i}]") for i, entry in enumerate(data["caches"])),
            kv_sharing_target_layer=tuple(data["kv_sharing_target_layer"]),
        )


def round_up(tokens: int, block: int = CACHE_BLOCK) -> int:
    """`tokens` rounded up to whole blocks."""
    return -(-tokens // block) * block


def source_plan(source: Sequence[SourceLayer], dtype: str) -> CachePlan:
    """The plan that keeps the original cache as it is."""
    caches = tuple(
        CacheSpec(
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            num_v_heads=layer.num_kv_heads,
            v_head_dim=layer.head_dim,
            window=layer.window,
        )
        for layer in source
    )
    return CachePlan(dtype=dtype, source=tuple(source), caches=caches, kv_sharing_target_layer=(None,) * len(caches))


def _build(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    _check_fields(data, cls, where)
    formats = {name: data[name] for name in ("k_bits", "v_bits") if isinstance(data.get(name), Mapping)}
    for name, value in formats.items():
        _check_fields(value, NumberFormat, f"{where}.{name}")
    return cls(**{**data, **{name: NumberFormat(**value) for name, value in formats.items()}})


def _check_fields(data: Mapping[str, Any], cls: Any, where: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise PlanError(
            f"{CONFIG_KEY}.{where} has unknown fields {unknown}; this kvfold knows {sorted(fields)}."
            " The folder was written by a newer kvfold or edited by hand."
        )
    required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise PlanError(f"{CONFIG_KEY}.{where} lacks the fields {missing}; fold the original model again.")


def _validate(plan: CachePlan) -> None:
    layers = len(plan.source)
    if not layers or len(plan.caches) != layers or len(plan.kv_sharing_target_layer) != layers:
        raise PlanError(
            f"a plan needs one entry per layer: source has {layers}, caches {len(plan.caches)},"
            f" kv_sharing_target_layer {len(plan.kv_sharing_target_layer)}."
        )
    if plan.dtype not in ITEMSIZE:
        raise PlanError(f"dtype {plan.dtype!r} is not one of {sorted(ITEMSIZE)}; convert the checkpoint first.")
    for index, (source, spec, target) in enumerate(
        zip(plan.source, plan.caches, plan.kv_sharing_target_layer, strict=True)
    ):
        if (spec is None) == (target is None):
            raise PlanError(f"layer {index} must either store a cache or read an earlier layer's, not both or neither.")
        if spec is not None:
            _validate_cache(index, source, spec)
        elif target is not None:
            _validate_target(plan, index, target)


def _validate_cache(index: int, source: SourceLayer, spec: CacheSpec) -> None:
    for name in ("num_kv_heads", "head_dim", "num_v_heads", "v_head_dim"):
        if not isinstance(getattr(spec, name), int) or getattr(spec, name) < 1:
            raise PlanError(f"layer {index}: {name} is {getattr(spec, name)!r}; it must be a positive whole number.")
    for name in ("num_kv_heads", "num_v_heads"):
        if source.num_kv_heads % getattr(spec, name):
            raise PlanError(
                f"layer {index}: {name} {getattr(spec, name)} does not divide the source's {source.num_kv_heads}"
                f" key/value heads; choose one of {divisors(source.num_kv_heads)}."
            )
    if not spec.k_projection and spec.rope != "none" and spec.head_dim != source.head_dim:
        raise PlanError(
            f"layer {index}: keys of width {spec.head_dim} need k_projection, since rotation works on the source's"
            f" {source.head_dim}-wide heads."
        )
    if spec.rope not in ("applied", "on_read", "none"):
        raise PlanError(f"layer {index}: rope = {spec.rope!r}; it is 'applied', 'on_read' or 'none'.")
    if spec.rope != "on_read" and not spec.readers_rotate:
        raise PlanError(
            f"layer {index}: readers can only see keys without rotation if they are stored so (rope: on_read)."
        )
    if spec.joint and not (spec.rope != "on_read" and spec.k_projection and spec.v_projection):
        raise PlanError(f"layer {index}: a joint cache keeps k_projection and v_projection, and keys after rotation.")
    if spec.k_partial and (spec.joint or spec.rope != "applied" or not spec.k_projection):
        raise PlanError(
            f"layer {index}: k_partial goes with k_projection and rope: applied, in caches of one layer's making."
        )
    if spec.hidden and not (spec.rope != "applied" and spec.k_projection and spec.v_projection and not spec.joint):
        raise PlanError(
            f"layer {index}: hidden = {spec.hidden} goes with k_projection, v_projection and keys before rotation, in caches"
            " of one layer's making."
        )
    if spec.k_offset and not (spec.rope == "on_read" and spec.k_projection):
        raise PlanError(
            f"layer {index}: k_offset goes with keys that are rebuilt on read (k_projection, rope: on_read)."
        )
    if spec.sinks:
        raise PlanError(
            f"layer {index}: sinks = {spec.sinks!r} is reserved; format version {FORMAT_VERSION} defines sinks = 0 only."
        )
    for name, (_, width, form) in zip(("k_bits", "v_bits"), spec.sides, strict=True):
        if form is not None:
            _validate_format(f"layer {index}: {name}", spec, width, form)
    if spec.window != source.window:
        raise PlanError(f"layer {index}: window {spec.window} differs from the source's {source.window}.")


def _validate_format(where: str, spec: CacheSpec, width: int, form: Any) -> None:
    if not isinstance(form, NumberFormat):
        raise PlanError(f"{where} = {form!r} is not a description of tiers and scales (docs/format.md).")
    if form.width != width:
        raise PlanError(f"{where} describes {form.width} numbers, but stored heads have {width}.")
    if spec.joint:
        raise PlanError(f"{where}: caches that several layers fill together are not quantized.")
    if form.block > 1 and (spec.window is not None or CACHE_BLOCK % form.block):
        raise PlanError(
            f"{where}: scales per channel need a cache without a sliding window, and blocks that divide {CACHE_BLOCK} tokens."
        )


def _validate_target(plan: CachePlan, index: int, target: int) -> None:
    if not 0 <= target < index or plan.caches[target] is None:
        raise PlanError(
            f"layer {index} reads layer {target!r}; a reader reads an EARLIER layer that stores a cache of its own."
        )
    if plan.source[target].window != plan.source[index].window:
        raise PlanError(f"layer {index} and layer {target} share a cache but have different sliding windows.")


def divisors(number: int) -> list[int]:
    """All whole numbers that divide `number`, in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]
