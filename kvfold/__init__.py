"""kvfold: make the KV cache of a pretrained decoder smaller, and tell the truth about bytes.

Importing it teaches transformers' Auto classes to load folded models; nothing is patched. Everything else is imported when it
is first used (PEP 562).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from kvfold.version import __version__

_HOME = {
    "CachePlan": "kvfold.plan.plan",
    "CacheSpec": "kvfold.plan.cache_spec",
    "FoldedCache": "kvfold.runtimes.transformers.cache",
    "Healing": "kvfold.healing.recipe",
    "Recipe": "kvfold.compression.recipe",
    "compare": "kvfold.evaluation.compare",
    "compress": "kvfold.compression.compress",
    "demo": "kvfold.evaluation.demo",
    "evaluate": "kvfold.evaluation.texts",
    "evaluate_tasks": "kvfold.evaluation.tasks",
    "generate": "kvfold.evaluation.generate",
    "heal": "kvfold.healing.heal",
    "inspect": "kvfold.evaluation.inspection",
    "load": "kvfold.runtimes.transformers.load",
    "load_recipe": "kvfold.compression.recipe",
    "make_recipe": "kvfold.compression.recipe",
    "measure_recall": "kvfold.evaluation.recall",
    "servable_by": "kvfold.runtimes.base",
    "truncate": "kvfold.compression.truncate",
}
"""Public names, and the modules that they live in."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is the `kvfold` command: it registers when it needs a model, so that `kvfold --help` is quick."""
    return Path(sys.argv[0] if sys.argv else "").stem == "kvfold" or sys.orig_argv[1:3] == ["-m", "kvfold"]


if not _is_command():
    importlib.import_module("kvfold.runtimes.transformers")
