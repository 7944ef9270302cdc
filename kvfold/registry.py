"""Methods, families and runtimes by name: the file's name, or an entry point of another package.

Another package adds one with an entry point in the group `kvfold.methods` (named `width.mine`, `bits.mine`, ...),
`kvfold.architectures` (named by model_type) or `kvfold.runtimes`, which leads to the class.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any

from kvfold.errors import RecipeError

AXES = ("depth", "width", "bits", "length")
MODULES = {
    **{axis: f"kvfold.methods.{axis}.{{}}" for axis in AXES},
    "codecs": "kvfold.plan.codecs.{}",
    "architectures": "kvfold.architectures.{}",
    "runtimes": "kvfold.runtimes.{}.runtime",
    "scorers": "kvfold.runtimes.scorers.{}",
    "readers": "kvfold.runtimes.readers.{}",
}
"""Where the member NAME of a group lives."""


def names(group: str) -> list[str]:
    """Names of the members of a group: the methods of an axis, `architectures` or `runtimes`, in alphabetical order."""
    return sorted({*_own(group), *_foreign(group)})


@functools.cache
def load(group: str, name: str) -> Any:
    """The class of a member. Raises RecipeError with the nearest name."""
    if name not in names(group):
        raise RecipeError(unknown(f"{group} method" if group in AXES else group.removesuffix("s"), name, names(group)))
    contract = importlib.import_module(_module(group, "base")).CONTRACT
    if name in _foreign(group):
        cls = _foreign(group)[name].load()
        if not (inspect.isclass(cls) and issubclass(cls, contract)):
            raise RecipeError(f"the entry point {_foreign(group)[name].value} is no {contract.__name__} class.")
        return cls
    module = importlib.import_module(_module(group, name))
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and issubclass(cls, contract)
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {contract.__name__}, found {found}"
    return found[0]


def _module(group: str, name: str) -> str:
    return f"{_package(group)}.base" if name == "base" else MODULES[group].format(name)


def _package(group: str) -> str:
    return MODULES[group].split(".{}")[0]


@functools.cache
def _own(group: str) -> tuple[str, ...]:
    """Files of the group's folder, or, where its members are folders, those that hold the file that names them."""
    module = importlib.import_module(_package(group))
    found = [m for m in pkgutil.iter_modules(module.__path__) if m.name != "base" and m.name[0] != "_"]
    if MODULES[group].endswith("{}"):
        return tuple(m.name for m in found)
    inner = MODULES[group].rpartition(".")[2]
    folders = ((m.name, f"{path}/{m.name}") for path in module.__path__ for m in found if m.ispkg)
    return tuple(name for name, folder in folders if any(m.name == inner for m in pkgutil.iter_modules([folder])))


@functools.cache
def _foreign(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Those of other packages; kvfold's own names win."""
    if group in AXES:
        return entry_points("kvfold.methods", _own(group), prefix=f"{group}.")
    return entry_points(f"kvfold.{group}", _own(group))


def entry_points(group: str, own: Iterable[str], prefix: str = "") -> dict[str, importlib.metadata.EntryPoint]:
    """Those of installed packages whose name begins with `prefix`, by what follows it, without the names of our `own`."""
    found = importlib.metadata.entry_points(group=group)
    named = {point.name.removeprefix(prefix): point for point in found if point.name.startswith(prefix)}
    return {name: point for name, point in named.items() if name not in own}


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one, and the list."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"there is no {what} {name!r}.{hint} Known: {', '.join(known) or 'none'}."
