"""Which runtime serves a plan, and what is in the way of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold.plan.plan import CachePlan, CacheSpec

RUNTIMES = ("transformers", "vllm")
VLLM_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Numbers of one stored head for which vLLM has kernels on every device; on some, others are padded to the next of these."""
WIDEST_HEAD = 512
"""The most that any of vLLM's kernels takes."""
NEAREST = "what kvfold compress MODEL --runtime vllm makes of the same budget"


def vllm_obstacle(plan: CachePlan) -> str | None:
    """What vLLM's paged cache cannot hold, with the field and the nearest plan that it can; None if it holds the plan."""
    for layer, spec in enumerate(plan.caches):
        found = None if spec is None else _in_the_way(spec)
        if found:
            return f"vLLM's cache cannot hold layer {layer}'s {found}; the nearest plan that it holds is {NEAREST}."
    return None


def _in_the_way(spec: CacheSpec) -> str | None:
    if spec.k_bits is not None or spec.v_bits is not None:
        return f"{'v_bits' if spec.k_bits is None else 'k_bits'}: numbers in few bits"
    if spec.rope == "on_read":
        return "rope = on_read: keys that are rotated when they are read"
    if spec.joint:
        return "joint = True: latents that several layers fill"
    if spec.hidden:
        return f"hidden = {spec.hidden}: networks beside the latents"
    if spec.num_kv_heads != spec.num_v_heads:
        return f"num_v_heads = {spec.num_v_heads}: as many heads of values as of keys are needed ({spec.num_kv_heads})"
    if max(spec.head_dim, spec.v_head_dim) > WIDEST_HEAD:
        return f"head_dim = {max(spec.head_dim, spec.v_head_dim)}: a stored head of more than {WIDEST_HEAD} numbers"
    return None
