"""What vLLM's paged cache can hold, and what that asks of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.base import Runtime

WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Numbers of one stored head for which vLLM has kernels on every device; on some, others are padded to the next of these."""
WIDEST_HEAD = 512
"""The most that any of vLLM's kernels takes."""
NEAREST = "what kvfold compress MODEL --runtime vllm makes of the same budget"


class Vllm(Runtime):
    """Whole heads in pages: keys after rotation, as many heads of keys as of values."""

    default_preset = "served"
    one_shape = True
    widths = WIDTHS
    measured_by = "requests"

    def obstacle(self, plan: CachePlan) -> str | None:
        for layer, spec in enumerate(plan.caches):
            found = None if spec is None else _in_the_way(spec)
            if found:
                return f"vLLM's cache cannot hold layer {layer}'s {found}; the nearest plan that it holds is {NEAREST}."
        return None

    def warning(self, plan: CachePlan) -> str | None:
        odd = sorted({spec.head_dim for spec in plan.owned} - {*WIDTHS})
        if not odd:
            return None
        return (
            f"stored heads of {', '.join(map(str, odd))} numbers are padded by some of vLLM's kernels, whose cache then holds"
            f" fewer tokens than 1 / kv_budget says; widths without padding: {', '.join(map(str, WIDTHS))}."
        )

    def serve_command(self, folder: str | Path) -> str:
        return f"vllm serve {folder}"

    def engine(self, folder: Path, *, length: int, memory: int, dtype: str) -> Any:
        from kvfold.runtimes.vllm.engine import Engine

        return Engine(folder, length=length, memory=memory, dtype=dtype)


def _in_the_way(spec: CacheSpec) -> str | None:
    if spec.k_bits is not None or spec.v_bits is not None:
        return f"{'v_bits' if spec.k_bits is None else 'k_bits'}: numbers in few bits"
    if spec.recent:
        return f"recent = {spec.recent}: a finer form of the newest tokens"
    if spec.shared_latent:
        return "shared_latent = True: keys and values in one latent"
    if spec.rope == "on_read":
        return "rope = on_read: keys that are rotated when they are read"
    if spec.joint:
        return "joint = True: latents that several layers fill"
    if spec.hidden:
        return f"hidden = {spec.hidden}: networks beside the latents"
    if spec.stored_bias:
        return "stored_bias = True: a bias on what is stored"
    if spec.num_kv_heads != spec.num_v_heads:
        return f"num_v_heads = {spec.num_v_heads}: as many heads of values as of keys are needed ({spec.num_kv_heads})"
    if max(spec.head_dim, spec.v_head_dim) > WIDEST_HEAD:
        return f"head_dim = {max(spec.head_dim, spec.v_head_dim)}: a stored head of more than {WIDEST_HEAD} numbers"
    return None
