"""Text into rows of tokens to train on: documents are packed side by side, and never see each other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvfold.calibration.text import CHARS_PER_TOKEN, read_text
from kvfold.errors import DataError

IGNORED = -100
"""Label of a token that nothing predicts: the first of a document, padding."""
OPEN_ROWS = 64
"""Rows that still take short documents."""


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Tensor]]):
    """Packed rows: input_ids, labels [rows, T]; position_ids, which begin again with every document, and attention_mask, each
    None where a row does without."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
        row |= {"attention_mask": self.attention_mask}
        found = {name: tensor[index].long() for name, tensor in row.items() if tensor is not None}
        return found | {"row": torch.tensor(index)}


def predicted(labels_BT: Tensor) -> int:
    """Tokens that count in the loss."""
    return int((labels_BT[:, 1:] != IGNORED).sum())


def pack(
    tokenizer: Any, data: str, *, seq_len: int, max_tokens: int, seed: int, cross: bool = False, together: bool = True
) -> Rows:
    """Rows of `seq_len` tokens from a text of at least `max_tokens` tokens, or of all it has.

    Documents end with the tokenizer's end-of-text token, at which a text file is cut. cross: rows are cut from one stream, in
    which documents see what stands before them, as most pretraining does. together: several documents share a row; False for
    families whose masks cannot keep them apart, which get one piece per row and padding.
    Raises DataError where the text is shorter than one row.
    """
    if cross:
        stream = [token for document in _tokens(tokenizer, data, max_tokens, seed) for token in document]
        rows = [[stream[i : i + seq_len]] for i in range(0, len(stream) - seq_len + 1, seq_len)]
    else:
        pieces = [
            document[i : i + seq_len]
            for document in _tokens(tokenizer, data, max_tokens, seed)
            for i in range(0, len(document), seq_len)
        ]
        rows = _fill([piece for piece in pieces if len(piece) > 1], seq_len if together else 0)
    rows = rows[: max(max_tokens // seq_len, 1)]
    if not rows:
        raise DataError(f"{data} holds less than one row of {seq_len} tokens. Give more text, or a smaller --seq-len.")
    random.Random(seed).shuffle(rows)
    return _tensors(rows, seq_len, tokenizer, positions=together and not cross, masked=not together)


def _tokens(tokenizer: Any, data: str, max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Documents as tokens with an end each, until there are enough."""
    end, count = tokenizer.eos_token, 0
    text = read_text(data, max_tokens * CHARS_PER_TOKEN, seed, separator=end or "\n\n")
    for document in text.split(end) if end else [text]:
        if not document.strip():
            continue
        document = document[: max_tokens * CHARS_PER_TOKEN]  # a text without ends is one document
        tokens = tokenizer(document)["input_ids"] + ([tokenizer.eos_token_id] if end else [])
        yield tokens
        count += len(tokens)
        if count >= max_tokens:
            return


def _fill(pieces: list[list[int]], seq_len: int) -> list[list[list[int]]]:
    """Pieces side by side in rows of at most `seq_len` tokens: each goes into the fullest open row that takes it."""
    rows: list[list[list[int]]] = []
    open_rows: list[tuple[int, list[list[int]]]] = []
    for piece in pieces:
        fitting = [(room, row) for room, row in open_rows if room >= len(piece)]
        if fitting:
            chosen = min(fitting, key=lambda entry: entry[0])
            open_rows.remove(chosen)
            room, row = chosen
            row.append(piece)
        else:
            room, row = seq_len, [piece]
            rows.append(row)
        if room - len(piece) > 1:
            open_rows = [*open_rows, (room - len(piece), row)][-OPEN_ROWS:]
    return rows


def _tensors(rows: list[list[list[int]]], seq_len: int, tokenizer: Any, *, positions: bool, masked: bool) -> Rows:
    shape = (len(rows), seq_len)
    padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    input_ids = torch.full(shape, padding, dtype=torch.int32)
    labels = torch.full(shape, IGNORED, dtype=torch.int32)
    position_ids, mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    for index, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            here = slice(at, at + len(piece))
            input_ids[index, here] = torch.tensor(piece, dtype=torch.int32)
            labels[index, here] = input_ids[index, here]
            labels[index, at] = IGNORED
            position_ids[index, here] = torch.arange(len(piece), dtype=torch.int32)
            mask[index, here], at = 1, at + len(piece)
        position_ids[index, at:] = torch.arange(seq_len - at, dtype=torch.int32)
    return Rows(input_ids, labels, position_ids if positions else None, mask if masked else None)
