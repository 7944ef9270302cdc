"""Several presets at several budgets, side by side at equal bytes: fold, load, evaluate, continue the same prompt."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold.calibration.material import Material, self_sampled
from kvfold.calibration.text import first_windows
from kvfold.checkpoint.atomic import write_text
from kvfold.checkpoint.source import Source, open_source
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.compression.compress import compress
from kvfold.compression.recipe import Recipe, make_recipe, material_of, preset_recipe
from kvfold.compression.suit_width import suited
from kvfold.errors import BudgetError, RecipeError
from kvfold.evaluation.context import Remembered, ask, compared, draw_samples
from kvfold.evaluation.generate import continue_prompt
from kvfold.evaluation.standard_errors import defined
from kvfold.evaluation.texts import Evaluation, Predictions, evaluate_models
from kvfold.linalg.eigen import discarded_energy
from kvfold.runtimes.transformers.load import default_dtype, load_weights, resolve_device

CONTEXT = 32_768
NEW_TOKENS = 32
ENERGY_NEEDS = frozenset({"keys", "keys_before_rotation", "values"})
EVALUATION_SEED_OFFSET = 1_000_003
"""Text that the model samples for evaluation is drawn with another seed than its calibration text."""


@dataclass(frozen=True)
class Row:
    """One preset at one budget (None: it takes none). `evaluation` is None where nothing of the method is that small.
    `further`: other texts. `remembered`: what a cache still knows of a context. `plan`: as in config.json."""

    preset: str
    asked_budget: float | None
    evaluation: Evaluation | None
    kv_bytes_at_32k: int | None
    continuation: str | None
    note: str = ""
    further: tuple[Evaluation, ...] = ()
    plan: dict[str, Any] | None = None
    remembered: tuple[Remembered, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Rows, the original's continuation, and the share of energy in leading directions per layer and tensor."""

    model: str
    calibration: str
    evaluated_on: str
    also_on: list[str]
    prompt: str
    continuation: str
    rows: list[Row]
    energy: dict[str, list[list[float]]]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare(
    model: str | Path,
    *,
    presets: Sequence[str],
    budgets: Sequence[float],
    calibration: dict[str, Any],
    out: str | Path,
    eval_files: Sequence[str | Path] = (),
    max_tokens: int = 8192,
    prompt: str = "The",
    context: int = 0,
    sequences: int = 16,
    seed: int = 0,
    device: str = "auto",
) -> Comparison:
    """Fold `model` with every preset at every budget and measure each on the same text.

    On the CPU models run in float32, on a GPU in the checkpoint's dtype. A preset is `NAME` or
    `NAME:AXIS.FIELD=VALUE,...`. Without `eval_files` models are evaluated on text that the original samples (with another
    seed than its calibration). Folded models are written under `out` and kept; so is `comparison.json`.

    context: ask, too, what a cache still knows of so many tokens of the first text, `sequences` times; bytes are counted over
    as many. Raises RecipeError without a text.
    """
    if context and not eval_files:
        raise RecipeError(f"--context {context} asks what a cache knows of a text; give it with --eval-data.")
    out, device = Path(out), resolve_device(device)
    source = open_source(model)
    fields = {"model": str(model), "calibration": calibration, "seed": seed}
    fields |= {"context_len": context} if context else {}
    first = suited(make_recipe(fields | {"out": str(out / "unused")}), source.layers)
    material = material_of(first, source, out / "run", device)
    cases = _cases(fields, presets, budgets, out)
    energy = _energies(material, _shared_needs(suited(recipe, source.layers) for _, _, recipe in cases))
    seq_len = first.calibration.seq_len or source.seq_len
    files: list[str | Path | None] = [*eval_files] or [None]
    texts = [_windows(source, file, seq_len, max_tokens, seed, out / "run", device) for file in files]
    contexts = {"file": eval_files[0], "length": context, "sequences": sequences, "seed": seed} if context else None
    bench = _Bench(source, texts, prompt, device, out, contexts)
    rows = [bench.run(*case) for case in cases]
    text = Path(str(first.calibration.data)).name
    names = [Path(file).name for file in eval_files] or ["text sampled by the model"]
    result = Comparison(
        model=source.checkpoint.path.resolve().name if Path(model).is_dir() else str(model),
        calibration=f"{text} ({material.num_samples} x {material.seq_len} tokens, seed {seed})",
        evaluated_on=f"{names[0]}, {texts[0].numel()} tokens",
        also_on=names[1:],
        prompt=prompt,
        continuation=bench.continue_prompt(bench.base.model),
        rows=rows,
        energy=energy,
    )
    write_text(out / "comparison.json", json.dumps(defined(result.to_json()), indent=1, allow_nan=False))
    return result


@dataclass
class _Bench:
    """The original model, loaded once, and what every folded model is measured on."""

    source: Source
    texts: list[Tensor]
    prompt: str
    device: str
    out: Path
    contexts: dict[str, Any] | None

    def __post_init__(self) -> None:
        path = self.source.checkpoint.path
        self.dtype = default_dtype(self.source.dtype, self.device)
        self.base = Predictions(load_weights(path, self.dtype, self.device))
        self.tokenizer = load_tokenizer(path)
        self.samples = draw_samples(self.tokenizer, **self.contexts) if self.contexts else []
        self.expected = ask(self.base.model, self.samples, "the original")

    def run(self, preset: str, budget: float | None, recipe: Recipe) -> Row:
        try:
            with warnings.catch_warnings():  # the table states the budget that was reached
                warnings.simplefilter("ignore")
                folded = compress(recipe, run_dir=self.out / "run", overwrite=True, device=self.device)
        except BudgetError as error:
            return Row(preset, budget, None, None, None, str(error))
        model = load_weights(folded.out, self.dtype, self.device)
        evaluation, *further = (evaluate_models(model, self.base, text, folded.plan) for text in self.texts)
        kv_bytes, text = folded.plan.kv_bytes(CONTEXT), self.continue_prompt(model)
        remembered: tuple[Remembered, ...] = ()
        if self.samples:
            found = ask(model, self.samples, folded.out.name)
            remembered = tuple(compared(self.samples, self.expected, found, folded.plan))
        plan = folded.plan.to_dict()
        return Row(preset, budget, evaluation, kv_bytes, text, further=tuple(further), plan=plan, remembered=remembered)

    def continue_prompt(self, model: Any) -> str:
        return continue_prompt(model, self.tokenizer, self.prompt, NEW_TOKENS, do_sample=False)[0]


def _cases(
    fields: dict[str, Any], presets: Sequence[str], budgets: Sequence[float], out: Path
) -> list[tuple[str, float | None, Recipe]]:
    """Every preset at every budget; one that takes no budget (kv_budget=null) once."""
    cases = {}
    for budget in sorted(budgets, reverse=True):
        for preset in presets:
            recipe = _recipe(fields, preset, budget, out)
            same = dataclasses.replace(recipe, out="")
            if same.to_yaml() not in cases:
                cases[same.to_yaml()] = (re.sub("[:,]kv_budget=null", "", preset), recipe.kv_budget, recipe)
    return list(cases.values())


def _recipe(fields: dict[str, Any], preset: str, budget: float, out: Path) -> Recipe:
    folder = out / re.sub(r"[:,/]", "-", f"{preset}-{budget:.4g}")
    return preset_recipe(preset, fields | {"kv_budget": budget, "out": str(folder)})


def _windows(
    source: Source, eval_file: str | Path | None, seq_len: int, max_tokens: int, seed: int, run_dir: Path, device: str
) -> Tensor:
    if eval_file is not None:
        return first_windows(load_tokenizer(source.checkpoint.path), eval_file, seq_len=seq_len, max_tokens=max_tokens)
    count = max(max_tokens // seq_len, 1)
    seed += EVALUATION_SEED_OFFSET
    return self_sampled(source, run_dir, num_samples=count, seq_len=seq_len, seed=seed, device=device)


def _shared_needs(recipes: Iterable[Recipe]) -> frozenset[str]:
    """What all folds together ask of the calibration text, gathered at once: they find it on disk. Only layers that share a
    cache need more, pairs of layers."""
    widths = [recipe.method("width") for recipe in recipes]
    return frozenset().union(*(width.needs for width in widths))


def _energies(material: Material, shared: frozenset[str]) -> dict[str, list[list[float]]]:
    """Per statistic and layer: the share of energy in the 1, 2, ... leading directions."""
    statistics = material.statistics(ENERGY_NEEDS | shared)
    assert statistics is not None, "energies need statistics"
    energy: dict[str, list[list[float]]] = {name: [] for name in sorted(ENERGY_NEEDS)}
    for layer in material.source.layers:
        for name, moment in statistics.layer(layer.index, ENERGY_NEEDS).items():
            lost = discarded_energy(moment.second_FF)[1:]
            energy[name].append([round(1 - float(share), 5) for share in lost])
    return energy
