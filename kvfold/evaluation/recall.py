"""Whether a model still finds what stands far back in its cache: recall of passages by length and depth.

Perplexity hides such distortion, since few tokens of a text depend on distant ones. Here passages (key, then value) stand at
several depths of a long context; asked for a key, a model that looks back continues with its value. The same question asked
of another context is the control. A context fills the cache once, in one step; copies of that cache answer its questions.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.calibration import text as data
from kvfold.checkpoint.source import default_seq_len, warn_if_too_long
from kvfold.errors import DataError, RecipeError
from kvfold.evaluation.standard_errors import defined, ratio, ratio_stderr, stderr
from kvfold.evaluation.texts import ELEMENTS_AT_ONCE, load_pair
from kvfold.plan.plan import CachePlan
from kvfold.progress import say_if_long, track
from kvfold.runtimes.transformers.load import Loaded

KEY = 16
VALUE = 16
PASSAGE = KEY + VALUE
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST_LENGTH = (len(DEPTHS) + 1) * PASSAGE
"""Passages side by side, and a question."""
FILLER_TOKENS = 2**18
"""Of a text, that contexts and passages are drawn from."""
FOUND = 0.1
"""A model recalls where it predicts at least so much more of the value's tokens with the passage than without it."""
TOKENS_AT_ONCE = 2**14
"""Cached tokens of all rows that run together."""
TIMED = 512
"""Tokens that are run to learn how long everything will take."""


@dataclass(frozen=True)
class Recall:
    """Means over `trials` passages at one length (all tokens) and depth (0: the passage comes first, 1: last before the key).

    `accuracy`: share of the value's tokens that are predicted as the likeliest. `gain`: nats per token of the value that the
    passage makes it likelier by. `control`: accuracy without the passage. `base_...`: the original's. `kl`: KL(original ||
    folded) of the predictions of the value, in nats per token. Standard errors are over passages, for `kept` paired.
    """

    length: int
    depth: float
    trials: int
    accuracy: float
    base_accuracy: float
    control: float
    base_control: float
    gain: float
    base_gain: float
    gain_stderr: float
    base_gain_stderr: float
    kept_stderr: float
    kl: float

    @property
    def recalls(self) -> bool:
        """Whether the original recalls here at all; if not, nothing can be lost and `kept` says nothing."""
        return self.base_accuracy - self.base_control >= FOUND

    @property
    def kept(self) -> float:
        """The folded model's gain as a share of the original's."""
        return ratio(self.gain, self.base_gain)

    def to_json(self) -> dict[str, Any]:
        """The fields that scripts rely on; null where a number is not defined."""
        return defined(dataclasses.asdict(self) | {"kept": self.kept, "original_recalls": self.recalls})


def measure_recall(
    folded: str | Path,
    *,
    against: str | Path,
    lengths: Sequence[int] = (),
    filler: str | Path | None = None,
    trials: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> list[Recall]:
    """Recall of a folded model and its original at every length and depth; `trials` contexts each, a passage per depth.

    Without lengths: a quarter, half and all of the model's context, at most 2,048. Contexts and passages are random tokens,
    or, with a `filler` text, stretches of it. Raises RecipeError on lengths below LEAST_LENGTH and on fewer than two trials,
    DataError on a short text.
    """
    check_lengths(lengths, filler)
    if trials < 2:
        raise RecipeError(f"{trials} trials leave no other context to ask as a control; give two or more.")
    model, base = load_pair(folded, against, dtype=dtype, device=device)
    lengths = list(lengths) or _default_lengths(base.model.config.to_dict())
    warn_if_too_long(max(lengths), base.model.config.to_dict())
    drawn = _trials(base, filler, lengths, trials, seed)
    _say_how_long(model.model, base.model, drawn, model.plan)
    return [row for one in drawn for row in recall_at(model.model, base.model, *one, model.plan)]


def recall_at(model: Any, base: Any, fill_BT: Tensor, passage_BDP: Tensor, plan: CachePlan) -> list[Recall]:
    """The same for loaded models, contexts [trials, tokens] of one length and their passages [trials, depths, tokens]."""
    # what another context is asked as a control: the same tokens, so that what a value is likely by itself drops out
    question_BQP = torch.cat([passage_BDP, passage_BDP.roll(-1, dims=0)], dim=1)
    measured_BQ5 = _measured(model, base, hide(fill_BT, passage_BDP), question_BQP, plan)
    found_BD5, control_BD5 = measured_BQ5.chunk(2, dim=1)
    pairs = zip(DEPTHS, control_BD5.roll(1, dims=0).unbind(1), found_BD5.unbind(1), strict=True)
    return [_row(fill_BT.shape[1], depth, control_B5, found_B5) for depth, control_B5, found_B5 in pairs]


def _row(length: int, depth: float, control_B5: Tensor, found_B5: Tensor) -> Recall:
    accuracy, base_accuracy, _, _, kl = found_B5.mean(0).tolist()
    control, base_control, *_ = control_B5.mean(0).tolist()
    gains, base_gains = (found_B5 - control_B5)[:, 2:4].T
    gain, base_gain = gains.mean().item(), base_gains.mean().item()
    top, bottom, change = (stderr(values) for values in (gains, base_gains, gains - base_gains))
    return Recall(
        length=length,
        depth=depth,
        trials=len(found_B5),
        accuracy=accuracy,
        base_accuracy=base_accuracy,
        control=control,
        base_control=base_control,
        gain=gain,
        base_gain=base_gain,
        gain_stderr=top,
        base_gain_stderr=bottom,
        kept_stderr=ratio_stderr(gain, base_gain, top_stderr=top, bottom_stderr=bottom, change_stderr=change),
        kl=kl,
    )


def hide(fill_BT: Tensor, passage_BDP: Tensor) -> Tensor:
    """[B, T - PASSAGE]: the filler with the passages written over it, one at each of DEPTHS; a question has room behind."""
    context_BS = fill_BT[:, :-PASSAGE].clone()
    for depth, passage_BP in zip(DEPTHS, passage_BDP.unbind(1), strict=True):
        start = round(depth * (context_BS.shape[1] - PASSAGE))
        context_BS[:, start : start + PASSAGE] = passage_BP
    return context_BS


def _measured(model: Any, base: Any, context_BS: Tensor, question_BQP: Tensor, plan: CachePlan) -> Tensor:
    """[B, Q, 5], means over the value's tokens: accuracy, the original's; log-probability, the original's; KL."""
    tokens, asked = context_BS.shape[1] + PASSAGE, question_BQP.shape[1]
    rows = max(min(TOKENS_AT_ONCE // tokens, ELEMENTS_AT_ONCE // (VALUE * base.config.get_text_config().vocab_size)), 1)
    contexts = context_BS.split(max(rows // asked, 1))
    pairs = zip(contexts, question_BQP.split(len(contexts[0])), strict=True)
    batches = track(pairs, f"recalling at {tokens:,} tokens", len(contexts))
    return torch.cat([_answers(model, base, *pair, rows, plan) for pair in batches])


def _answers(model: Any, base: Any, context_BS: Tensor, question_BQP: Tensor, rows: int, plan: CachePlan) -> Tensor:
    """The same for contexts that run together; `rows` of questions at a time."""
    caches = [fill_cache(which, context_BS) for which in (model, base)]
    parts = []
    for part_BqP in question_BQP.split(max(rows // len(context_BS), 1), dim=1):
        logs = value_log_probs(model, caches[0], part_BqP, token_by_token=plan.depends_on_steps)
        base_logs = value_log_probs(base, caches[1], part_BqP)
        parts.append(_compared(logs, base_logs.to(logs.device), part_BqP[..., KEY:].to(logs.device)))
    return torch.cat(parts, dim=1)


def _compared(logs: Tensor, base_logs: Tensor, value_BQV: Tensor) -> Tensor:
    """[B, Q, 5] of predictions [B, Q, V, vocabulary] of both models."""
    hits = [(log.argmax(-1) == value_BQV).double() for log in (logs, base_logs)]
    likely = [log.gather(-1, value_BQV[..., None]).squeeze(-1) for log in (logs, base_logs)]
    kl = F.kl_div(logs, base_logs, log_target=True, reduction="none").sum(-1)
    return torch.stack([x.mean(-1) for x in (*hits, *likely, kl)], dim=-1).cpu()


@torch.no_grad()
def fill_cache(model: Any, context_BS: Tensor) -> Any:
    """The cache after these tokens."""
    return model(context_BS.to(model.device), use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def value_log_probs(model: Any, cache: Any, question_BQP: Tensor, *, token_by_token: bool = False) -> Tensor:
    """[B, Q, V, vocabulary] in float64: predictions of every token of the values, for Q questions to each of B contexts.

    `cache` holds the contexts and stays as it is. A question is one step, whose tokens read the passage out of the cache;
    token by token it is read as in decoding, which differs where a cache keeps its last tokens exactly.
    """
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(question_BQP.shape[1])
    logits = last_logits(model, cache, question_BQP[..., :-1].flatten(0, 1), VALUE, token_by_token=token_by_token)
    return logits.double().log_softmax(-1).unflatten(0, question_BQP.shape[:2])


@torch.no_grad()
def last_logits(model: Any, cache: Any, tokens_BT: Tensor, expected: int, *, token_by_token: bool) -> Tensor:
    """[B, expected, vocabulary]: of the last of these tokens, behind what `cache` holds, that come in one step or several."""
    steps = tokens_BT.to(model.device).split(1 if token_by_token else tokens_BT.shape[1], dim=1)
    logits = [model(step, past_key_values=cache, use_cache=True, logits_to_keep=expected).logits for step in steps]
    return torch.cat(logits, dim=1)[:, -expected:]


def _say_how_long(model: Any, base: Any, drawn: Sequence[tuple[Tensor, Tensor]], plan: CachePlan) -> None:
    """From what the beginning of the first context takes; twice, since a first run compiles kernels and asks for memory."""
    context_1S, question_1QP = drawn[0][0][:1, :TIMED], drawn[0][1][:1]
    timed = context_1S.numel() + question_1QP.numel()
    tokens = sum(fill_BT.numel() + 2 * passage_BDP.numel() for fill_BT, passage_BDP in drawn)
    _answers(model, base, context_1S, question_1QP, len(DEPTHS), plan)
    with say_if_long("recall", tokens / timed):
        _answers(model, base, context_1S, question_1QP, len(DEPTHS), plan)


def _default_lengths(config: dict[str, Any]) -> list[int]:
    """A quarter, half and all of the model's context. Raises RecipeError where not even that leaves room."""
    whole = default_seq_len(config)
    if whole < LEAST_LENGTH:
        raise RecipeError(f"the model's context of {whole} tokens leaves no room for passages; give --recall lengths.")
    return [length for length in (whole // 4, whole // 2, whole) if length >= LEAST_LENGTH]


def check_lengths(lengths: Sequence[int], filler: str | Path | None) -> None:
    """Raise, before anything takes long, RecipeError on lengths that leave no room, DataError on those that a text does not
    reach."""
    if too_short := [length for length in lengths if length < LEAST_LENGTH]:
        raise RecipeError(
            f"--recall {too_short[0]} leaves no room for passages; give lengths of {LEAST_LENGTH} or more."
        )
    if filler is not None and max(lengths, default=0) > FILLER_TOKENS // 2:
        raise DataError(
            f"--recall {max(lengths)}: contexts are drawn from the first {FILLER_TOKENS:,} tokens of a text, which takes"
            f" lengths up to {FILLER_TOKENS // 2:,}; longer ones go without --data."
        )


def _trials(
    base: Loaded, filler: str | Path | None, lengths: Sequence[int], trials: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Per length contexts [trials, tokens] and their passages [trials, depths, tokens]."""
    special = set(base.tokenizer.all_special_ids)
    allowed = torch.tensor(
        [token for token in range(base.model.config.get_text_config().vocab_size) if token not in special]
    )
    text = None if filler is None else _tokens(base.tokenizer, filler)
    drawn = []
    for length in lengths:
        generator = torch.Generator().manual_seed(seed)
        fill_BT = _draw(allowed, text, length, trials, generator)
        passages = _draw(allowed, text, PASSAGE, trials * len(DEPTHS), generator)
        drawn.append((fill_BT, passages.unflatten(0, (trials, -1))))
    return drawn


def _draw(allowed: Tensor, text: Tensor | None, length: int, rows: int, generator: torch.Generator) -> Tensor:
    """[rows, length]: random tokens, or stretches of the text from random places."""
    if text is None:
        return allowed[torch.randint(len(allowed), (rows, length), generator=generator)]
    if len(text) < 2 * length:
        raise DataError(f"the text has {len(text)} tokens; --recall {length} needs at least {2 * length} to draw from.")
    starts = torch.randint(len(text) - length, (rows,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()])


def _tokens(tokenizer: Any, path: str | Path) -> Tensor:
    return data.first_windows(tokenizer, path, seq_len=FILLER_TOKENS, max_tokens=FILLER_TOKENS)[0]
