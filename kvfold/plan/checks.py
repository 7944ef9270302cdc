"""What makes a plan impossible, said with the field and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfold import registry
from kvfold.errors import PlanError
from kvfold.plan.cache_spec import CACHE_BLOCK, ITEMSIZE, CacheSpec, SourceLayer, divisors
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat, StoredShape
from kvfold.plan.reading import MOST_BITS, Reading
from kvfold.plan.token_runs import FEW_TOKENS, FORESEEN, PROMPTS, RECENCY, TokenRuns

if TYPE_CHECKING:
    from kvfold.plan.plan import CachePlan


def check_plan(plan: CachePlan) -> None:
    """Raise PlanError on the first thing that cannot be."""
    layers = len(plan.source)
    if not layers or len(plan.caches) != layers or len(plan.kv_sharing_target_layer) != layers:
        raise PlanError(
            f"a plan needs one entry per layer: source has {layers}, caches {len(plan.caches)},"
            f" kv_sharing_target_layer {len(plan.kv_sharing_target_layer)}."
        )
    if plan.dtype not in ITEMSIZE:
        raise PlanError(f"dtype {plan.dtype!r} is not one of {sorted(ITEMSIZE)}; convert the checkpoint first.")
    if type(plan.context_len) is not int or plan.context_len < 1:
        raise PlanError(f"context_len = {plan.context_len!r} is no number of tokens.")
    for index, (source, spec, target) in enumerate(
        zip(plan.source, plan.caches, plan.kv_sharing_target_layer, strict=True)
    ):
        if (spec is None) == (target is None):
            raise PlanError(f"layer {index} must either store a cache or read an earlier layer's, not both or neither.")
        if spec is not None:
            _check_cache(index, source, spec)
            _check_predictors(plan, index, spec)
        elif target is not None:
            _check_target(plan, index, target)


def check_sinks(layer: AttentionLayer, spec: CacheSpec) -> None:
    """Raise PlanError where a softmax with a score of its own for every head meets what does not know of it."""
    if layer.sinks and (spec.tokens is not None or spec.reading is not None or spec.joint):
        raise PlanError(
            f"layer {layer.index}: the softmax of these models has a score of its own for every head (sinks), beside which"
            " kvfold neither drops tokens, nor reads some of them, nor stores several layers as one; choose methods of"
            " width, bits and shared layers."
        )


def _check_cache(index: int, source: SourceLayer, spec: CacheSpec) -> None:
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
    if spec.fast_pairs and not (
        0 < spec.fast_pairs <= source.head_dim // 2
        and spec.rope == "on_read"
        and spec.k_projection
        and spec.readers_rotate
        and not spec.hidden
    ):
        raise PlanError(
            f"layer {index}: fast_pairs = {spec.fast_pairs!r} goes with keys that are rebuilt on read (k_projection, rope:"
            f" on_read) for all readers, without networks; a head has {source.head_dim // 2} pairs."
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
    if spec.shared_latent:
        _check_shared_latent(index, spec)
    if spec.k_offset and not (spec.rope == "on_read" and spec.k_projection):
        raise PlanError(
            f"layer {index}: k_offset goes with keys that are rebuilt on read (k_projection, rope: on_read)."
        )
    if spec.tokens is not None:
        _check_tokens(index, spec, spec.tokens)
    if spec.reading is not None:
        _check_reading(index, spec, spec.reading)
    for name, (_, width, format) in zip(("k_bits", "v_bits"), spec.sides, strict=True):
        if format is not None:
            _check_format(f"layer {index}: {name}", spec, width, format)
    _check_recent(index, spec)
    if spec.window != source.window:
        raise PlanError(f"layer {index}: window {spec.window} differs from the source's {source.window}.")


def _check_shared_latent(index: int, spec: CacheSpec) -> None:
    if spec.rope == "applied" or spec.joint or spec.hidden or not (spec.k_projection and spec.v_projection):
        raise PlanError(
            f"layer {index}: shared_latent goes with keys before rotation, k_projection and v_projection, in caches of one"
            " layer's making."
        )
    if (spec.num_v_heads, spec.v_head_dim) != (spec.num_kv_heads, spec.head_dim) or spec.v_bits is not None:
        raise PlanError(f"layer {index}: with shared_latent values have the heads of keys, and no v_bits of their own.")


def _check_recent(index: int, spec: CacheSpec) -> None:
    fields = ("recent_head_dim", "v_recent_head_dim", "k_recent_bits", "v_recent_bits")
    if not spec.recent:
        if any(getattr(spec, name) for name in fields):
            raise PlanError(f"layer {index}: {', '.join(fields)} go with recent, which is 0.")
        return
    if spec.joint or spec.hidden or spec.k_partial or spec.recent < 0:
        raise PlanError(
            f"layer {index}: recent = {spec.recent} does not go with joint, hidden or k_partial caches;"
            " choose length.method: identity, or keys before rotation (width.rope: on_read)."
        )
    if _share_scales(*spec.sides, *spec.recent_sides):
        raise PlanError(f"layer {index}: recent tokens do not go with scales per channel.")
    own = spec.recent_head_dim, spec.v_recent_head_dim
    if (own[0] > 0) != (own[1] > 0) or min(own) < 0 or (spec.shared_latent and own[0] != own[1]):
        raise PlanError(f"layer {index}: recent_head_dim and v_recent_head_dim are both given or both 0; found {own}.")
    if own[0] and spec.rope == "applied" and not spec.k_projection:
        raise PlanError(f"layer {index}: rotated keys have a finer form of their own only with k_projection.")
    for name, (_, width, format) in zip(("k_recent_bits", "v_recent_bits"), spec.recent_sides, strict=True):
        if format is not None:
            _check_format(f"layer {index}: {name}", spec, width, format)


def _check_tokens(index: int, spec: CacheSpec, tokens: TokenRuns) -> None:
    where = f"layer {index}: tokens"
    if tokens.rule not in (rules := [RECENCY, FORESEEN, *registry.names("scorers")]):
        raise PlanError(registry.unknown("rule of tokens", tokens.rule, rules))
    if tokens.scored and (tokens.prompt != "whole" or tokens.newest < 1):
        raise PlanError(
            f"{where}: {tokens.rule} chooses when a prompt was read, and the newest stay; found prompt = {tokens.prompt!r}"
            f" and newest = {tokens.newest}."
        )
    if tokens.foreseen and tokens.newest < 1:
        raise PlanError(f"{where}: {tokens.rule} keeps the newest; found newest = {tokens.newest}.")
    if tokens.matched and not tokens.scored:
        raise PlanError(f"{where}: what stays is matched to all where a scorer chose it; rule is {tokens.rule!r}.")
    if tokens.prompt not in PROMPTS:
        raise PlanError(f"{where}: prompt = {tokens.prompt!r}; it is one of {PROMPTS}.")
    heads = sorted(head for run in tokens.runs for head in run.heads)
    if heads != list(range(spec.num_kv_heads)) or spec.num_kv_heads != spec.num_v_heads:
        raise PlanError(
            f"{where}: every stored head is in one run, and keys have as many as values; found {heads} of"
            f" {spec.num_kv_heads} and {spec.num_v_heads}."
        )
    if not isinstance(tokens.sinks, int) or tokens.sinks < 0:
        raise PlanError(f"{where}: sinks = {tokens.sinks!r} is no number of tokens.")
    for run in tokens.runs:
        beside = tokens.sinks + max(tokens.newest - 1, 0)
        if not 0 <= run.share <= 1 or (run.share < 1 and run.least <= beside):
            raise PlanError(
                f"{where}: a run keeps a share of 0 to 1 of the context, and at least one token beside its"
                f" {tokens.sinks} sinks, or its newest; found share {run.share!r}, least {run.least!r}."
            )
    if found := _set(spec, "joint", "hidden", "predicted_from", "window"):
        raise PlanError(f"{where} does not go with {', '.join(found)}; leave those out (width.below=0, for example).")
    found = _set(spec, "shared_latent", "recent", "rope")
    if found and not (spec.num_kv_heads == 1 and tokens.scored and not tokens.matched and tokens.newest >= spec.recent):
        raise PlanError(
            f"{where} goes with {', '.join(found)} where a layer has one latent, a scorer chooses its tokens (unmatched), and"
            f" the newest {spec.recent} stay; else choose keys as they are read, head by head (prefer: speed, or"
            " width.rope=applied of a method that has it)."
        )
    if _share_scales(*spec.sides):
        raise PlanError(f"{where} does not go with scales per channel, which tokens share.")


def _check_reading(index: int, spec: CacheSpec, reading: Reading) -> None:
    where = f"layer {index}: reading"
    if reading.rule not in (rules := registry.names("readers")):
        raise PlanError(registry.unknown("rule of reading", reading.rule, rules))
    numbers = {
        name: getattr(reading, name) for name in ("least", "sinks", "newest", "leading", "page", "bits", "tables")
    }
    if wrong := {name: value for name, value in numbers.items() if type(value) is not int or value < 0}:
        raise PlanError(f"{where}: {wrong} are no numbers of tokens, numbers or bits.")
    if not 0 < reading.share <= 1 or reading.newest < 1 or reading.least < reading.sinks + reading.newest:
        raise PlanError(
            f"{where}: a step reads a share above 0 of the context, and at least its sinks and newest; found {reading}."
        )
    if reading.sinks < 1 and reading.newest < FEW_TOKENS:
        raise PlanError(
            f"{where}: sinks is {reading.sinks} and newest {reading.newest}: of a step of {FEW_TOKENS} tokens the first ones"
            " might see nothing that is read; keep a sink."
        )
    if reading.leading > spec.head_dim or (reading.page and CACHE_BLOCK % reading.page):
        raise PlanError(
            f"{where}: leading numbers are of stored keys, which have {spec.head_dim}, and pages divide {CACHE_BLOCK} tokens;"
            f" found {reading}."
        )
    if (reading.bits > 0) != (reading.tables > 0) or reading.bits > MOST_BITS:
        raise PlanError(f"{where}: signatures have 1 to {MOST_BITS} bits, in one table or more; found {reading}.")
    if found := _set(spec, "joint", "hidden", "recent", "tokens", "predicted_from", "window", "rope"):
        raise PlanError(
            f"{where} does not go with {', '.join(found)}: tokens are chosen by keys as they are stored; with auto choose"
            " prefer: speed, length.method: identity or another length method."
        )
    if _share_scales(*spec.sides):
        raise PlanError(f"{where} does not go with scales per channel, which tokens share.")


def _set(spec: CacheSpec, *names: str) -> list[str]:
    """Which of these fields say something; of rope only that keys are rotated when they are read."""
    values = {name: getattr(spec, name) for name in names}
    if values.get("rope") is not None:
        values = values | {"rope = on_read": values.pop("rope") == "on_read"}
    return [name for name, value in values.items() if value]


def _share_scales(*sides: StoredShape) -> bool:
    """Whether several tokens share scales per channel."""
    return any(side.format is not None and side.format.block > 1 for side in sides)


def _check_predictors(plan: CachePlan, index: int, spec: CacheSpec) -> None:
    widths = [0, 0]
    if not isinstance(spec.predicted_from, tuple) or len(set(spec.predicted_from)) < len(spec.predicted_from):
        raise PlanError(f"layer {index}: predicted_from = {spec.predicted_from!r} is no list of different layers.")
    for below in spec.predicted_from:
        known = plan.caches[below] if type(below) is int and 0 <= below < index else None
        if known is None:
            raise PlanError(
                f"layer {index}: predicted_from names layer {below!r}, which is no EARLIER layer with a cache."
            )
        facts = [(x.shared_latent, x.num_kv_heads, x.window, x.recent) for x in (spec, known)]
        if facts[0] != facts[1] or facts[0][:2] != (True, 1):
            raise PlanError(
                f"layer {index}: a layer and those that predict it have one shared_latent each (num_kv_heads 1), the same"
                f" window and as many recent tokens; layer {below} differs."
            )
        if _share_scales(*spec.sides, *known.sides):
            raise PlanError(
                f"layer {index}: predictions do not go with scales per channel, which change what was read."
            )
        widths[0] += spec.predicting(known.head_dim)
        widths[1] += spec.of_recent.predicting(known.recent_head_dim)
    if min(spec.leading, spec.recent_leading) < 0 or (spec.leading + spec.recent_leading and not spec.predicted_from):
        raise PlanError(
            f"layer {index}: leading and recent_leading count numbers of the layers that predicted_from names."
        )
    if spec.predicted_from and spec.recent and not spec.recent_head_dim:
        raise PlanError(
            f"layer {index}: predictions of recent tokens want a finer form of their own (recent_head_dim)."
        )
    if [spec.predictors, spec.recent_predictors] != widths:
        raise PlanError(
            f"layer {index}: predictors and recent_predictors are {spec.predictors} and {spec.recent_predictors}, but the"
            f" layers that predicted_from names have {widths[0]} and {widths[1]} numbers that say something of it."
        )


def _check_format(where: str, spec: CacheSpec, width: int, format: Any) -> None:
    if not isinstance(format, NumberFormat):
        raise PlanError(f"{where} = {format!r} is not a description of tiers and scales (docs/format.md).")
    if format.width != width:
        raise PlanError(f"{where} describes {format.width} numbers, but stored heads have {width}.")
    if spec.joint:
        raise PlanError(f"{where}: caches that several layers fill together are not quantized.")
    if format.block > 1 and (spec.window is not None or CACHE_BLOCK % format.block):
        raise PlanError(
            f"{where}: scales per channel need a cache without a sliding window, and blocks that divide {CACHE_BLOCK} tokens."
        )


def _check_target(plan: CachePlan, index: int, target: int) -> None:
    owned = plan.caches[target] if 0 <= target < index else None
    if owned is None:
        raise PlanError(
            f"layer {index} reads layer {target!r}; a reader reads an EARLIER layer that stores a cache of its own."
        )
    if owned.predicted_from:
        raise PlanError(
            f"layer {index} reads layer {target}, whose cache is predicted; such a cache has no other readers."
        )
    if plan.source[target].window != plan.source[index].window:
        raise PlanError(f"layer {index} and layer {target} share a cache but have different sliding windows.")
