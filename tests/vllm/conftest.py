"""Folded folders that vLLM serves, made when a test asks for them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from plans import CALIBRATION, CHANGES, PLANS
from tiny import FAMILIES, MODELS, make_tiny, save_tiny

import kvfold
from kvfold.evaluation.demo import MODEL


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder("groups") or folder("neox_partial"), a family's tiny model with half the cache."""
    root = tmp_path_factory.mktemp("vllm")

    def make(name: str) -> Path:
        if name == "original":
            return MODEL
        if not (root / name).exists():
            recipe = PLANS.get(name, {"preset": "served", "allocate": "uniform", "kv_budget": 1 / 2})
            model, tiny = MODEL, recipe.get("model", name)
            if tiny in MODELS | FAMILIES:
                model = save_tiny(make_tiny(tiny, **CHANGES.get(name, CHANGES.get(tiny, {}))), root / f"{name}.stock")
            where = {"model": str(model), "out": str(root / name), "calibration": CALIBRATION}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "stored heads of")  # of tiny models, whose heads are padded
                kvfold.compress(recipe | where, device="cpu")
        return root / name

    return make
