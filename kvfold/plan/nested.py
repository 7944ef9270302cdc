"""Which dims of a stored head may be left out from the end, for training at every width and for cutting."""

from __future__ import annotations

from kvfold.errors import PlanError
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.plan import CachePlan

MULTIPLE = 8
"""Widths are multiples of it, as attention kernels want them; heads that are narrower stay as they are."""


def kept_width(width: int, share: float) -> int:
    """Numbers of a stored head of `width` that stay at `share`."""
    return min(max(round(share * width / MULTIPLE), 1) * MULTIPLE, width)


def check_nested(plan: CachePlan) -> None:
    """Raise PlanError where stored numbers cannot be left out from the end."""
    for layer, spec in enumerate(plan.caches):
        obstacle = None if spec is None else _obstacle(spec)
        if obstacle:
            raise PlanError(
                f"layer {layer} {obstacle}; only latents have leading numbers that can do without the rest. Compress with"
                " --preset fast, small or svd_a."
            )


def _obstacle(spec: CacheSpec) -> str | None:
    if spec.k_bits is not None or spec.v_bits is not None:
        return "quantizes what it stores"
    if spec.hidden:
        return "stores what a network made"
    if spec.recent:
        return "keeps recent tokens in a finer form"
    if spec.predicted_from:
        return "stores what numbers of other layers leave out"
    if spec.joint:
        return "stores latents of several layers"
    if spec.rope == "applied" and not spec.k_projection:
        return "stores heads that are rotated as they are"
    return None
