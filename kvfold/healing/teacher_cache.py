"""The teacher's likeliest tokens for every row of the training text, on disk: healing then needs no teacher in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvfold import distributed as processes
from kvfold.checkpoint.atomic import make_folder, require_space, write_tensors
from kvfold.healing.objectives import logits_of
from kvfold.healing.packing import Rows
from kvfold.progress import track

ROWS_PER_FILE = 64


class TeacherLogits:
    """ids and log-probabilities [rows, T, k] of the k likeliest tokens, in files of ROWS_PER_FILE rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Of these rows [B, T, k]."""
        parts = [self._row(int(row)) for row in rows_B]
        return torch.stack([ids for ids, _ in parts]), torch.stack([log_probs for _, log_probs in parts])

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        with safe_open(_file(self.folder, row // ROWS_PER_FILE), framework="pt") as file:
            at = row % ROWS_PER_FILE
            return file.get_slice("ids")[at], file.get_slice("log_probs")[at]


@torch.no_grad()
def keep_teacher_logits(teacher: Any, rows: Rows, folder: Path, *, top: int, batch_size: int) -> TeacherLogits:
    """Run the teacher over all rows once; files that are there already are kept, so that an interrupted run goes on. Several
    processes share the rows."""
    make_folder(folder)
    top = min(top, teacher.config.get_text_config().vocab_size)
    firsts = range(0, len(rows), ROWS_PER_FILE)[processes.rank() :: processes.world_size()]
    missing = [first for first in firsts if not _file(folder, first // ROWS_PER_FILE).exists()]
    require_space(folder, 6 * top * rows.input_ids.shape[1] * ROWS_PER_FILE * len(missing))
    for first in track(missing, "asking the teacher", len(missing)):
        indices = range(first, min(first + ROWS_PER_FILE, len(rows)))
        parts = []
        for start in range(0, len(indices), batch_size):
            batch = [rows[index] for index in indices[start : start + batch_size]]
            inputs = {name: torch.stack([row[name] for row in batch]).to(teacher.device) for name in batch[0]}
            log_probs = logits_of(teacher, inputs).float().log_softmax(-1)
            parts.append(log_probs.topk(top, dim=-1))
        kept = {
            "ids": torch.cat([part.indices for part in parts]).int().cpu(),
            "log_probs": torch.cat([part.values for part in parts]).half().cpu(),
        }
        write_tensors(_file(folder, first // ROWS_PER_FILE), kept, {})
    return TeacherLogits(folder)


def _file(folder: Path, number: int) -> Path:
    return folder / f"teacher-{number:05d}.safetensors"
