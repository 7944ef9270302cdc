"""kvfold: make the KV cache of a pretrained decoder smaller, and tell the truth about bytes.

Importing it teaches transformers' Auto classes to load folded models; nothing is patched.
"""

from kvfold.comparison import compare
from kvfold.demonstration import demo
from kvfold.evaluation import evaluate
from kvfold.generation import generate
from kvfold.healing import heal
from kvfold.healing_recipe import Healing
from kvfold.inspection import inspect
from kvfold.loading import load
from kvfold.pipeline import compress
from kvfold.plan import CachePlan, CacheSpec
from kvfold.recall import measure_recall
from kvfold.recipe import Recipe, load_recipe, make_recipe
from kvfold.runtime.modeling import register as _register
from kvfold.tasks import evaluate_tasks
from kvfold.truncation import truncate
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
