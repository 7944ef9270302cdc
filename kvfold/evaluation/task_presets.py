"""The task lists of the papers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskPreset:
    """Tasks of the harness, with how many examples they are asked, and the metric whose average the paper gives."""

    about: str
    tasks: tuple[str, ...]
    shots: tuple[int, ...] = (0,)
    average: str = ""


TASK_PRESETS = {
    "mlkv_paper": TaskPreset("arXiv 2406.09297", ("arc_easy", "lambada_openai", "piqa", "sciq"), average="acc"),
    "svd_a_commonsense": TaskPreset(
        "arXiv 2406.07056",
        ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
        average="acc_norm",
    ),
    "svd_a_mmlu": TaskPreset("arXiv 2406.07056", ("mmlu",), shots=(0, 5)),
    "svd_a_multilingual": TaskPreset(
        "arXiv 2406.07056, for BLOOMZ; the average counts every language subset once",
        ("xnli", "xwinograd", "xcopa", "xstorycloze"),
        average="acc",
    ),
}
