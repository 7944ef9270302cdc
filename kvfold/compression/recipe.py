"""Recipe: everything that determines one result, as frozen dataclasses that are written to and read from YAML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from kvfold import registry
from kvfold.calibration.calibration import Calibration
from kvfold.calibration.material import Material
from kvfold.checkpoint.source import Source
from kvfold.compression.presets import find_preset
from kvfold.compression.request import Axes
from kvfold.errors import RecipeError
from kvfold.plan.plan import BUDGET_CONTEXT
from kvfold.plan.typed import misfits, shortened
from kvfold.runtimes.base import runtime

ALLOCATIONS = ("uniform", "greedy", "measured")
PREFERENCES = {"size": "on_read", "speed": "applied"}
"""What to prefer -> how keys are stored; without it banded where a method has both, of what layers below store the leading
numbers."""
FOR_SPEED = {"method": "fisher", "rope": PREFERENCES["speed"]}
"""The width method that `speed` prefers."""
WHAT = ("depth", "width", "bits")
"""Axes that say what a cache is made of; naming a method of one leaves the default preset aside."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One fold. The four axes hold a method's name and its fields: {"method": "svd_a", "latent": "group"}.

    model: folder or hub id; out: the folder to write; kv_budget: bytes kept / bytes of the original cache, over the first
        `context_len` tokens of a sequence.
    keep_parameters: widen the MLPs by what attention saves, without changing their function (for uptraining, as in the MLKV
        paper).
    target_kl: instead of kv_budget, the most that the model may lose (nats per token, measured on calibration text).
    keep_layers: layers that store every number as it is. min_width: the least share of a layer's numbers to store.
    runtime: `transformers`, or `vllm` for a plan that vLLM serves as well; of plain numbers keys and values of one shape, in
        heads of widths that its own kernels have.
    prefer: `size` or `speed`, for width methods mla and fisher: keys rebuilt on read, and predicted by all that layers below
        store, or keys that are read as they lie.
    allocate: `uniform` gives every layer the same share, `greedy` shares the budget by the distortion per byte that the
        method expects (in nats: fisher), `measured` by KL per byte, measured with one cache folded at a time (the whole
        model must fit into memory).
    Raises RecipeError on names, fields and values that do not exist or do not fit.
    """

    model: str
    out: str
    preset: str | None = None
    kv_budget: float | None = None
    context_len: int = BUDGET_CONTEXT
    target_kl: float | None = None
    runtime: str = "transformers"
    prefer: str | None = None
    keep_layers: tuple[int, ...] = ()
    min_width: float = 0.0
    allocate: str = "uniform"
    keep_parameters: bool = False
    seed: int = 0
    depth: Mapping[str, Any] = field(default_factory=lambda: {"method": "identity"})
    width: Mapping[str, Any] = field(default_factory=lambda: {"method": "identity"})
    bits: Mapping[str, Any] = field(default_factory=lambda: {"method": "identity"})
    length: Mapping[str, Any] = field(default_factory=lambda: {"method": "identity"})
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if self.kv_budget is not None and not 0 < self.kv_budget <= 1:
            raise RecipeError(
                f"kv_budget is {self.kv_budget}; it is bytes kept / bytes of the original cache, above 0 and at most 1"
                " (0.25 means four times smaller)."
            )
        if self.target_kl is not None and (self.target_kl <= 0 or self.kv_budget is not None):
            raise RecipeError(
                f"target_kl is {self.target_kl} and kv_budget {self.kv_budget}; give one of them, above 0: either how much to"
                " lose or how much to keep."
            )
        if self.context_len < 1:
            raise RecipeError(
                f"context_len is {self.context_len}; it is the number of tokens over which bytes are counted."
            )
        if not 0 <= self.min_width <= 1:
            raise RecipeError(f"min_width is {self.min_width}; it is a share of a layer's numbers, 0 to 1.")
        object.__setattr__(self, "keep_layers", tuple(self.keep_layers))
        runtime(self.runtime)
        if self.allocate not in ALLOCATIONS:
            raise RecipeError(registry.unknown("allocation", self.allocate, ALLOCATIONS))
        for axis in registry.AXES:
            self.method(axis)
        if self.target_kl is not None and self.axes.length.after_reading:
            raise RecipeError(
                f"target_kl is measured by forwards without a cache, in which length.method {self.length['method']!r} leaves"
                " every token; give kv_budget."
            )
        if self.bits["method"] != "identity" and self.method("width").joint:
            raise RecipeError(
                f"width method {self.width['method']!r} fills caches that are not quantized; leave bits out."
            )
        if self.method("bits").by_spectrum and not self.method("width").ordered:
            raise RecipeError(
                f"width method {self.width['method']!r} stores numbers of equal rank, so that none deserves more bits than"
                " others; choose a low-rank one, such as fisher, or --set bits.method=integer."
            )
        if self.allocate != "greedy" and self.axes.told_apart:
            raise RecipeError(
                f"allocate = {self.allocate!r}: bytes are shared out between recent tokens and all others by what they are"
                " expected to save; choose greedy, or --set length.method=identity."
            )
        if self.allocate == "measured" and self.method("width").joint:
            raise RecipeError(
                f"allocate = 'measured' cannot measure {self.width['method']}, which sees the tokens of a step exactly;"
                " choose uniform or greedy."
            )

    @property
    def axes(self) -> Axes:
        """The methods of all axes."""
        return Axes(**{axis: self.method(axis) for axis in registry.AXES})

    def method(self, axis: str) -> Any:
        """The method of an axis, built from its name and fields."""
        fields = dict(getattr(self, axis))
        cls = registry.load(axis, _text(fields.pop("method", None), f"{axis}.method"))
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                what = f"field of {axis} method {getattr(self, axis)['method']!r} called"
                raise RecipeError(registry.unknown(what, name, known) + _methods_with(axis, name))
        check_types(cls, fields, f"{axis}.")
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in fields]:
            method = getattr(self, axis)["method"]
            raise RecipeError(f"{axis} method {method!r} needs {', '.join(f'{axis}.{name}' for name in missing)}.")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default written out."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["keep_layers"] = list(self.keep_layers)
        for axis in registry.AXES:
            data[axis] = {"method": data[axis]["method"]} | dataclasses.asdict(self.method(axis))
        return data | {"calibration": dataclasses.asdict(self.calibration)}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def make_recipe(data: Mapping[str, Any], sets: Iterable[str] = ()) -> Recipe:
    """A recipe from plain data (of YAML or of the command line) with its preset filled in and `a.b=value` applied last.

    Fields in `data` win over the preset's. Where neither a preset nor a method of depth, width or bits is named, the preset
    is the runtime's own.
    """
    tree: dict[str, Any] = {}
    sets, given = list(sets), data.get("width")
    chosen = any(isinstance(data.get(axis), Mapping) and "method" in data[axis] for axis in WHAT)
    chosen |= any(assignment.partition("=")[0] in {f"{axis}.method" for axis in WHAT} for assignment in sets)
    asked = {**data, **assignments(s for s in sets if s.startswith("runtime="))}
    where = asked.get("runtime", Recipe.runtime)
    if preset := data.get("preset") or (
        None if chosen else runtime(where).default_preset if isinstance(where, str) else None
    ):
        data = {**data, "preset": _text(preset, "preset")}
        _merge(tree, find_preset(preset).fragment)
    _merge(tree, data)
    # methods first: the others are their fields, in whatever order they were given
    for assignment in sorted(sets, key=lambda text: ".method=" not in text):
        _merge(tree, _parse_set(assignment))
    if tree.get("kv_budget") is not None:
        tree["kv_budget"] = parse_budget(tree["kv_budget"])
    for axis in registry.AXES:
        if axis in tree:
            tree[axis] = {"method": "identity"} | tree[axis]
    if tree.get("prefer") is not None:
        _prefer(tree)
    if (isinstance(given, Mapping) and given) or any(assignment.startswith("width.") for assignment in sets):
        _keep_width(tree)
    tree["calibration"] = _build(Calibration, tree.get("calibration", {}), "calibration field")
    return _build(Recipe, tree, "recipe field")


def _keep_width(tree: dict[str, Any]) -> None:
    """Who names what a preset or a preference has anyway means it: with all fields written out `suited` leaves it alone."""
    preset, width = tree.get("preset"), tree["width"]
    chosen = [find_preset(preset).fragment.get("width")] if preset else []
    chosen += [FOR_SPEED] if tree.get("prefer") == "speed" else []
    if width in chosen:
        fields = dataclasses.fields(registry.load("width", width["method"]))
        tree["width"] = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING} | width


def _methods_with(axis: str, field: str) -> str:
    """Which methods of an axis have a field of this name, as a sentence."""
    methods = [
        name
        for name in registry.names(axis)
        if any(f.name == field for f in dataclasses.fields(registry.load(axis, name)))
    ]
    return f" Methods of {axis} that have it: {', '.join(methods)}." if methods else ""


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{name} = {shortened(value)} is not a text.")
    return value


def material_of(recipe: Recipe, source: Source, run_dir: Path, device: str = "cpu") -> Material:
    """The calibration text that a recipe asks for."""
    length = recipe.axes.length
    weighs = length.weighs_heads or length.foresees
    axes = ("depth", "width", "length") if weighs else ("depth", "width")
    asked_by = " + ".join(getattr(recipe, axis)["method"] for axis in axes)
    width = recipe.method("width")
    return Material(
        recipe.calibration, source, run_dir, width, asked_by,
        seed=recipe.seed, device=device, recent=recipe.axes.told_apart, looks_back=weighs, context_len=recipe.context_len,
    )  # fmt: skip


def _prefer(tree: dict[str, Any]) -> None:
    if _text(tree["prefer"], "prefer") not in PREFERENCES:
        raise RecipeError(registry.unknown("preference", tree["prefer"], PREFERENCES))
    method, rope = tree.get("width", {}).get("method"), PREFERENCES[tree["prefer"]]
    if method not in ("fisher", "mla"):
        raise RecipeError("prefer goes with width methods mla and fisher (presets auto, fast and small).")
    if method == "fisher" or rope == "applied":  # a latent of both holds keys before rotation
        tree["width"] = tree["width"] | {"method": "fisher", "rope": rope}
    else:
        tree["width"] = {"rope": rope, "leading": 0, "recent_leading": 0} | tree["width"]


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Plain data of a YAML recipe, for `make_recipe`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a YAML recipe: {error}") from error
    data = _plain(text, f"{path} cannot be read as a YAML recipe")
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no recipe: a mapping such as 'preset: svd_a' was expected.")
    return data


def _plain(text: str, fault: str) -> Any:
    """What a YAML text says. Dates that are none and lists that are nested too deeply are other faults to PyYAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{fault}: {str(error)[:400]}") from error


def preset_recipe(preset: str, fields: Mapping[str, Any]) -> Recipe:
    """The recipe of `NAME` or `NAME:AXIS.FIELD=VALUE,...`, as in compare and bench, with further fields."""
    name, _, sets = preset.partition(":")
    return make_recipe({**fields, "preset": name}, [assignment for assignment in sets.split(",") if assignment])


def parse_budget(value: Any) -> float:
    """0.25, "0.25" or "1/4"."""
    try:
        return float(Fraction(str(value)))
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise RecipeError(f"kv_budget {value!r} is not a number; give 0.25 or 1/4.") from error


def assignments(sets: Iterable[str]) -> dict[str, Any]:
    """`field=value` texts as plain data."""
    return {name: value for assignment in sets for name, value in _parse_set(assignment).items()}


EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""1e-4, which YAML 1.1 takes for a text."""


def _parse_set(assignment: str) -> dict[str, Any]:
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {assignment!r} is not AXIS.FIELD=VALUE, for example width.latent=group.")
    if path == "preset":
        raise RecipeError("a preset is not a field; give --preset.")
    fault = f"--set {shortened(assignment)}: the value is not YAML"
    tree: Any = float(text) if EXPONENT.fullmatch(text) else _plain(text, fault)
    for name in reversed(path.split(".")):
        tree = {name: tree}
    return tree


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            # another method's fields would not fit
            if "method" in tree[name] and value.get("method", tree[name]["method"]) != tree[name]["method"]:
                tree[name] = {}
            _merge(tree[name], value)
        elif isinstance(value, Mapping):
            tree[name] = dict(value)
        elif name in (*registry.AXES, "calibration"):
            raise RecipeError(
                f"{name} = {value!r} was given where its fields are meant, for example {name}.{_example(name)}."
            )
        else:
            tree[name] = value


def _example(name: str) -> str:
    return "data" if name == "calibration" else "method"


def check_types(cls: Any, values: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError where a value is not of its field's type."""
    for name, expected in misfits(cls, values).items():
        raise RecipeError(f"{where}{name} = {shortened(values[name])} is not {expected}.")


def _build(cls: Any, data: Mapping[str, Any], what: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in known:
            raise RecipeError(registry.unknown(what, name, known))
    needed = [
        n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if data.get(name) is None]:
        raise RecipeError(
            f"the recipe lacks {', '.join(missing)}; give it on the command line (MODEL, --out) or in the recipe file."
        )
    check_types(cls, data, "calibration." if cls is Calibration else "")
    return cls(**data)
