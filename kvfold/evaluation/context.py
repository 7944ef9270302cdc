"""What a cache still knows of a long context: its continuation, facts that were said once, passages, pairs.

Perplexity of windows hides what was forgotten, since few tokens of a text depend on distant ones. Here a context fills the
cache once, in one step; copies of that cache are then asked, and no question is known when the context is read.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.calibration import text as data
from kvfold.checkpoint.source import warn_if_too_long
from kvfold.errors import DataError, RecipeError
from kvfold.evaluation.recall import fill_cache, last_logits
from kvfold.evaluation.speed import allocated
from kvfold.evaluation.standard_errors import defined, stderr
from kvfold.evaluation.texts import load_pair
from kvfold.plan.plan import CachePlan
from kvfold.progress import track

KINDS = ("continuation", "needles", "copies", "pairs")
CONTINUATION = 64
"""Tokens of the text itself that are predicted behind the context."""
NAMES = ("Paris", "Berlin", "Madrid", "London", "Vienna", "Dublin", "Boston", "Tokyo", "Cairo", "Oslo", "Lima", "Rome")
PLANTS = ("oak", "fern", "moss", "rose", "pine", "reed", "sage", "lily", "palm", "vine", "corn", "rice")
EACH = 4
"""Needles and pairs of a context."""
DEPTHS = (0.1, 0.35, 0.6, 0.85)
COPIES, COPY_KEY, COPY_VALUE = 3, 6, 16
"""Passages of the context of which the first tokens are asked and the others expected."""
LEAST_CONTEXT = 512
"""Room for everything that is hidden."""


@dataclass(frozen=True)
class Question:
    """Tokens that stand behind the context; the last `expected` of them are to be predicted."""

    kind: str
    tokens: list[int]
    expected: int


@dataclass(frozen=True)
class Sample:
    """One context and what is asked of it."""

    context: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Remembered:
    """Means over the questions of one kind. `accuracy`: share of the expected tokens that are predicted as the likeliest;
    `base_accuracy`: the original's. `kl`: KL(original || folded) in nats per token. Standard errors are over contexts, of
    the change in accuracy paired. `cache_bytes`: of the caches that were asked, in the dtype in which the models ran;
    `kv_share`: allocated, of the original's, in the checkpoint's dtype. `share_read`: of the stored tokens, by a step."""

    kind: str
    context_len: int
    sequences: int
    accuracy: float
    base_accuracy: float
    change_stderr: float
    kl: float
    kl_stderr: float
    cache_bytes: int
    base_cache_bytes: int
    kv_share: float
    share_read: float

    def to_json(self) -> dict[str, Any]:
        """The fields that scripts rely on."""
        return defined(dict(self.__dict__))


def measure_context(
    folded: str | Path,
    *,
    against: str | Path,
    data_file: str | Path,
    lengths: Sequence[int],
    sequences: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> list[Remembered]:
    """What a folded model's cache knows of contexts of each length, beside its original's; contexts are stretches of a text
    with facts in between. Raises RecipeError on lengths below LEAST_CONTEXT, DataError on a short text."""
    model, base = load_pair(folded, against, dtype=dtype, device=device)
    rows = []
    for length in lengths:
        warn_if_too_long(length, base.model.config.to_dict())
        samples = draw_samples(base.tokenizer, data_file, length=length, sequences=sequences, seed=seed)
        expected, found = (ask(one.model, samples, one.path.name) for one in (base, model))
        rows += compared(samples, expected, found, model.plan)
    return rows


def draw_samples(tokenizer: Any, file: str | Path, *, length: int, sequences: int, seed: int = 0) -> list[Sample]:
    """Contexts of `length` tokens from even distances of a text. Raises as `measure_context`."""
    if length < LEAST_CONTEXT:
        raise RecipeError(f"--context {length} leaves no room for what is asked; give {LEAST_CONTEXT} or more.")
    wanted = (length + CONTINUATION) * sequences
    text_T = data.first_windows(tokenizer, file, seq_len=4 * wanted, max_tokens=4 * wanted)[0]
    if len(text_T) < wanted:
        raise DataError(f"{file} has {len(text_T):,} tokens; {sequences} contexts of {length:,} need {wanted:,}.")
    step = (len(text_T) - length - CONTINUATION) // max(sequences - 1, 1)
    stretches = (text_T[i * step : i * step + length + CONTINUATION].tolist() for i in range(sequences))
    return [_sample(tokenizer, stretch, length, random.Random(1000 * seed + i)) for i, stretch in enumerate(stretches)]


def _sample(tokenizer: Any, text: list[int], length: int, rng: random.Random) -> Sample:
    def tokens(words: str) -> list[int]:
        return tokenizer.encode(words, add_special_tokens=False)

    names, plants = rng.sample(NAMES, EACH), rng.sample(PLANTS, EACH)
    codes = ["".join(rng.choice("0123456789") for _ in range(5)) for _ in names]
    owners = rng.sample(NAMES, EACH)
    facts = [f" The secret code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
    facts += [f" {plant}: {owner};" for plant, owner in zip(plants, owners, strict=True)]
    hidden = [tokens(fact) for fact in facts]
    base = text[: length - sum(map(len, hidden))]
    context = _hide(base, hidden)
    questions = [Question("continuation", text[len(base) : len(base) + CONTINUATION], CONTINUATION - 1)]
    for name, code in zip(names, codes, strict=True):
        questions.append(_asked("needles", tokens(f"\n\nThe secret code of {name} is "), tokens(code)))
    for plant, owner in zip(plants, owners, strict=True):
        questions.append(_asked("pairs", tokens(f"\n\n {plant}:"), tokens(f" {owner}")))
    for i in range(COPIES):
        start = int(length * (0.08 + 0.25 * i)) + rng.randrange(40)
        passage = context[start : start + COPY_KEY + COPY_VALUE]
        questions.append(_asked("copies", tokens("\n\n") + passage[:COPY_KEY], passage[COPY_KEY:]))
    return Sample(context, questions)


def _hide(base: list[int], hidden: list[list[int]]) -> list[int]:
    """The hidden tokens at DEPTHS, those of both kinds in turn."""
    cuts, context, at = [int(len(base) * depth) for depth in DEPTHS], [], 0
    for i, cut in enumerate(cuts):
        context += base[at:cut] + hidden[i] + hidden[EACH + i]
        at = cut
    return context + base[at:]


def _asked(kind: str, question: list[int], answer: list[int]) -> Question:
    return Question(kind, question + answer, len(answer))


@dataclass(frozen=True)
class Answers:
    """Log-probabilities [expected, vocabulary] for every question, the bytes of the cache that was asked, and the share of
    its tokens that was read."""

    logs: list[Tensor]
    cache_bytes: int
    share_read: float


def ask(model: Any, samples: Sequence[Sample], name: str) -> list[Answers]:
    """What one model says after every context. name: of the progress bar."""
    return [answers(model, sample) for sample in track(samples, f"asking {name}", len(samples))]


@torch.no_grad()
def answers(model: Any, sample: Sample) -> Answers:
    """What a model says after the context; every question is asked of a copy of its cache, in one step, or, where a step of
    few tokens reads less than all, token by token."""
    cache, logs, read = fill_cache(model, torch.tensor([sample.context])), [], []
    reads_some = hasattr(model, "kv_plan") and model.kv_plan.reads_some
    for question in sample.questions:
        tokens_1T, asked = torch.tensor([question.tokens[:-1]]), copy.deepcopy(cache)
        logits = last_logits(model, asked, tokens_1T, question.expected, token_by_token=reads_some)
        logs.append(logits[0].float().log_softmax(-1).cpu())
        read.append(asked.share_read if reads_some else 1.0)
    return Answers(logs, allocated(cache), statistics.fmean(read))


def compared(
    samples: Sequence[Sample], expected: Sequence[Answers], found: Sequence[Answers], plan: CachePlan
) -> list[Remembered]:
    """A row per kind."""
    rows, length = [], len(samples[0].context)
    for kind in KINDS:
        measured = torch.stack([_of_kind(kind, *three) for three in zip(samples, expected, found, strict=True)])
        accuracy, base_accuracy, kl = measured.mean(0).tolist()
        rows.append(
            Remembered(
                kind=kind,
                context_len=length,
                sequences=len(samples),
                accuracy=accuracy,
                base_accuracy=base_accuracy,
                change_stderr=stderr(measured[:, 0] - measured[:, 1]),
                kl=kl,
                kl_stderr=stderr(measured[:, 2]),
                cache_bytes=found[0].cache_bytes,
                base_cache_bytes=expected[0].cache_bytes,
                kv_share=plan.kv_bytes(length) / plan.source_kv_bytes(length),
                share_read=statistics.fmean(answer.share_read for answer in found),
            )
        )
    return rows


def _of_kind(kind: str, sample: Sample, expected: Answers, found: Answers) -> Tensor:
    """[3]: accuracy, the original's, KL; means over the questions of a kind."""
    parts = []
    for question, base_logs, logs in zip(sample.questions, expected.logs, found.logs, strict=True):
        if question.kind == kind:
            right = torch.tensor(question.tokens[-question.expected :])
            hits = [(log.argmax(-1) == right).double().mean() for log in (logs, base_logs)]
            kl = F.kl_div(logs, base_logs, log_target=True, reduction="none").sum(-1).double().mean()
            parts.append(torch.stack([*hits, kl]))
    return torch.stack(parts).mean(0) if parts else torch.full((3,), math.nan)
