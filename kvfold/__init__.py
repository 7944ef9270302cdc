"""kvfold: make the KV cache of a pretrained decoder smaller, and tell the truth about bytes.

Importing it teaches transformers' Auto classes to load folded models; nothing is patched.
"""

from kvfold.checkpoint.source import load
from kvfold.compression.compress import compress
from kvfold.compression.recipe import Recipe, load_recipe, make_recipe
from kvfold.compression.truncate import truncate
from kvfold.evaluation.compare import compare
from kvfold.evaluation.demo import demo
from kvfold.evaluation.generate import generate
from kvfold.evaluation.inspection import inspect
from kvfold.evaluation.recall import measure_recall
from kvfold.evaluation.tasks import evaluate_tasks
from kvfold.evaluation.texts import evaluate
from kvfold.healing.heal import heal
from kvfold.healing.recipe import Healing
from kvfold.plan.plan import CachePlan, CacheSpec
from kvfold.runtimes.transformers.modeling import register as _register
from kvfold.version import __version__

__all__ = [
    "CachePlan",
    "CacheSpec",
    "Healing",
    "Recipe",
    "__version__",
    "compare",
    "compress",
    "demo",
    "evaluate",
    "evaluate_tasks",
    "generate",
    "heal",
    "inspect",
    "load",
    "load_recipe",
    "make_recipe",
    "measure_recall",
    "truncate",
]

_register()
