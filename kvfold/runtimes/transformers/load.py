"""Loading a model folder, folded or not, to run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from kvfold.checkpoint.reader import locate, read_json
from kvfold.checkpoint.source import load_plan
from kvfold.checkpoint.tokenizer import load_tokenizer
from kvfold.errors import CheckpointError, RecipeError, one_line
from kvfold.plan.cache_spec import ITEMSIZE
from kvfold.plan.naming import CONFIG_KEY
from kvfold.plan.plan import CachePlan
from kvfold.progress import without_bars


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run. `plan` is that of the untouched cache where the model is not folded."""

    path: Path
    model: Any
    tokenizer: Any
    plan: CachePlan
    folded: bool


def load(model: str | Path, *, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load a folder or hub id. `auto` dtype is the checkpoint's on a GPU, and float32 on the CPU.

    Raises CheckpointError where the folder is not a model that kvfold knows.
    """
    path, device = locate(model), resolve_device(device)
    plan, folded = load_plan(path)
    if dtype not in ("auto", *ITEMSIZE):
        raise RecipeError(f"dtype {dtype!r} is not one of auto, {', '.join(ITEMSIZE)}.")
    chosen = default_dtype(plan.dtype, device) if dtype == "auto" else dtype
    tokenizer = load_tokenizer(path)
    return Loaded(path, load_weights(path, chosen, device), tokenizer, plan, folded)


def load_weights(path: Path, dtype: str, device: str) -> PreTrainedModel:
    """The model of a folder, ready for inference, without transformers' progress bar."""
    try:
        with without_bars():
            options = _kernel(path)
            return auto_class(path).from_pretrained(path, dtype=getattr(torch, dtype), **options).to(device).eval()
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def auto_class(path: str | Path) -> Any:
    """transformers' Auto class that knows a folder's model: of some that sit beside a vision tower the one of causal models
    knows nothing, or the part for text alone."""
    kind, models = type(AutoConfig.from_pretrained(path)), AutoModelForCausalLM._model_mapping
    known = kind in models and models[kind].config_class is kind
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def _kernel(path: Path) -> dict[str, Any]:
    """torch's fused kernel, which some versions of transformers choose by themselves, ignores a cap on scores."""
    config = read_json(path / "config.json")
    capped = config.get("attn_logit_softcapping") is not None and not config.get(CONFIG_KEY)
    return {"attn_implementation": "eager"} if capped else {}


def default_dtype(stored: str, device: str) -> str:
    """The dtype that a model runs in where nothing else is asked for: float32 on the CPU, else as it is stored."""
    return "float32" if device == "cpu" else stored


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {device} cannot be used: {one_line(error)}") from error
    return device
