"""The contract of a runtime: what it can serve, and what that asks of a plan. Cheap to import: no engine is loaded."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from kvfold import registry
from kvfold.plan.plan import CachePlan


class Runtime(ABC):
    """What runs folded folders. A runtime is the folder `kvfold/runtimes/<name>/` with a file `runtime.py` that holds this.

    `default_preset`: what `kvfold compress --runtime NAME` makes. `one_shape`: of whole heads of plain numbers a layer's keys
    and values are stored in one shape; `widths`: of such a head, those that it stores without padding (empty: all).
    `predicts`: numbers of layers below are worth reading again for what they say, unless few bytes are kept.
    `measured_by`: what `kvfold bench --engine NAME` times: `steps` of a model, `requests` that its `engine` answers, or
    nothing (empty).
    """

    default_preset: ClassVar[str] = "auto"
    one_shape: ClassVar[bool] = False
    widths: ClassVar[tuple[int, ...]] = ()
    predicts: ClassVar[bool] = True
    measured_by: ClassVar[str] = ""

    @abstractmethod
    def obstacle(self, plan: CachePlan, config: Mapping[str, Any] | None = None) -> str | None:
        """Why it cannot serve a plan, of a model with this config.json: the field, and the way out. None if it can."""

    def warning(self, plan: CachePlan) -> str | None:
        """What a plan that it serves loses there."""
        return None

    def serve_command(self, folder: str | Path) -> str | None:
        """The command line that serves a folder, None where there is none."""
        return None

    def engine(
        self,
        folder: Path,
        *,
        length: int,
        memory: int,
        dtype: str,
        compiled: bool = False,
        max_num_batched_tokens: int | None = None,
    ) -> Any:
        """An engine with `memory` bytes of cache for sequences of up to `length` tokens (runtimes/vllm/engine.py says what it
        can do), `compiled` where it is served so, with up to `max_num_batched_tokens` in a step. Raises KvfoldError where it
        is not installed."""
        raise NotImplementedError("only where measured_by = requests")


CONTRACT = Runtime


@functools.cache
def runtime(name: str) -> Runtime:
    """Raises RecipeError with the nearest name."""
    return registry.load("runtimes", name)()


def servable_by(plan: CachePlan, config: Mapping[str, Any] | None = None) -> dict[str, str | None]:
    """Runtime -> None if it serves this plan of a model with this config.json, else the obstacle and what to change."""
    return {name: runtime(name).obstacle(plan, config) for name in registry.names("runtimes")}
