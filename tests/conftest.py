"""Tiny random models of every family, and folds of them that several tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes with two threads each would crawl
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # read when Triton is imported

from tiny import MODELS, make_tiny, save_tiny

import kvfold
from kvfold.compression.compress import Folded
from kvfold.compression.recipe import make_recipe

torch.set_num_threads(1)

CALIBRATION = {"data": "self", "num_samples": 16, "seq_len": 64}


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for name in MODELS:
        save_tiny(make_tiny(name), root / name)
    return root


@pytest.fixture(scope="session")
def fold(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folded]:
    """fold(model, "svd_a", kv_budget=0.5, latent="group") -> the folded folder; the same call folds once."""
    root = tmp_path_factory.mktemp("folded")
    done: dict[str, Folded] = {}

    def run(model: str | Path, method: str, *, kv_budget: float | None = None, **fields: object) -> Folded:
        key = f"{model}-{method}-{kv_budget}-{sorted(fields.items())}"
        if key not in done:
            source = tiny_dir / model
            done[key] = kvfold.compress(
                make_recipe(
                    {
                        "model": str(source),
                        "out": str(root / f"{len(done)}"),
                        "kv_budget": kv_budget,
                        "width": {"method": method, **fields},
                        "calibration": CALIBRATION,
                    }
                ),
                run_dir=root / "run",
                device="cpu",
            )
        return done[key]

    return run
