"""Paper names as recipe fragments: a preset is a point on the four axes, given as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named recipe fragment and where it comes from."""

    about: str
    fragment: dict[str, dict[str, Any]]


PRESETS = {
    "identity": Preset("the cache as it is, under kvfold's runtime (a control)", {"width": {"method": "identity"}}),
    "gqa": Preset("mean-pooled key/value heads (arXiv 2305.13245)", {"width": {"method": "mean_pool"}}),
    "mqa": Preset("one mean-pooled key/value head per layer", {"width": {"method": "mean_pool", "kv_heads": 1}}),
    "svd_w": Preset("low rank by SVD of the weights (baseline of arXiv 2406.07056)", {"width": {"method": "svd_w"}}),
    "svd_a": Preset("low rank by SVD of activations (arXiv 2406.07056)", {"width": {"method": "svd_a"}}),
}
