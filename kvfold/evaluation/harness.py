"""lm-evaluation-harness: how it is given a model and tasks. Imported only when tasks are asked for; that takes seconds."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from kvfold.errors import DataError, RecipeError, one_line
from kvfold.evaluation.task_files import TaskFile
from kvfold.evaluation.texts import logits_step_by_step
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.transformers.load import Loaded

Spec = str | TaskFile


class FoldedLM(HFLM):
    """The harness's model. Caches whose last tokens are exact are filled token by token, or decoding would look lossless."""

    def __init__(self, loaded: Loaded, *, batch_size: int) -> None:
        with _quiet():  # HFLM warns that it was given a model instead of a name
            super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        self.plan: CachePlan | None = loaded.plan if loaded.folded else None

    @torch.no_grad()
    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.plan is None or not self.plan.depends_on_steps:
            return super()._model_call(inps, *args, **kwargs)
        return logits_step_by_step(self.model, inps, self.plan)


def task_manager(names: Sequence[str]) -> TaskManager:
    """The harness's index, which has its own tasks only where some are asked for. Raises RecipeError on unknown names."""
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks and not name.endswith((".yaml", ".yml")):
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f" Near: {', '.join(near)}." if near else ""
            raise RecipeError(f"there is no task {name!r} in lm-evaluation-harness {lm_eval.__version__}.{hint}")
    return manager


def run(
    lm: FoldedLM, specs: Sequence[Spec], *, manager: TaskManager, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """What the harness's simple_evaluate returns, with what every sample scored."""
    tasks = [spec if isinstance(spec, str) else _task(spec) for spec in specs]
    try:
        # no bootstrap: it fills stdout and forks; kvfold.evaluation.tasks makes standard errors of what samples scored
        return lm_eval.simple_evaluate(
            lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    except OSError as error:  # what the hub's clients raise
        names = ", ".join(spec for spec in specs if isinstance(spec, str))
        raise DataError(
            f"the data of {names} cannot be loaded: {one_line(error, 300)}. Tasks of the harness come from the"
            " hub; a local .jsonl file needs none."
        ) from error


def _task(file: TaskFile) -> ConfigurableTask:
    def rows(**_: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(file.rows)}

    # a count of 0 examples is fixed, so that the harness looks for none: those of MMLU are in the rows
    fields = {"task": file.name, "custom_dataset": rows, "test_split": "test", "num_fewshot": 0}
    with _quiet():
        return ConfigurableTask(config=fields | file.config)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
