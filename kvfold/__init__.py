"""kvfold: make the KV cache of a pretrained decoder smaller, and tell the truth about bytes.

Importing it teaches transformers' Auto classes to load folded models, as soon as transformers' own are there; nothing is
patched. Everything else is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
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
    "truncate": "kvfold.compression.truncate",
}
"""Public names, and the modules that they live in."""

__all__ = ["__version__", *_HOME]

_AUTO = "transformers.models.auto.configuration_auto"
"""Every Auto class imports it."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterAuto(MetaPathFinder):
    """Registers the folded families right after transformers' Auto classes, so that `import kvfold` itself stays cheap."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from kvfold.runtimes.transformers.modeling import register

    register()


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterAuto())
