"""What a model's cache takes, layer by layer, and which runtimes serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.checkpoint.source import plan_of_headers
from kvfold.compression.card import CONTEXTS
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.base import servable_by
from kvfold.runtimes.vllm.ranks import bytes_per_process, not_shared_out

PROCESSES = (2, 4, 8)
"""Tensor parallel sizes that people have."""


@dataclass(frozen=True)
class Inspection:
    """A plan and the numbers that people ask of it. `config`: the model's config.json."""

    plan: CachePlan
    folded: bool
    config: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        plan, servable = self.plan, servable_by(self.plan, self.config)
        return {
            "folded": self.folded,
            "kv_budget": plan.kv_budget,
            "kv_bytes_per_token": plan.kv_bytes_per_token(),
            "base_kv_bytes_per_token": plan.source_kv_bytes_per_token(),
            "kv_bytes": {str(n): plan.kv_bytes(n) for n in CONTEXTS},
            "base_kv_bytes": {str(n): plan.source_kv_bytes(n) for n in CONTEXTS},
            "kv_read_bytes": {str(n): plan.kv_read_bytes(n) for n in CONTEXTS},
            "kv_bytes_per_token_of_process": {str(n): size for n, size in shared_out(plan).items()},
            "servable_by": {runtime: obstacle or True for runtime, obstacle in servable.items()},
        }


def shared_out(plan: CachePlan) -> dict[int, float]:
    """Bytes of one token in each process of vLLM's tensor parallelism, where so many share out all heads evenly."""
    return {n: bytes_per_process(plan, n) for n in PROCESSES if not_shared_out(plan, n) is None}


def inspect(model: str | Path) -> Inspection:
    """Read the plan of a folder, or that of a stock model's own cache. No weights are loaded."""
    return Inspection(*plan_of_headers(model))
