"""Whether a model still finds what stands far back in its cache: recall of a passage by length and depth.

Perplexity hides such damage, since few tokens of a text depend on distant ones. Here a passage (key, then value) stands once
somewhere in a long context that ends with the key again; a model that looks back continues with the value. The same context
without the passage is the control. Everything goes through the cache: the context before the last key in one step, then one
token at a time, as in decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold import data
from kvfold.errors import DataError, RecipeError
from kvfold.evaluation import NUMBERS_AT_ONCE, load_pair
from kvfold.loading import default_seq_len, warn_if_too_long
from kvfold.progress import track
from kvfold.uncertainty import defined, ratio, ratio_stderr, stderr

KEY = 16
VALUE = 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST_LENGTH = 4 * (KEY + VALUE)
FOUND = 0.1
"""A model recalls where it predicts at least so much more of the value's tokens with the passage than without it."""
TOKENS_AT_ONCE = 2**14
"""Cached tokens of all rows that run together."""


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
    """Recall of a folded model and its original at every length and depth; `trials` passages each.

    Without lengths: a quarter, half and all of the model's context, at most 2,048. Contexts and passages are random tokens,
    or, with a `filler` text, stretches of it. Raises RecipeError on lengths below LEAST_LENGTH, DataError on a short text.
    """
    if too_short := [length for length in lengths if length < LEAST_LENGTH]:
        raise RecipeError(
            f"--recall {too_short[0]} leaves no room for passages; give lengths of {LEAST_LENGTH} or more."
        )
    model, base = load_pair(folded, against, dtype=dtype, device=device)
    config = base.model.config.to_dict()
    whole = default_seq_len(config)
    lengths = list(lengths) or [n for n in (whole // 4, whole // 2, whole) if n >= LEAST_LENGTH]
    warn_if_too_long(max(lengths), config)
    special = set(base.tokenizer.all_special_ids)
    allowed = torch.tensor([token for token in range(base.model.config.vocab_size) if token not in special])
    text = None if filler is None else _tokens(base.tokenizer, filler)
    found = []
    for length in track(lengths, "recalling", len(lengths)):
        generator = torch.Generator().manual_seed(seed)
        fill_BT = _draw(allowed, text, length, trials, generator)
        passage_BP = _draw(allowed, text, KEY + VALUE, trials, generator)
        found += recall_at(model.model, base.model, fill_BT, passage_BP)
    return found


def recall_at(model: Any, base: Any, fill_BT: Tensor, passage_BP: Tensor) -> list[Recall]:
    """The same for loaded models at every depth, for contexts and passages [trials, tokens] of one length."""
    contexts = [without_passage(fill_BT, passage_BP)] + [hide(fill_BT, passage_BP, depth=depth) for depth in DEPTHS]
    values = passage_BP[:, KEY:].repeat(len(contexts), 1)
    measured_XB5 = _measured(model, base, torch.cat(contexts), values).unflatten(0, (len(contexts), -1))
    return [
        _row(fill_BT.shape[1], depth, measured_XB5[0], one) for depth, one in zip(DEPTHS, measured_XB5[1:], strict=True)
    ]


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


def without_passage(fill_BT: Tensor, passage_BP: Tensor) -> Tensor:
    """[B, T - VALUE]: the filler, ending in the key."""
    return torch.cat([fill_BT[:, : -KEY - VALUE], passage_BP[:, :KEY]], dim=1)


def hide(fill_BT: Tensor, passage_BP: Tensor, *, depth: float) -> Tensor:
    """The same with the passage written over the filler at `depth`, so that everything else keeps its position."""
    context_BS = without_passage(fill_BT, passage_BP)
    start = round(depth * (context_BS.shape[1] - KEY - passage_BP.shape[1]))
    context_BS[:, start : start + passage_BP.shape[1]] = passage_BP
    return context_BS


def _measured(model: Any, base: Any, context_BS: Tensor, value_BV: Tensor) -> Tensor:
    """[B, 5]: accuracy, the original's; log-probability of the value, the original's; KL. Means over the value's tokens."""
    rows = min(TOKENS_AT_ONCE // context_BS.shape[1], NUMBERS_AT_ONCE // (VALUE * base.config.vocab_size))
    parts = []
    for context, value in zip(*(x.split(max(rows, 1)) for x in (context_BS, value_BV)), strict=True):
        logs, base_logs = (value_log_probs(which, context, value) for which in (model, base))
        hits = [(log.argmax(-1) == value).double() for log in (logs, base_logs)]
        likely = [log.gather(-1, value[..., None]).squeeze(-1) for log in (logs, base_logs)]
        kl = F.kl_div(logs, base_logs, log_target=True, reduction="none").sum(-1)
        parts.append(torch.stack([x.mean(1) for x in (*hits, *likely, kl)], dim=1))
    return torch.cat(parts)


@torch.no_grad()
def value_log_probs(model: Any, context_BS: Tensor, value_BV: Tensor) -> Tensor:
    """[B, V, vocabulary] in float64: predictions of every token of the value after the context and the ones before it."""
    context_BS, value_BV = context_BS.to(model.device), value_BV.to(model.device)
    # the prompt ends before the key: what is looked up must come out of the cache, not out of the step that filled it
    out = model(context_BS[:, :-KEY], use_cache=True, logits_to_keep=1)
    logs = []
    for token in torch.cat([context_BS[:, -KEY:], value_BV[:, :-1]], dim=1).split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        logs.append(out.logits[:, -1].double().log_softmax(-1).cpu())
    return torch.stack(logs[KEY - 1 :], dim=1)


def _draw(allowed: Tensor, text: Tensor | None, length: int, trials: int, generator: torch.Generator) -> Tensor:
    """[trials, length]: random tokens, or stretches of the text from random places."""
    if text is None:
        return allowed[torch.randint(len(allowed), (trials, length), generator=generator)]
    if len(text) < 2 * length:
        raise DataError(f"the text has {len(text)} tokens; --recall {length} needs at least {2 * length} to draw from.")
    starts = torch.randint(len(text) - length, (trials,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()])


def _tokens(tokenizer: Any, path: str | Path) -> Tensor:
    limit = 2**18  # enough to draw from
    return data.first_windows(tokenizer, path, seq_len=limit, max_tokens=limit)[0]
