"""What a folded model lost: loss, perplexity, KL to the original and top-1 agreement, on the same tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.calibration import text as data
from kvfold.checkpoint.source import default_seq_len, load_plan, warn_if_too_long
from kvfold.errors import RecipeError
from kvfold.plan.plan import CachePlan
from kvfold.progress import track
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.load import Loaded, load

ELEMENTS_AT_ONCE = 2**24
"""Float64 log-probabilities (positions x vocabulary) that are in memory at once."""
ELEMENTS_KEPT = 2**29
"""Logits of the original that are kept for the next folded model."""


@dataclass(frozen=True)
class Evaluation:
    """Means over `tokens` predicted tokens. `kl` is KL(original || folded) in nats per token.

    `loss_change_stderr`: standard error of loss - base_loss over the windows of text.
    """

    loss: float
    perplexity: float
    base_loss: float
    base_perplexity: float
    kl: float
    top1_agreement: float
    kv_budget: float
    kv_bytes_per_token: int
    base_kv_bytes_per_token: int
    tokens: int
    loss_change_stderr: float

    @property
    def loss_change(self) -> float:
        return self.loss - self.base_loss

    def to_json(self) -> dict[str, float | int]:
        """The fields that scripts rely on."""
        values = dataclasses.asdict(self)
        del values["loss_change_stderr"]
        return values


def evaluate(
    folded: str | Path,
    *,
    against: str | Path,
    data_file: str | Path,
    max_tokens: int | None = None,
    seq_len: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> Evaluation:
    """Compare a folded folder with its original on a text file, cut into windows of `seq_len` tokens from the beginning.

    `seq_len` 0 takes the original's context length, at most 2,048. Raises KvfoldError on folders or text that do not fit.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "seq_len": seq_len, "dtype": dtype, "device": device}
    return evaluate_texts(folded, against=against, data_files=[data_file], **options)[0]


def evaluate_texts(
    folded: str | Path,
    *,
    against: str | Path,
    data_files: Sequence[str | Path],
    max_tokens: int | None = None,
    seq_len: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> list[Evaluation]:
    """The same on several texts, `max_tokens` of each. Those of another kind than the first show domain shift."""
    model, base = load_pair(folded, against, dtype=dtype, device=device)
    config = base.model.config.to_dict()
    seq_len = seq_len or default_seq_len(config)
    warn_if_too_long(seq_len, config)
    texts = [data.first_windows(base.tokenizer, file, seq_len=seq_len, max_tokens=max_tokens) for file in data_files]
    return [evaluate_models(model.model, base.model, windows_WT, model.plan) for windows_WT in texts]


def load_pair(folded: str | Path, against: str | Path, *, dtype: str, device: str) -> tuple[Loaded, Loaded]:
    """The folded model and its original. Raises RecipeError where one is not made from the other."""
    check_original(folded, against)
    model, base = (load(path, dtype=dtype, device=device) for path in (folded, against))
    check_vocabularies(model.model, base.model)
    return model, base


def check_original(folded: str | Path, against: str | Path) -> None:
    """Raise RecipeError where `against` cannot be the original of `folded`. Loads neither."""
    plan, _ = load_plan(folded)
    base_plan, base_folded = load_plan(against)
    if base_folded:
        raise RecipeError(f"--against {against} is folded itself; give the original model.")
    if plan.source != base_plan.source:
        raise RecipeError(f"{folded} was not folded from a model of {against}'s shape; give the original as --against.")


def check_vocabularies(model: Any, base: Any) -> None:
    """Raise RecipeError where two models predict different numbers of tokens."""
    sizes = [network.config.get_text_config().vocab_size for network in (model, base)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens: --against must"
            " be the original of this folder."
        )


class Predictions:
    """A model's logits of windows that are asked for again, for one folded model after the other: computed once, and kept as
    far as ELEMENTS_KEPT allows."""

    def __init__(self, model: Any) -> None:
        self.model, self.left = model, ELEMENTS_KEPT
        self.known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def __call__(self, window_T: Tensor) -> Tensor:
        """[T - 1, vocabulary]: of every token after the first."""
        key = window_T.cpu().numpy().tobytes()
        if key in self.known:
            return self.known[key]
        logits_TV = self.model(window_T[None].to(self.model.device), use_cache=False).logits[0, :-1]
        if logits_TV.numel() <= self.left:
            self.left -= logits_TV.numel()
            self.known[key] = logits_TV.clone()
        return logits_TV


@torch.no_grad()
def evaluate_models(model: Any, base: Any, windows_WT: Tensor, plan: CachePlan) -> Evaluation:
    """The same for loaded models and token windows [windows, tokens]. `base`: the original, or its Predictions."""
    base = base if isinstance(base, Predictions) else Predictions(base)
    check_vocabularies(model, base.model)
    per_window = torch.stack(
        [
            compare_tokens(logits[:-1], base(window), window[1:].to(base.model.device)).mean(0)
            for window, logits in _folded_logits(model, windows_WT, plan)
        ]
    )
    loss, base_loss, kl, agreement = per_window.mean(0).tolist()
    change = per_window[:, 0] - per_window[:, 1]
    stderr = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else math.nan
    return Evaluation(
        loss=loss,
        perplexity=perplexity_of(loss),
        base_loss=base_loss,
        base_perplexity=perplexity_of(base_loss),
        kl=kl,
        top1_agreement=agreement,
        kv_budget=plan.kv_budget,
        kv_bytes_per_token=plan.kv_bytes_per_token(),
        base_kv_bytes_per_token=plan.source_kv_bytes_per_token(),
        tokens=windows_WT.shape[0] * (windows_WT.shape[1] - 1),
        loss_change_stderr=stderr,
    )


def perplexity_of(loss: float) -> float:
    """e^loss, infinite beyond the largest number; nan of nan."""
    return math.inf if loss > 700 else math.exp(loss)


def _folded_logits(model: Any, windows_WT: Tensor, plan: CachePlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Every window with its logits [T, vocabulary].

    Where the last tokens are seen exactly and only earlier ones as the cache has them, a window in one step would not show
    what decoding loses: then its tokens come one by one, many windows at once.
    """
    if not plan.depends_on_steps:
        for window in track(windows_WT, "evaluating", len(windows_WT)):
            yield window, model(window[None].to(model.device), use_cache=False).logits[0]
        return
    rows = max(ELEMENTS_AT_ONCE // (windows_WT.shape[1] * model.config.get_text_config().vocab_size), 1)
    for part in track(windows_WT.split(rows), "evaluating token by token", -(-len(windows_WT) // rows)):
        yield from zip(part, logits_step_by_step(model, part.to(model.device), plan), strict=True)


def logits_step_by_step(model: Any, tokens_BT: Tensor, plan: CachePlan) -> Tensor:
    """[B, T, vocabulary]: what decoding predicts, one token at a time."""
    cache = FoldedCache(plan)
    steps = [model(step, past_key_values=cache, use_cache=True).logits for step in tokens_BT.split(1, dim=1)]
    return torch.cat(steps, dim=1)


def compare_tokens(logits_TV: Tensor, base_logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """[T, 4] of every predicted token, in float64: loss, base loss, KL and top-1 agreement (1 or 0)."""
    positions = max(ELEMENTS_AT_ONCE // base_logits_TV.shape[1], 1)
    parts = (x.split(positions) for x in (logits_TV.to(base_logits_TV.device), base_logits_TV, targets_T))
    found = []
    for part, base_part, targets in zip(*parts, strict=True):
        log_p, base_log_p = part.double().log_softmax(-1), base_part.double().log_softmax(-1)
        losses = [F.nll_loss(log, targets, reduction="none") for log in (log_p, base_log_p)]
        kl = F.kl_div(log_p, base_log_p, log_target=True, reduction="none").sum(-1)
        agree = (part.argmax(-1) == base_part.argmax(-1)).double()
        found.append(torch.stack([*losses, kl, agree], dim=1).cpu())
    return torch.cat(found)
