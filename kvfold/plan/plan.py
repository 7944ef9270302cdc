"""CachePlan: what is cached, who reads it, how wide, in how many bytes. The one format between methods and runtimes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.errors import PlanError
from kvfold.plan.cache_spec import ITEMSIZE, POSITION_BYTES, CacheSpec, SourceLayer, round_up
from kvfold.plan.checks import check_plan
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.naming import CONFIG_KEY
from kvfold.plan.number_format import NumberFormat, tokens_at_once
from kvfold.plan.reading import Reading
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.plan.typed import misfits, shortened

FORMAT_VERSION = 1
BUDGET_CONTEXT = 2048
"""Tokens of the sequence over which `kv_budget` counts bytes, where the plan names no other number."""
FORMATS = ("k_bits", "v_bits", "k_recent_bits", "v_recent_bits")


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The whole cache of a folded model.

    `caches[i]` is what layer i stores; it is None where the layer reads the cache of the EARLIER layer
    `kv_sharing_target_layer[i]`. `dtype` is the checkpoint's, in which bytes are counted unless another one is asked for.
    `context_len`: tokens of the sequence over which `kv_budget` counts bytes, which differ from token to token where recent
    ones have a finer form or some are dropped.
    Raises PlanError if the parts contradict each other.
    """

    dtype: str
    source: tuple[SourceLayer, ...]
    caches: tuple[CacheSpec | None, ...]
    kv_sharing_target_layer: tuple[int | None, ...]
    version: int = FORMAT_VERSION
    context_len: int = BUDGET_CONTEXT

    def __post_init__(self) -> None:
        check_plan(self)

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
        """Bytes kept per token / bytes per token of the original cache in its own dtype; what a sequence takes once is shared
        out among `context_len` tokens."""
        once = self.recent_bytes() / self.context_len
        return (self.kv_bytes_per_token() + once) / self.source_kv_bytes_per_token()

    def recent_bytes(self, dtype: str | None = None) -> int:
        """Of the newest tokens of one sequence in their finer form, over all layers."""
        itemsize = self.itemsize(dtype)
        return sum(spec.recent_bytes(self.context_len, itemsize) for spec in self.owned)

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes stored for one more token of one sequence, over all layers (inside every window); where tokens are dropped,
        in the mean over the first `context_len`."""
        itemsize = self.itemsize(dtype)
        stored = sum(spec.bytes_per_token(itemsize) * spec.kept(self.context_len) for spec in self.owned)
        return math.ceil(stored / self.context_len) + self.position_bytes

    @property
    def drops_tokens(self) -> bool:
        """Whether some heads forget tokens that the original keeps."""
        return any(spec.tokens is not None for spec in self.owned)

    @property
    def reads_some(self) -> bool:
        """Whether decode steps read less than is stored."""
        return any(spec.reading is not None for spec in self.owned)

    @property
    def position_bytes(self) -> int:
        """Bytes per token of the positions that rotation on read needs; one cache of them serves all layers."""
        axes = max(layer.position_axes for layer in self.source)
        return POSITION_BYTES * axes if any(spec.rope == "on_read" for spec in self.owned) else 0

    def source_kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """The same for the original model."""
        return self.itemsize(dtype) * sum(layer.elements_per_token for layer in self.source)

    def kv_bytes(self, context_len: int, *, batch_size: int = 1, dtype: str | None = None) -> int:
        """Bytes allocated for `batch_size` sequences of `context_len` tokens, unfilled blocks and windows included."""
        itemsize = self.itemsize(dtype)
        stored = sum(spec.bytes_allocated(context_len, itemsize) for spec in self.owned)
        return batch_size * (stored + self.position_bytes * round_up(context_len))

    def source_kv_bytes(self, context_len: int, *, batch_size: int = 1, dtype: str | None = None) -> int:
        """Bytes that the original model's DynamicCache holds after `context_len` tokens."""
        elements = sum(layer.elements_per_token * layer.tokens_stored(context_len) for layer in self.source)
        return batch_size * self.itemsize(dtype) * elements

    @property
    def predicts(self) -> bool:
        """Whether some layer's cache is read together with those of layers below."""
        return any(spec.predicted_from for spec in self.owned)

    @property
    def last_predicted(self) -> dict[int, int]:
        """Of each layer whose numbers say a part of others, the last of those."""
        return {below: layer for layer, spec in enumerate(self.caches) if spec for below in spec.predicted_from}

    @property
    def joint(self) -> bool:
        """Whether some cache shows past tokens through latents and those of the running step exactly."""
        return any(spec.joint for spec in self.owned)

    @property
    def depends_on_steps(self) -> bool:
        """Whether the result depends on the steps in which tokens came: some caches show the tokens of a step, or the last
        ones, as they do not show others."""
        whole = any(spec.tokens is not None and spec.tokens.prompt == "whole" for spec in self.owned)
        return (
            self.joint
            or whole
            or self.reads_some
            or any(side.format is not None and side.format.block > 1 for spec in self.owned for side in spec.sides)
        )

    def kv_workspace_bytes(self, *, batch_size: int = 1, dtype: str | None = None, device: str = "cpu") -> int:
        """Packed keys and values that one decode step turns back into numbers at a time, of one layer; with keys that are
        rebuilt on read, those too. Unpacking them takes up to three times as much for a moment."""
        sizes = []
        for spec, source in zip(self.caches, self.source, strict=True):
            if spec is not None:
                full = source.elements_per_token // 2
                elements = sum(side.elements for side in spec.sides if side.format is not None or spec.predicted_from)
                elements += spec.predictors
                elements += full if spec.rope == "on_read" else 0
                sizes.append(elements * tokens_at_once(batch_size * max(spec.widest, full), device))
        return batch_size * self.itemsize(dtype) * max(sizes)

    def kv_read_bytes(self, context_len: int, *, dtype: str | None = None) -> int:
        """Bytes of cache read by one decode step of one sequence; a shared cache, or one that predicts others, is read by
        each of its readers."""
        itemsize, read, recent = self.itemsize(dtype), 0.0, 0
        for spec in (self.cache_of(layer) for layer in range(self.num_layers)):
            tokens = min(spec.tokens_read(context_len), spec.kept(context_len))
            newest = min(context_len, spec.recent)
            read += spec.bytes_read(context_len, itemsize)
            recent += spec.recent_bytes(context_len, itemsize)
            for known in (self.cache_of(below) for below in spec.predicted_from):
                read += spec.bytes_of_predictors(known, itemsize) * tokens
                recent += spec.of_recent.bytes_of_predictors(known.of_recent, itemsize) * newest
        return math.ceil(read) + recent + self.position_bytes * context_len

    def itemsize(self, dtype: str | None = None) -> int:
        return ITEMSIZE[dtype or self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {
            "version": self.version,
            "dtype": self.dtype,
            "context_len": self.context_len,
            "source": [dataclasses.asdict(layer) for layer in self.source],
            "caches": [spec and dataclasses.asdict(spec) for spec in self.caches],
            "kv_sharing_target_layer": list(self.kv_sharing_target_layer),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CachePlan:
        """The plan that `to_dict` wrote. Raises PlanError on unknown or missing fields."""
        if not isinstance(data, Mapping):
            raise PlanError(f"{CONFIG_KEY} is {shortened(data)} where a mapping was expected; fold the model again.")
        if data.get("version") != FORMAT_VERSION:
            raise PlanError(
                f"{CONFIG_KEY} has version {data.get('version')!r}; this kvfold reads version {FORMAT_VERSION}."
                " Install the kvfold that wrote the folder, or fold the original model again."
            )
        _check_fields(data, cls, "plan")
        made: dict[str, Any] = {
            "version": data["version"],
            "context_len": data.get("context_len", BUDGET_CONTEXT),
            "dtype": data["dtype"],
            "source": tuple(_build(SourceLayer, x, f"source[{i}]") for i, x in _entries(data, "source")),
            "caches": tuple(
                None if x is None else _build(CacheSpec, x, f"caches[{i}]") for i, x in _entries(data, "caches")
            ),
            "kv_sharing_target_layer": tuple(x for _, x in _entries(data, "kv_sharing_target_layer")),
        }
        _check_types(cls, made, "plan")
        return cls(**made)


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


INSIDE = dict.fromkeys(FORMATS, NumberFormat) | {"tokens": TokenRuns, "reading": Reading}
"""Fields of a CacheSpec that have fields of their own."""


def _build(cls: Any, data: Any, where: str) -> Any:
    if cls is CacheSpec and isinstance(data, Mapping) and data.get("sinks") == 0:
        # a field that earlier versions reserved
        data = {name: value for name, value in data.items() if name != "sinks"}
    _check_fields(data, cls, where)
    made = {
        name: _build(INSIDE[name], x, f"{where}.{name}") for name, x in data.items() if name in INSIDE and x is not None
    }
    if cls is TokenRuns:
        made["runs"] = tuple(_build(TokenRun, x, f"{where}.runs[{i}]") for i, x in _entries(data, "runs", where))
    made |= {name: tuple(x) for name, x in data.items() if isinstance(x, list) and name not in made}
    _check_types(cls, {**data, **made}, where)
    return cls(**{**data, **made})


def _check_types(cls: Any, values: Mapping[str, Any], where: str) -> None:
    for name, expected in misfits(cls, values).items():
        raise PlanError(
            f"{CONFIG_KEY}.{where}.{name} = {shortened(values[name])} is not {expected}; fold the model again."
        )


def _entries(data: Mapping[str, Any], name: str, where: str = "") -> Iterator[tuple[int, Any]]:
    """Of a field that is a list."""
    if not isinstance(data[name], list | tuple):
        raise PlanError(
            f"{CONFIG_KEY}.{where}{'.' * bool(where)}{name} = {shortened(data[name])} is no list; fold the model again."
        )
    return enumerate(data[name])


def _check_fields(data: Any, cls: Any, where: str) -> None:
    if not isinstance(data, Mapping):
        raise PlanError(f"{CONFIG_KEY}.{where} is {shortened(data)} where fields were expected; fold the model again.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise PlanError(
            f"{CONFIG_KEY}.{where} has unknown fields {unknown}; this kvfold knows {sorted(fields)}."
            " The folder was written by a newer kvfold or edited by hand."
        )
    required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise PlanError(f"{CONFIG_KEY}.{where} lacks the fields {missing}; fold the original model again.")


def source_layer(layer: AttentionLayer) -> SourceLayer:
    """What byte accounting needs to know of an original layer."""
    return SourceLayer(
        num_attention_heads=layer.num_attention_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        window=layer.window,
        position_axes=layer.position_axes,
    )
