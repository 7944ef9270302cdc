"""Which runtime serves a plan, and what is in the way of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold.plan import CachePlan, CacheSpec

WIDEST_HEAD = 512
"""Numbers of one stored head, the most that vLLM's kernels take (on a GPU, 256)."""
NEAREST = (
    "kvfold compress MODEL --preset fast --set width.latent=group --set width.v_latent=group --set allocate=uniform"
)


def vllm_obstacle(plan: CachePlan) -> str | None:
    """What vLLM's paged cache cannot hold, with the field and the nearest plan that it can; None if it holds the plan."""
    for layer, spec in enumerate(plan.caches):
        found = None if spec is None else _in_the_way(spec)
        if found:
            return f"layer {layer}: {found}; the nearest plan that vLLM's cache holds: {NEAREST}."
    return None


def _in_the_way(spec: CacheSpec) -> str | None:
    if spec.k_bits is not None or spec.v_bits is not None:
        return "k_bits or v_bits: numbers in few bits"
    if spec.rope == "on_read":
        return "rope: on_read, keys that are rotated when they are read"
    if spec.joint:
        return "joint: latents that several layers fill"
    if spec.hidden:
        return f"hidden: {spec.hidden}, networks beside the latents"
    if spec.num_kv_heads != spec.num_v_heads:
        return f"num_v_heads: {spec.num_v_heads} stored heads of values beside {spec.num_kv_heads} of keys"
    if max(spec.head_dim, spec.v_head_dim) > WIDEST_HEAD:
        return f"head_dim: a stored head of {max(spec.head_dim, spec.v_head_dim)} numbers (at most {WIDEST_HEAD})"
    return None
