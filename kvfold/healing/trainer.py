"""transformers' Trainer with an objective of ours: metrics as JSON lines, a stop at the first loss that is no number."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kvfold.checkpoint.atomic import write_text
from kvfold.errors import HealError
from kvfold.healing.elastic import Elastic
from kvfold.healing.objectives import Objective
from kvfold.healing.packing import predicted
from kvfold.progress import STDERR

METRICS = "metrics.jsonl"
SHOWN = ("loss", "kl", "ce", "layers")
"""Of what is logged, what people want to see."""


class HealTrainer(Trainer):
    """Minimises `objective(model, inputs)["loss"]`, and logs the means of its other parts."""

    def __init__(
        self, *args: Any, objective: Objective, metrics: Path, elastic: Elastic | None = None, **kwargs: Any
    ) -> None:
        self.bar = _Bar()
        callbacks = [_Metrics(metrics), self.bar, *([_Widths(elastic)] if elastic else [])]
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.remove_callback(PrinterCallback)
        self.objective = objective
        # makes Trainer count the tokens of a step, over all its batches and processes
        self.model_accepts_loss_kwargs = True
        self.seen: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """With a bar that goes away even when the run fails."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.bar.stop()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over all tokens of a step, whichever batch and process they are in."""
        parts = self.objective(model, inputs)
        if not torch.isfinite(parts["loss"].detach()):
            raise HealError(
                f"the loss is {float(parts['loss'].detach())} at step {self.state.global_step}. {self._last_good()} Give a"
                " smaller --learning-rate, or look for rows of the text that the model cannot take."
            )
        prefix, tokens = "" if model.training else "eval_", predicted(inputs["labels"])
        for name in sorted(parts.keys() - {"loss"}):
            self.seen[prefix + name].append((float(parts[name]), tokens))
        if num_items_in_batch is None:
            return parts["loss"]
        return parts["loss"] * (
            tokens * self.accelerator.num_processes / num_items_in_batch
        )  # DDP and FSDP take the mean

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the means of the objective's parts since the last time, over all processes."""
        wanted = sorted(name for name in self.seen if name.startswith("eval_") == ("eval_loss" in logs))
        for name in wanted if "loss" in logs or "eval_loss" in logs else []:
            seen = torch.tensor(self.seen.pop(name), dtype=torch.float64, device=self.accelerator.device)
            sums = torch.stack([seen.prod(1).sum(), seen[:, 1].sum()])[None]
            total, tokens = self.accelerator.gather(sums).sum(0).tolist()
            logs[name] = round(total / max(tokens, 1), 6)
        super().log(logs, *args, **kwargs)

    def _last_good(self) -> str:
        last = last_checkpoint(Path(str(self.args.output_dir)))
        return f"The last good checkpoint is {last}." if last else "No checkpoint was written before."


class _Metrics(TrainerCallback):
    """Every log entry as one line of a file. A continued run drops what was written after its checkpoint."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.file.exists():
            kept = [entry for entry in read_metrics(self.file) if entry["step"] <= state.global_step]
            write_text(self.file, "".join(json.dumps(entry) + "\n" for entry in kept) if state.global_step else "")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step} | {k: v for k, v in logs.items() if _is_number(v)}
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")


class _Bar(TrainerCallback):
    """Steps, the time that is left and the last loss; lines where stderr is no terminal."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and STDERR.is_terminal:
            columns = (TextColumn("healing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.description}"), console=STDERR, transient=True)
            self.progress.start()
            self.progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: value for name, value in (logs or {}).items() if name.removeprefix("eval_") in SHOWN}
        line = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        if line and self.progress:
            self.progress.update(self.progress.task_ids[0], description=line)
        elif line and state.is_world_process_zero:
            STDERR.print(f"step {state.global_step} of {state.max_steps}  {line}", highlight=False)

    def stop(self) -> None:
        """Take it off the screen."""
        if self.progress:
            self.progress.stop()


class _Widths(TrainerCallback):
    """Draws a width before every step."""

    def __init__(self, elastic: Elastic) -> None:
        self.elastic = elastic

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.elastic.draw(state.global_step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def last_checkpoint(run_dir: Path) -> str | None:
    """The newest that is complete: Trainer writes its state last."""
    found = [file.parent for file in run_dir.glob("checkpoint-*/trainer_state.json")]
    return max(map(str, found), key=lambda name: int(name.rpartition("-")[2]), default=None)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """What was logged; a last line that was cut off, as by a full disk, is none."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
