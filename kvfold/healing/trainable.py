"""What healing trains: everything, attention, the fold's own projections, or low-rank adapters that are merged afterwards."""

from __future__ import annotations

from typing import Any

from torch import nn

from kvfold.errors import RecipeError
from kvfold.runtimes.transformers.attention import FoldedAttention
from kvfold.runtimes.transformers.projections import GroupedLinear

CHOICES = ("all", "attention", "fold", "lora")


def choose_trainable(model: nn.Module, train: str, *, lora_rank: int, lora_alpha: int, lora_dropout: float) -> Any:
    """The model with only the chosen parameters trainable; with `lora` a peft model around it.

    Raises RecipeError where there is nothing of the kind.
    """
    attention = [module for module in model.modules() if isinstance(module, FoldedAttention)]
    if train == "lora":
        return _with_adapters(model, lora_rank, lora_alpha, lora_dropout)
    if train == "all":
        return model
    chosen = [p for module in attention for p in _parameters(module, only_fold=train == "fold")]
    if not chosen:
        raise RecipeError("this fold left no projections of its own (train: fold); choose attention, lora or all.")
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return model


def merged(model: Any) -> Any:
    """The plain model, with adapters added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _parameters(module: FoldedAttention, *, only_fold: bool) -> list[nn.Parameter]:
    if not only_fold:
        return list(module.parameters())
    return [p for part in module.modules() if isinstance(part, GroupedLinear) for p in part.parameters()]


def _with_adapters(model: nn.Module, rank: int, alpha: int, dropout: float) -> Any:
    """Adapters on the ordinary projections of attention; the fold's own small matrices are trained as they are."""
    from peft import LoraConfig, get_peft_model

    paths = [path for path, module in model.named_modules() if isinstance(module, FoldedAttention)]
    targets = [
        f"{p}.{n}" for p in paths for n, part in model.get_submodule(p).named_children() if type(part) is nn.Linear
    ]
    names = {n for p in paths for n, part in model.get_submodule(p).named_children() if isinstance(part, GroupedLinear)}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=sorted(names) or None,
    )
    return get_peft_model(model, config)
