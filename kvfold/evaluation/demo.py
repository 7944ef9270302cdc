"""Fold the model that ships with the package: several presets at several budgets, in a few minutes on two cores."""

from __future__ import annotations

from pathlib import Path

from kvfold.evaluation.compare import Comparison, compare

MODEL = Path(__file__).parents[1] / "demo_model" / "books-6l"
PRESETS = ("int8:kv_budget=null", "int4:kv_budget=null", "gqa", "svd_a", "small", "auto")
BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
CALIBRATION = {"data": "self", "num_samples": 64, "seq_len": 256}
PROMPT = "The old man looked at the sea and"


def demo(out: str | Path = "demo", *, device: str = "auto") -> Comparison:
    """Compare presets on text that the packaged model samples itself, so that no corpus is needed."""
    return compare(
        MODEL, presets=PRESETS, budgets=BUDGETS, calibration=dict(CALIBRATION), out=out, prompt=PROMPT, device=device
    )
