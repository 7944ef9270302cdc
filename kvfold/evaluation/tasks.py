"""What a folded model lost on tasks: scores of both models by lm-evaluation-harness, and their ratio, the recovery."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.checkpoint.atomic import make_folder, write_text
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.reader import Checkpoint, read_json
from kvfold.errors import RecipeError
from kvfold.evaluation.standard_errors import defined, ratio, ratio_stderr, stderr
from kvfold.evaluation.task_files import TaskFile, is_task_file, read_task_file
from kvfold.evaluation.task_presets import TASK_PRESETS, TaskPreset
from kvfold.evaluation.texts import check_original
from kvfold.runtimes.transformers.load import load


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, for the original (base) and the folded model, on the same samples.

    `recovery`: score / base_score, or its inverse where less is better: below 1 something was lost. Standard errors are
    those of a mean over samples; of the change and of the recovery they are paired, sample by sample, and to first order
    (delta method). They are nan for metrics that are no mean of samples. `part_of`: the group that this task belongs to.
    """

    task: str
    metric: str
    num_fewshot: int
    samples: int
    score: float
    stderr: float
    base_score: float
    base_stderr: float
    change_stderr: float
    higher_is_better: bool = True
    part_of: str = ""

    @property
    def recovery(self) -> float:
        return ratio(*(self._pair if self.higher_is_better else self._pair[::-1]))

    @property
    def recovery_stderr(self) -> float:
        (top, top_stderr), (bottom, bottom_stderr) = zip(self._pair, (self.stderr, self.base_stderr), strict=True)
        if not self.higher_is_better:
            top, bottom, top_stderr, bottom_stderr = bottom, top, bottom_stderr, top_stderr
        errors = {"top_stderr": top_stderr, "bottom_stderr": bottom_stderr, "change_stderr": self.change_stderr}
        return ratio_stderr(top, bottom, **errors)

    @property
    def _pair(self) -> tuple[float, float]:
        return self.score, self.base_score

    def to_json(self) -> dict[str, Any]:
        """The fields that scripts rely on; null where a number is not defined."""
        return defined(dataclasses.asdict(self) | {"recovery": self.recovery, "recovery_stderr": self.recovery_stderr})


def evaluate_tasks(
    folded: str | Path,
    *,
    against: str | Path,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
) -> list[TaskScore]:
    """Score both models on tasks, one after the other, so that one is in memory at a time.

    A task is a name of lm-evaluation-harness, one of TASK_PRESETS, or a file (`task_files.py`). `limit`: samples per task.
    `num_fewshot` wins over what presets and tasks say. Raises RecipeError on names that do not exist and without lm-eval,
    DataError on files that cannot be read.
    """
    (found,) = evaluate_folds(
        [folded],
        against=against,
        tasks=tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    return found


def evaluate_folds(
    folds: Sequence[str | Path],
    *,
    against: str | Path,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    answers: str | Path | None = None,
) -> list[list[TaskScore]]:
    """The same of several folds of one model, which itself is asked once. answers: a folder where what each model answered is
    kept for later calls, such as the one after an interruption."""
    runs, harness, manager = _prepared(tasks, num_fewshot)
    for folded in folds:
        check_original(folded, against)
    options = {"manager": manager, "limit": limit}

    def asked(path: str | Path) -> dict[int | None, dict[str, Any]]:
        asked_for = [[shots, [_what(spec) for spec in specs]] for shots, specs in runs.items()]  # in this order
        key = fingerprint(model=Checkpoint.open(path).fingerprint(), tasks=asked_for, limit=limit, dtype=dtype)
        file = Path(answers) / f"answers-{key[:16]}.json" if answers else None
        if file is not None and file.exists():
            return dict(zip(runs, read_json(file)["found"], strict=True))
        lm = harness.FoldedLM(load(path, dtype=dtype, device=device), batch_size=batch_size)
        found = {shots: _kept_of(harness.run(lm, specs, num_fewshot=shots, **options)) for shots, specs in runs.items()}
        del lm
        gc.collect()
        if file is not None:
            make_folder(file.parent)
            write_text(file, json.dumps({"found": list(found.values())}))
        return found

    base = asked(against)
    tables = []
    for folded in folds:
        found = asked(folded)
        rows = [row for shots in runs for row in scores(base[shots], found[shots], shots=_shots(runs, shots))]
        tables.append([*rows, *_averages(tasks, rows)])
    return tables


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise what `evaluate_tasks` would raise of these names, before anything takes long."""
    _prepared(tasks, None)


def _prepared(tasks: Sequence[str], num_fewshot: int | None) -> tuple[dict[int | None, list[str | TaskFile]], Any, Any]:
    """What is asked, the harness, and its own manager of the tasks that it knows."""
    runs, harness = _runs(tasks, num_fewshot), _harness()
    return (
        runs,
        harness,
        harness.task_manager([spec for specs in runs.values() for spec in specs if isinstance(spec, str)]),
    )


def _what(spec: str | TaskFile) -> str:
    return spec if isinstance(spec, str) else repr((spec.name, spec.rows))


def _kept_of(found: dict[str, Any]) -> dict[str, Any]:
    """What `scores` reads of the harness's results: numbers, and no prompts."""
    kept = {name: found.get(name) or {} for name in ("results", "group_subtasks", "n-shot", "higher_is_better")}
    samples = {
        task: [
            {k: v for k, v in row.items() if k in ("filter", "doc_id") or isinstance(v, int | float)} for row in rows
        ]
        for task, rows in found["samples"].items()
    }
    return json.loads(json.dumps(kept | {"samples": samples}, default=float))


def _harness() -> Any:
    try:
        return importlib.import_module("kvfold.evaluation.harness")
    except ImportError as error:
        raise RecipeError(
            f"--tasks needs lm-evaluation-harness, which cannot be imported ({error}): pip install 'kvfold[eval]'"
        ) from error


def _runs(tasks: Sequence[str], num_fewshot: int | None) -> dict[int | None, list[str | TaskFile]]:
    """What is asked with how many examples (None: as many as each task says), every task once."""
    asked: dict[tuple[int | None, str], None] = {}
    for name in tasks:
        preset = TASK_PRESETS.get(name, TaskPreset("", (name,)))
        for shots in preset.shots if name in TASK_PRESETS else (None,):
            asked |= {(shots if num_fewshot is None else num_fewshot, task): None for task in preset.tasks}
    runs: dict[int | None, list[str | TaskFile]] = {}
    for count, name in asked:
        spec = read_task_file(name, num_fewshot=count or 0) if is_task_file(name) else name
        runs.setdefault(count, []).append(spec)
    for specs in runs.values():
        names = [spec if isinstance(spec, str) else spec.name for spec in specs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise RecipeError(f"two tasks are called {sorted(twice)[0]!r}; rename one of the files.")
    return runs


def _shots(runs: dict[int | None, list[str | TaskFile]], shots: int | None) -> dict[str, int]:
    """Examples in the prompts of task files, of which the harness knows nothing."""
    return {spec.name: shots or 0 for spec in runs[shots] if isinstance(spec, TaskFile)}


def scores(base: dict[str, Any], folded: dict[str, Any], *, shots: dict[str, int] | None = None) -> list[TaskScore]:
    """Rows of two results of simple_evaluate. `shots`: examples per task where the harness does not know."""
    subtasks = {group: members for group, members in base.get("group_subtasks", {}).items() if members}
    part_of = {member: group for group, members in subtasks.items() for member in members}
    shots = base["n-shot"] | (shots or {})
    rows: list[TaskScore] = []
    for task, metrics in sorted(base["results"].items(), key=lambda item: item[0] in subtasks):
        leaves = _leaves(task, subtasks)
        for key in metrics:
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr"):
                continue
            pairs = [[_sampled(found, leaf, metric, filter_) for leaf in leaves] for found in (base, folded)]
            values = [found["results"][task][key] for found in (base, folded)]
            errors = _stderrs(values, pairs)
            better = base["higher_is_better"].get(leaves[0], {}).get(metric, True)
            count = sum(len(base["samples"][leaf]) for leaf in leaves)
            rows.append(
                TaskScore(
                    task,
                    metric if filter_ == "none" else f"{metric}, {filter_}",
                    shots.get(leaves[0], 0),
                    count,
                    score=values[1],
                    stderr=errors[1],
                    base_score=values[0],
                    base_stderr=errors[0],
                    change_stderr=errors[2],
                    higher_is_better=better is not False,
                    part_of=part_of.get(task, ""),
                )
            )
    return rows


def _leaves(task: str, subtasks: dict[str, list[str]]) -> list[str]:
    return [leaf for member in subtasks[task] for leaf in _leaves(member, subtasks)] if task in subtasks else [task]


def _sampled(found: dict[str, Any], task: str, metric: str, filter_: str) -> Tensor | None:
    """[N]: what every sample scored, in the order of the data; None where that is not one number each."""
    rows = [row for row in found["samples"].get(task, ()) if row["filter"] == filter_]
    values = [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return torch.tensor(values, dtype=torch.float64)


def _stderrs(values: list[float], pairs: list[list[Tensor | None]]) -> tuple[float, float, float]:
    """Of the original's score, of the folded model's, and of their difference, out of what each sample contributes."""
    effects = [_effects(value, leaves) for value, leaves in zip(values, pairs, strict=True)]
    if effects[0] is None or effects[1] is None or len(effects[0]) != len(effects[1]):
        return math.nan, math.nan, math.nan
    return stderr(effects[0]), stderr(effects[1]), stderr(effects[1] - effects[0])


def _effects(value: float, leaves: list[Tensor | None]) -> Tensor | None:
    """[N]: how each sample moves the score times N, to first order; None where the score is no known mean."""
    if any(leaf is None for leaf in leaves):
        return None
    parts = [leaf for leaf in leaves if leaf is not None]
    all_N = torch.cat(parts)
    centred_N = torch.cat([part - part.mean() for part in parts])  # samples vary within their task
    if math.isclose(all_N.mean().item(), value, rel_tol=1e-6, abs_tol=1e-9):
        return centred_N
    if math.isclose((-all_N.mean()).exp().item(), value, rel_tol=1e-6):  # a perplexity of log-probabilities
        return -value * centred_N
    if math.isclose(sum(part.mean().item() for part in parts) / len(parts), value, rel_tol=1e-6):  # tasks count alike
        return torch.cat([(part - part.mean()) * len(all_N) / len(parts) / len(part) for part in parts])
    return None


def _averages(tasks: Sequence[str], rows: list[TaskScore]) -> list[TaskScore]:
    """Per preset with an average: the mean over its tasks, or, for groups, over their members. Tasks err independently."""
    return [
        _average(name, rows) for name in dict.fromkeys(tasks) if name in TASK_PRESETS and TASK_PRESETS[name].average
    ]


def _average(name: str, rows: list[TaskScore]) -> TaskScore:
    preset = TASK_PRESETS[name]
    found: dict[str, TaskScore] = {}
    groups = {row.part_of for row in rows}
    for row in rows:
        asked = row.task in preset.tasks or row.part_of in preset.tasks
        if asked and row.task not in groups and row.metric in ("acc", preset.average):
            found[row.task] = row if row.metric == preset.average else found.get(row.task, row)
    means = [_mean([getattr(row, field) for row in found.values()]) for field in ("score", "base_score")]
    errors = [
        _mean_stderr([getattr(row, f"{which}stderr") for row in found.values()]) for which in ("", "base_", "change_")
    ]
    return TaskScore(
        f"average of {name}",
        preset.average,
        next(iter(found.values())).num_fewshot,
        sum(row.samples for row in found.values()),
        score=means[0],
        stderr=errors[0],
        base_score=means[1],
        base_stderr=errors[1],
        change_stderr=errors[2],
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_stderr(stderrs: list[float]) -> float:
    return math.hypot(*stderrs) / len(stderrs)
