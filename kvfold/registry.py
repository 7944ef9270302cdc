"""Methods and families by file name: the file's name is the name in recipes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any

from kvfold.errors import RecipeError

AXES = ("depth", "width", "bits", "length")


def names(package: str) -> list[str]:
    """Names of the members of a sub-package, for example the methods of an axis, in alphabetical order."""
    module = importlib.import_module(f"kvfold.{package}")
    return sorted(m.name for m in pkgutil.iter_modules(module.__path__) if m.name != "base" and m.name[0] != "_")


def load(package: str, name: str) -> Any:
    """The class that the file `kvfold/<package>/<name>.py` defines. Raises RecipeError with the nearest name."""
    if name not in names(package):
        raise RecipeError(unknown(f"{package} method", name, names(package)))
    module = importlib.import_module(f"kvfold.{package}.{name}")
    base = importlib.import_module(f"kvfold.{package}.base")
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and issubclass(cls, base.CONTRACT)
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {base.CONTRACT.__name__}, found {found}"
    return found[0]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one, and the list."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"there is no {what} {name!r}.{hint} Known: {', '.join(known)}."
