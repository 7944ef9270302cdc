"""Text into sequences of tokens: from a file, from a data set, or sampled by the model itself."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kvfold.errors import DataError
from kvfold.progress import say_if_long, track


def _zstandard(path: Path, mode: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path} is compressed by zstd; reading it needs a package: pip install zstandard") from error
    return zstandard.open(path, mode)


CHARS_PER_TOKEN = 10
"""More than a token of any usual text takes, so that a slice of text is rarely too short."""

LEAST_TOKENS = 32
"""Fewer say nothing of a model."""

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": _zstandard}
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip
"""What files of other encodings begin with; the first two begin with the next ones."""
UNREADABLE = 1 / 1000
"""Of the characters of a text at most, before it is taken for something else."""
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SAMPLE_BATCH = 32
MARK = "kvfold-mark"
"""Stands for the words of a user."""


def sequences(
    tokenizer: Any,
    data: str,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
) -> Tensor:
    """[num_samples, seq_len] token ids, drawn without overlap from all over the text.

    Fewer sequences, with a warning, where the text is short; DataError where it is shorter than one.
    """
    enough = num_samples * seq_len * CHARS_PER_TOKEN
    text = read_text(
        data, enough, seed, config=config, split=split, field=text_field, separator=tokenizer.eos_token or "\n\n"
    )
    rng = random.Random(seed)
    # One draw per equal part of the text: sequences never overlap, and the whole text is seen.
    part = max(len(text) // num_samples, 1)
    drawn = [_draw(tokenizer, text[i * part : (i + 1) * part], seq_len, rng) for i in range(num_samples)]
    rows = [row for row in drawn if row is not None]
    if len(rows) < num_samples:
        ids = tokenizer(text[: enough * 2])["input_ids"]
        rows = [ids[i : i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)][:num_samples]
        if not rows:
            raise DataError(
                f"{data} holds {len(ids)} tokens, fewer than one sequence of {seq_len}. Give more text or a smaller"
                " --seq-len."
            )
        if len(rows) < num_samples:
            warnings.warn(f"{data} holds only {len(rows)} sequences of {seq_len} tokens; {num_samples} were asked for.")
    return torch.tensor(rows)


def first_windows(tokenizer: Any, path: str | Path, *, seq_len: int, max_tokens: int | None) -> Tensor:
    """[windows, seq_len]: a text cut from its beginning, for evaluation. An incomplete last window is left out.

    One shorter window where the text or `max_tokens` is shorter than `seq_len`; DataError below two tokens.
    """
    limit = None if max_tokens is None else max_tokens * CHARS_PER_TOKEN
    text = read_text(str(path), limit, 0, separator=tokenizer.eos_token or "\n\n")
    ids = tokenizer(text[:limit])["input_ids"]
    if max_tokens is not None and len(ids) < max_tokens:
        ids = tokenizer(text)["input_ids"]
    ids = ids[:max_tokens]
    seq_len, of = min(seq_len, len(ids)), "" if max_tokens is None else f" (--max-tokens {max_tokens})"
    if seq_len < 2:
        raise DataError(f"{path} gives {len(ids)} tokens{of}; nothing can be predicted. Give more text.")
    if len(ids) < LEAST_TOKENS:
        warnings.warn(f"{path} gives {len(ids)} tokens{of}: what is measured on so few says little.")
    count = len(ids) // seq_len
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def most_diverse(tokens_PT: Tensor, num_samples: int) -> Tensor:
    """Of P sequences those whose words differ most: each next one is the farthest from all that were taken.

    A sequence is the vector of its token counts, rare tokens weighing more (tf-idf), of length one.
    """
    counts_PV = torch.zeros(len(tokens_PT), int(tokens_PT.max()) + 1).scatter_add_(
        1, tokens_PT, torch.ones(tokens_PT.shape)
    )
    rarity_V = torch.log(len(tokens_PT) / (counts_PV > 0).sum(0).clamp_min(1))
    vectors_PV = torch.nn.functional.normalize(counts_PV.sqrt() * rarity_V)
    taken, nearest_P = [0], vectors_PV @ vectors_PV[0]
    while len(taken) < min(num_samples, len(tokens_PT)):
        nearest_P[taken] = float("inf")
        taken.append(int(nearest_P.argmin()))
        nearest_P = torch.maximum(nearest_P, vectors_PV @ vectors_PV[taken[-1]])
    return tokens_PT[sorted(taken)]


@torch.no_grad()
def sample_from_model(
    model: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    chat: Sequence[int] = (),
    new_cache: Callable[[], Any] = lambda: None,
) -> Tensor:
    """[num_samples, seq_len] tokens that the model itself draws (temperature 1) after its begin-of-text token.

    chat: tokens that open a conversation; every second batch goes on from there, since that is what the model will serve.
    new_cache: an empty cache for one batch, or None for the model's own kind, which copies all tokens at every step.
    """
    model.generation_config = GenerationConfig()  # its own would bend its distribution: penalties, top-p and the like
    torch.manual_seed(seed)
    rows = min(SAMPLE_BATCH, -(-num_samples // 2)) if chat else SAMPLE_BATCH
    batches = torch.arange(num_samples).split(rows)
    sampled = []
    for number, batch in enumerate(track(batches, "sampling text", len(batches))):
        opening = torch.tensor([chat]).repeat(len(batch), 1) if chat and number % 2 else _beginning(model, len(batch))
        with say_if_long("sampling calibration text", 0 if number else len(batches)):
            sampled.append(_continued(model, opening.to(model.device), seq_len, new_cache()))
    return torch.cat(sampled)


def _beginning(model: Any, rows: int) -> Tensor:
    """[rows, 1]: the begin-of-text token, or any where there is none."""
    config = model.config.get_text_config(decoder=True)
    start = next((t for t in (config.bos_token_id, config.eos_token_id) if isinstance(t, int)), None)
    return torch.randint(config.vocab_size, (rows, 1)) if start is None else torch.full((rows, 1), start)


def _continued(model: Any, opening_BT: Tensor, seq_len: int, cache: Any) -> Tensor:
    """[B, seq_len]: end-of-text tokens do not end it."""
    new = seq_len - opening_BT.shape[1]
    if new <= 0:
        return opening_BT[:, :seq_len].cpu()
    mask = torch.ones_like(opening_BT)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    options |= {} if cache is None else {"past_key_values": cache}
    return model.generate(opening_BT, attention_mask=mask, **options).cpu()


def chat_opening(tokenizer: Any) -> list[int]:
    """What stands before the first words of a user in the tokenizer's chat template; nothing where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    except Exception as error:  # templates are programs, and may refuse this for any reason
        warnings.warn(f"the chat template cannot be used for calibration text: {error}")
        return []
    before, found, _ = chat.partition(MARK)
    return tokenizer(before, add_special_tokens=False)["input_ids"] if found else []


def _draw(tokenizer: Any, text: str, seq_len: int, rng: random.Random) -> list[int] | None:
    """`seq_len` tokens from a random place of `text` that begins with a word, or None where it is too short."""
    start = rng.randrange(max(len(text) - seq_len * CHARS_PER_TOKEN, 0) + 1)
    space = text.find(" ", start) + 1 if start else 0
    ids = tokenizer(text[space : space + seq_len * CHARS_PER_TOKEN])["input_ids"]
    return ids[:seq_len] if len(ids) >= seq_len else None


def read_text(
    data: str,
    enough: int | None,
    seed: int,
    *,
    separator: str,
    config: str | None = None,
    split: str = "train",
    field: str = "text",
) -> str:
    """A file as one text, or so many rows of a table or data set that there are twice `enough` characters, with `separator`
    between them. Raises DataError where it cannot be read."""
    path = Path(data)
    if path.is_dir():
        raise DataError(f"{data} is a folder; give a .txt, .jsonl or .parquet file, or a data set name.")
    packed = path.suffix.lower() in OPENERS
    inner = (path.with_suffix("") if packed else path).suffix.lower()
    if path.is_file() and inner not in TABLES:
        opener = OPENERS[path.suffix.lower()] if packed else open
        try:
            with opener(path, "rb") as file:
                return _decoded(data, file.read())
        except (OSError, lzma.LZMAError, EOFError) as error:
            raise DataError(f"{data} cannot be read: {error}") from error
    if not path.is_file() and (path.suffix in (*OPENERS, *TABLES, ".txt") or data.startswith((".", "/"))):
        raise DataError(f"{data} does not exist. Give a .txt, .jsonl or .parquet file, a data set name, or `self`.")
    return separator.join(_documents(data, path.is_file() and TABLES[inner], enough, seed, config, split, field))


def _decoded(data: str, content: bytes) -> str:
    """A text of UTF-8, or of what its first bytes say. Raises DataError where too much of it is no text."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    text = content.decode(encoding, errors="replace")
    unreadable = text.count("\ufffd") + text.count("\0")
    if unreadable > len(text) * UNREADABLE:
        raise DataError(
            f"{data} is no text in UTF-8: {unreadable:,} of its {len(text):,} characters cannot be read. Unpack an archive;"
            " convert other encodings (iconv -f LATIN1 -t UTF-8 FILE, for example)."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(
    data: str, table: str | bool, enough: int | None, seed: int, config: str | None, split: str, field: str
) -> Iterator[str]:
    from datasets import load_dataset

    try:
        if table:
            rows = load_dataset(str(table), data_files=data, split="train", streaming=True)
        else:
            rows = load_dataset(data, config, split=split, streaming=True)
            rows = rows.shuffle(seed=seed, buffer_size=1000)
        length = 0
        for row in rows:
            if field not in row:
                raise DataError(
                    f"{data} has the fields {sorted(row)}, no {field!r}; rename it, or say"
                    " --set calibration.text_field=NAME to compress."
                )
            if not isinstance(row[field], str):
                raise DataError(
                    f"{data}: field {field!r} of a row holds {row[field]!r}, which is no text; leave such rows out."
                )
            yield row[field]
            length += len(row[field])
            if enough is not None and length > 2 * enough:
                return
    except DataError:
        raise
    except Exception as error:  # datasets raises what its many loaders raise
        raise DataError(
            f"{data} is no local file and cannot be loaded as a data set: {type(error).__name__}: {str(error)[:300]}"
        ) from error
