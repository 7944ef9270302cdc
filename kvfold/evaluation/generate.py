"""Continue a prompt with a model folder, and say what its cache took."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvfold.checkpoint.source import warn_if_too_long
from kvfold.errors import DataError, RecipeError
from kvfold.runtimes.transformers.load import load


@dataclass(frozen=True)
class Generation:
    """`cache_bytes` is what the cache object holds at the end, in `dtype`; `seconds` include the prompt."""

    text: str
    new_tokens: int
    seconds: float
    cache_bytes: int
    dtype: str
    kv_budget: float


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> Generation:
    """Continue `prompt`, greedily or by sampling; with `chat` answer it, by the tokenizer's chat template. For longer chats,
    batches and streams use transformers' generate()."""
    if not 0 < temperature < math.inf:
        raise RecipeError(f"temperature is {temperature}; it is a number above 0 (without sampling it says nothing).")
    loaded = load(model, dtype=dtype, device=device)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"chat": chat, "do_sample": sample} | ({"temperature": temperature} if sample else {})
    start = time.perf_counter()
    text, new_tokens, cache = continue_prompt(loaded.model, loaded.tokenizer, prompt, max_new_tokens, **options)
    seconds = time.perf_counter() - start
    used = str(loaded.model.dtype).removeprefix("torch.")
    return Generation(text, new_tokens, seconds, _cache_bytes(cache), used, loaded.plan.kv_budget)


def continue_prompt(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, chat: bool = False, **options: Any
) -> tuple[str, int, Any]:
    """(the new text, its tokens, the cache). Raises DataError on a prompt without tokens, and for a chat without template."""
    inputs = _asked(tokenizer, prompt) if chat else tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise DataError("the prompt is empty; give --prompt TEXT.")
    warn_if_too_long(inputs["input_ids"].shape[1] + max_new_tokens, model.config.to_dict())
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    pad = model.generation_config.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    out = model.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, return_dict_in_generate=True, **options
    )
    # decoded as a whole, since some tokenizers drop the space before the first token they decode
    row, length = out.sequences[0], inputs["input_ids"].shape[1]
    before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (row[:length], row))
    return after[len(before) :], len(row) - length, out.past_key_values


def _asked(tokenizer: Any, prompt: str) -> Any:
    """The prompt as a user's first words."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template: this model continues text; leave out --chat.")
    said = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _cache_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
