"""Tiny random models of every family, and folds of them that several tests share."""

from __future__ import annotations

import os
import zlib

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes with two threads each would crawl
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # read when Triton is imported

from pairwise import cell, chosen
from tiny import MODELS, load, make_tiny, save_tiny

import kvfold
from kvfold.compression.compress import Folded
from kvfold.compression.recipe import make_recipe

torch.set_num_threads(1)

CALIBRATION = {"data": "self", "num_samples": 16, "seq_len": 64}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rest", action="store_true", help="what does not run by default: tests/pairwise.py and `rare`")
    parser.addoption(
        "--part", default="0/1", help="K/N: of those, every N-th from K on, by names, so that N runs try all"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By default every pair of test, model and variant, and no rare test; with --rest the others; all that :: names."""
    if any("::" in str(argument) for argument in config.args):
        return
    part, parts = map(int, str(config.getoption("--part")).split("/"))
    default = [
        runs and item.get_closest_marker("rare") is None
        for item, runs in zip(items, chosen([cell(item) for item in items]), strict=True)
    ]
    rest = bool(config.getoption("--rest"))
    kept = [runs != rest and of_part(item, part, parts) for item, runs in zip(items, default, strict=True)]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, kept, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, kept, strict=True) if keep]


def of_part(item: pytest.Item, part: int, parts: int) -> bool:
    """Whether an item is in a part: by its name, the same in every process and run."""
    return zlib.crc32(item.nodeid.encode()) % parts == part % parts


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


@pytest.fixture
def source(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model in three shards, which a test may spoil."""
    folder = tmp_path / "source"
    load(tiny_dir / "llama_mha").save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder
