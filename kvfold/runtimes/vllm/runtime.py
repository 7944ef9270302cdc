"""What vLLM's paged cache can hold, and what that asks of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.architectures.base import architecture
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.naming import MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.base import Runtime

WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Numbers of one stored head for which vLLM has kernels on every device; on some, others are padded to the next of these."""
WIDEST_HEAD = 512
"""The most that any of vLLM's kernels takes."""
NEAREST = "what kvfold compress MODEL --runtime vllm makes of the same budget"


class Vllm(Runtime):
    """Pages of bytes for whatever tokens take; vLLM's own pages and kernels for whole heads of plain numbers, keys after
    rotation, as many heads of keys as of values."""

    one_shape = True
    widths = WIDTHS
    predicts = False
    measured_by = "requests"

    def obstacle(self, plan: CachePlan, config: Mapping[str, Any] | None = None) -> str | None:
        if config is not None:
            arch = architecture(str(config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX))
            if reason := arch.not_served_by_vllm(config):
                return f"{arch.model_type}: {reason}"
        for layer, spec in enumerate(plan.caches):
            found = None if spec is None else _in_the_way(spec)
            if found:
                return f"vLLM's cache cannot hold layer {layer}'s {found}; the nearest plan that it holds is {NEAREST}."
        return None

    def warning(self, plan: CachePlan) -> str | None:
        if is_packed(plan):
            return (
                "vLLM holds this plan in packed pages, which kvfold's kernels read where they lie. On a GPU they have not"
                " been timed under vLLM: where a step takes longer than the original's, --preset served takes vLLM's own"
                " kernels, and loses more at equal bytes."
            )
        odd = sorted({spec.head_dim for spec in plan.owned} - {*WIDTHS})
        if not odd:
            return None
        return (
            f"stored heads of {', '.join(map(str, odd))} numbers are padded by some of vLLM's kernels, whose cache then holds"
            f" fewer tokens than 1 / kv_budget says; widths without padding: {', '.join(map(str, WIDTHS))}."
        )

    def serve_command(self, folder: str | Path) -> str:
        return f"vllm serve {folder}"

    def engine(self, folder: Path, **settings: Any) -> Any:
        from kvfold.runtimes.vllm.engine import Engine

        return Engine(folder, **settings)


def is_packed(plan: CachePlan) -> bool:
    """Whether kvfold's own pages and kernels hold a plan, since vLLM's own cannot."""
    return any(_not_as_heads(spec) for spec in plan.owned)


def _not_as_heads(spec: CacheSpec) -> bool:
    packed = spec.k_bits is not None or spec.v_bits is not None or spec.recent > 0
    made = spec.shared_latent or spec.rope == "on_read" or spec.stored_bias
    return packed or made or spec.num_kv_heads != spec.num_v_heads or max(spec.head_dim, spec.v_head_dim) > WIDEST_HEAD


def _in_the_way(spec: CacheSpec) -> str | None:
    block = max((format.block for format in (spec.k_bits, spec.v_bits) if format), default=1)
    if block > 1:
        return f"block = {block}: tokens that are packed together, and exact until there are so many"
    if spec.joint:
        return "joint = True: latents that several layers fill"
    if spec.tokens is not None:
        return "tokens: heads that keep tokens of their own, where vLLM's pages hold all heads of a token"
    if spec.reading is not None:
        return f"reading = {spec.reading.rule}: steps that read some of the stored tokens"
    if spec.hidden:
        return f"hidden = {spec.hidden}: networks beside the latents"
    return None
