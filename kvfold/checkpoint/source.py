"""Opening a model folder to fold it, and loading one, folded or not, to run it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvfold.architectures.base import Architecture, architecture, empty_model, source_config
from kvfold.calibration.text import load_tokenizer
from kvfold.checkpoint.reader import Checkpoint, locate, read_json
from kvfold.compression.allocate import source_layer
from kvfold.compression.fold import check_names, source_dtype, under_current_names
from kvfold.errors import CheckpointError, RecipeError
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.plan import CONFIG_KEY, ITEMSIZE, CachePlan, source_plan

MAX_SEQ_LEN = 2048


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been opened and understood."""

    checkpoint: Checkpoint
    arch: Architecture
    layers: list[AttentionLayer]

    @property
    def seq_len(self) -> int:
        """Tokens per sequence where nothing else is asked for: the model's context length, at most 2,048."""
        return default_seq_len(self.checkpoint.config)

    @property
    def dtype(self) -> str:
        """The dtype of the original cache, as config.json would name it."""
        return source_dtype(self.checkpoint, self.arch, self.layers[0])


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
            return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options).to(device).eval()
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars."""
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            transformers_logging.enable_progress_bar()


def _kernel(path: Path) -> dict[str, Any]:
    """torch's fused kernel, which some versions of transformers choose by themselves, ignores a cap on scores."""
    config = read_json(path / "config.json")
    capped = config.get("attn_logit_softcapping") is not None and not config.get(CONFIG_KEY)
    return {"attn_implementation": "eager"} if capped else {}


def load_plan(model: str | Path) -> tuple[CachePlan, bool]:
    """The plan of a folded folder, or that of a stock model's own cache; and whether the folder is folded."""
    path = locate(model)
    config = read_json(path / "config.json")
    if config.get(CONFIG_KEY):
        return CachePlan.from_dict(config[CONFIG_KEY]), True
    source = open_source(path)
    return source_plan([source_layer(layer) for layer in source.layers], source.dtype), False


def open_source(model: str | Path) -> Source:
    """Open a checkpoint and read the facts of its layers. Raises CheckpointError before any work is done."""
    checkpoint = Checkpoint.open(model)
    arch = architecture(checkpoint.config.get("model_type", "(none)"))
    stock = empty_model(arch, source_config(arch, checkpoint.config))
    checkpoint = under_current_names(checkpoint, arch, stock)
    checkpoint = dataclasses.replace(checkpoint, aliases=check_names(checkpoint, stock))
    return Source(checkpoint, arch, arch.describe(stock))


def default_seq_len(config: dict[str, Any]) -> int:
    """Tokens per sequence where nothing else is asked for: the model's context length, at most 2,048."""
    return min(MAX_SEQ_LEN, context_len(config) or MAX_SEQ_LEN)


def context_len(config: dict[str, Any]) -> int | None:
    """Tokens that a model has positions for; None where nothing limits them."""
    return config.get("max_position_embeddings") or config.get("n_positions")


def default_dtype(stored: str, device: str) -> str:
    """The dtype that a model runs in where nothing else is asked for: float32 on the CPU, else as it is stored."""
    return "float32" if device == "cpu" else stored


def warn_if_too_long(seq_len: int, config: dict[str, Any]) -> None:
    """Warn where sequences are longer than the model's positions: it was not trained for that."""
    context = context_len(config) or seq_len
    if seq_len > context:
        warnings.warn(
            f"sequences of {seq_len} tokens exceed the model's context of {context}; it was not trained for them."
        )


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {device} cannot be used: {' '.join(str(error).split())[:200]}") from error
    return device
