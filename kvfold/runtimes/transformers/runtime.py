"""transformers serves every plan: it is where kvfold folds, evaluates and heals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.plan.plan import CachePlan
from kvfold.runtimes.base import Runtime


class Transformers(Runtime):
    """generate(), Trainer and everything else that takes a transformers model."""

    measured_by = "steps"

    def obstacle(self, plan: CachePlan, config: Mapping[str, Any] | None = None) -> str | None:
        return None
