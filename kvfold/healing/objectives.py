"""What healing minimises: cross-entropy, distillation from the original's logits, or matching its layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvfold.healing.packing import IGNORED
from kvfold.runtimes.transformers.attention import FoldedAttention

Inputs = Mapping[str, Tensor]
Parts = dict[str, Tensor]
"""Name -> a mean over the tokens of the batch, in nats (or a share, for layers)."""

Objective = Callable[[Any, Inputs], Parts]
"""(model, inputs) -> its parts, of which `loss` is minimised."""

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask")


def logits_of(model: Any, inputs: Inputs) -> Tensor:
    """Predictions [B, T, vocabulary] without a cache."""
    return model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, use_cache=False).logits


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean loss over the tokens that count."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def distance(logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean KL(teacher || student) over the predictions that count."""
    counted = labels_BT[:, 1:] != IGNORED
    student, teacher = (x[:, :-1][counted].float().log_softmax(-1) for x in (logits_BTV, teacher_BTV))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distance_from_top(logits_BTV: Tensor, ids_BTk: Tensor, log_probs_BTk: Tensor, labels_BT: Tensor) -> Tensor:
    """The same from the teacher's k likeliest tokens; all others count as one, which holds the rest of the probability."""
    counted = labels_BT[:, 1:] != IGNORED
    student = logits_BTV[:, :-1][counted].float().log_softmax(-1).gather(-1, ids_BTk[:, :-1][counted].long())
    teacher = log_probs_BTk[:, :-1][counted].float()
    rest = [_log_rest(x) for x in (student, teacher)]
    kl = (teacher.exp() * (teacher - student)).sum(-1) + rest[1].exp() * (rest[1] - rest[0])
    return kl.mean()


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum of probabilities), away from minus infinity."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp_max(1 - 1e-6))


class CrossEntropy:
    """Uptraining: the next token of the text."""

    def __call__(self, model: Any, inputs: Inputs) -> Parts:
        loss = cross_entropy(logits_of(model, inputs), inputs["labels"])
        return {"loss": loss, "ce": loss.detach()}


class Distillation:
    """alpha * KL to the teacher's distribution + beta * cross-entropy.

    teacher: the frozen original, or what its logits were kept as (`TeacherLogits`), which answers by the number of the row;
    eval_teacher: the same for the rows of the evaluation.
    """

    def __init__(self, teacher: Any, eval_teacher: Any, alpha: float, beta: float) -> None:
        self.teacher, self.eval_teacher, self.alpha, self.beta = teacher, eval_teacher, alpha, beta

    def __call__(self, model: Any, inputs: Inputs) -> Parts:
        logits = logits_of(model, inputs)
        kl = self._kl(logits, inputs, self.teacher if model.training else self.eval_teacher)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.beta != 0):
            ce = cross_entropy(logits, inputs["labels"])
        loss = self.alpha * kl + self.beta * ce if self.beta else self.alpha * kl
        return {"loss": loss, "kl": kl.detach(), "ce": ce.detach()}

    def _kl(self, logits: Tensor, inputs: Inputs, teacher: Any) -> Tensor:
        if not isinstance(teacher, nn.Module):
            ids, log_probs = teacher.of(inputs["row"])
            return distance_from_top(logits, ids.to(logits.device), log_probs.to(logits.device), inputs["labels"])
        with torch.no_grad():
            teacher_logits = logits_of(teacher, inputs)
        return distance(logits, teacher_logits, inputs["labels"])


class LayerMatch:
    """Every attention layer on its own: given what the original's layer was given, it should answer what that answered.

    The loss is the mean over layers of |answer - original's|^2 / |original's|^2. Errors of earlier layers do not disturb
    later ones, which makes it a good start where a model is far from the original.
    """

    def __init__(self, teacher: Any, teacher_layers: list[nn.Module]) -> None:
        self.teacher, self.teacher_layers = teacher, teacher_layers

    def __call__(self, model: Any, inputs: Inputs) -> Parts:
        with torch.no_grad():
            asked, answered = _watch(self.teacher_layers, lambda: logits_of(self.teacher, inputs))
        counted = (inputs["labels"] != IGNORED)[..., None]
        layers = [module for module in model.modules() if isinstance(module, FoldedAttention)]
        _, found = _watch(layers, lambda: logits_of(model, inputs), given=asked)
        pairs = zip(found, answered, strict=True)
        errors = [(((a - b) * counted).square().sum() / (b * counted).square().sum()).float() for a, b in pairs]
        loss = torch.stack(errors).mean()
        return {"loss": loss, "layers": loss.detach()}


def _watch(
    layers: Sequence[nn.Module], run: Callable[[], Any], given: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states that went into each attention layer and what it added to them, while `run` runs; `given` replaces what
    goes in."""
    entered: list[Tensor] = [torch.empty(0)] * len(layers)
    left: list[Tensor] = [torch.empty(0)] * len(layers)

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        entered[index] = hidden
        if given is None:
            return args, kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": given[index]}
        return (given[index], *args[1:]), kwargs

    def after(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        residual = kwargs.get("residual", args[1] if len(args) > 1 else None)  # some layers add it themselves
        left[index] = out[0] if residual is None else out[0] - residual

    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(_bound(before, index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(_bound(after, index), with_kwargs=True))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return entered, left


def _bound(hook: Callable[..., Any], index: int) -> Callable[..., Any]:
    return lambda module, *details: hook(index, *details)
