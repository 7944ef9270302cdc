"""The nouns of one cache: what the original stores per layer, and what a folded layer stores instead."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from kvfold.plan.number_format import NumberFormat, StoredShape
from kvfold.plan.reading import Reading
from kvfold.plan.token_runs import ADDED_BYTES, COLUMN_BYTES, WORTH_BYTES, TokenRun, TokenRuns

CACHE_BLOCK = 256
"""Tokens by which a cache grows. Part of the format, since allocated bytes follow from it."""


RUN_BLOCK = 32
"""The same of heads that drop tokens, of which some keep hardly more."""


POSITION_BYTES = 4
"""A token's position, where keys are rotated on read."""


ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number, by the name that config.json uses."""


@dataclass(frozen=True, kw_only=True)
class SourceLayer:
    """What one layer of the original model caches, under stock transformers.

    `window` is the sliding window in tokens, None where a layer sees everything; `position_axes` the positions of one token
    (a time, a row and a column of images).
    """

    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    position_axes: int = 1

    @property
    def elements_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim

    def tokens_stored(self, context_len: int) -> int:
        """Tokens that a stock DynamicCache holds after `context_len` tokens (a window keeps one fewer than its width)."""
        return context_len if self.window is None else min(context_len, self.window - 1)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What one owning layer stores for each token.

    Keys are `num_kv_heads` heads of `head_dim` numbers, values `num_v_heads` heads of `v_head_dim` numbers.
    `rope`: `applied` stores keys as they are after rotation; `on_read` before it, and every step rotates what it reads;
    `none`: the family does not rotate, so that projections of keys are part of the ordinary weights.
    `fast_pairs`: with `on_read`, so many pairs of each head, those that turn fastest, are stored after rotation all the same,
    and a step rotates the others only: their angles hardly differ between neighbouring tokens, so that queries can be turned
    instead of keys, once for many tokens.
    `readers_rotate`: whether the layers that read this cache see rotated keys, as its owner does (only published MLKV weights
    do not; such a cache stores its keys before rotation).
    `joint`: what is stored is made of the keys and values of ALL layers that use this cache, after they have run; so tokens
    of the running step are seen exactly, and only past tokens through the latents.
    `shared_latent`: keys and values are rebuilt from one latent, which is stored once, as keys (multi-head latent attention,
    arXiv 2405.04434): the value fields repeat those of keys, and values store nothing.
    `k_projection`: keys go through `k_a_proj` before they are stored, `k_b_proj` leads back to the source's heads.
    `k_partial`: of heads that are rotated in part, k_proj gives the rotated numbers alone, which pass `k_a_proj`; what the
    rest adds to the latents comes from `k_u_proj` at once.
    `k_offset`: a fixed vector is added to keys that are rebuilt on read, before they are rotated.
    `hidden`: width of the hidden layer of small networks that are added to the linear ways in and back, of keys and values;
    both are then rebuilt on read. 0 for none.
    `v_projection`: the way back to the source's value heads is kept apart (`v_b_proj`) instead of being fused into `o_proj`.
    `output_bias`: the fold added a bias to `o_proj` that the source does not have.
    `k_bits`, `v_bits`: how stored numbers are quantized; None keeps them in the checkpoint's dtype.
    `stored_bias`: what makes stored keys and values has a bias that the source does not have (numbers are quantized around
    their mean).
    `tokens`: which tokens stay, head by head; None for all that the source keeps.
    `reading`: which of them a decode step reads; None for all.
    `recent`: so many of the newest tokens are read in a finer form, which is kept beside the other: heads of
    `recent_head_dim` and `v_recent_head_dim` numbers of their own, in `k_recent_bits` and `v_recent_bits`; 0 where it is the
    same numbers in those formats. A query sees a token finely if fewer than `recent` tokens lie between, whatever the steps
    in which they came.
    `predicted_from`: layers below, of whose stored numbers, `predictors` per token, a linear map says part of this layer's
    keys and values: only the rest is stored, and who reads this cache reads theirs too. `recent_predictors`: the numbers of
    recent tokens in the finer form of those layers, which say the same of the finer form here. `leading`, `recent_leading`:
    of each of those layers the first so many numbers do so, 0 for all.
    """

    num_kv_heads: int
    head_dim: int
    num_v_heads: int
    v_head_dim: int
    rope: str = "applied"
    fast_pairs: int = 0
    readers_rotate: bool = True
    joint: bool = False
    shared_latent: bool = False
    k_projection: bool = False
    k_partial: bool = False
    k_offset: bool = False
    hidden: int = 0
    v_projection: bool = False
    output_bias: bool = False
    k_bits: NumberFormat | None = None
    v_bits: NumberFormat | None = None
    stored_bias: bool = False
    window: int | None = None
    tokens: TokenRuns | None = None
    reading: Reading | None = None
    recent: int = 0
    recent_head_dim: int = 0
    v_recent_head_dim: int = 0
    k_recent_bits: NumberFormat | None = None
    v_recent_bits: NumberFormat | None = None
    predicted_from: tuple[int, ...] = ()
    predictors: int = 0
    recent_predictors: int = 0
    leading: int = 0
    recent_leading: int = 0

    @property
    def made_widths(self) -> tuple[int, int]:
        """Numbers of a head of keys and of values as they are made: first those of `sides`, then those of recent tokens."""
        return self.head_dim + self.recent_head_dim, self.v_head_dim + self.v_recent_head_dim

    @property
    def read_widths(self) -> tuple[int, int]:
        """The same as keys and values are read: with the predictors of each form behind it."""
        beside = self.predictors + self.recent_predictors
        return self.made_widths[0] + beside, self.made_widths[1] + beside

    @property
    def recent_sides(self) -> tuple[StoredShape, StoredShape]:
        """The same as `sides` for recent tokens."""
        return self.of_recent.sides

    @functools.cached_property
    def of_recent(self) -> CacheSpec:
        """A cache of nothing but the finer form of recent tokens."""
        return dataclasses.replace(
            self.of_all,
            head_dim=self.recent_head_dim or self.head_dim,
            v_head_dim=self.v_recent_head_dim or self.v_head_dim,
            k_bits=self.k_recent_bits,
            v_bits=self.v_recent_bits,
            predictors=self.recent_predictors,
            leading=self.recent_leading,
        )

    @functools.cached_property
    def of_all(self) -> CacheSpec:
        """The same cache without a finer form of recent tokens."""
        none = {"recent_head_dim": 0, "v_recent_head_dim": 0, "k_recent_bits": None, "v_recent_bits": None}
        none |= {"recent_predictors": 0, "recent_leading": 0}
        return dataclasses.replace(self, recent=0, **none)  # type: ignore[arg-type]

    @property
    def elements_per_token(self) -> int:
        return sum(side.elements for side in self.sides)

    @property
    def drops_of_layer(self) -> bool:
        """Whether tokens are dropped for all heads of a layer at once, which has one latent, is rotated when it is read, or
        has a finer form of recent tokens."""
        return self.tokens is not None and (self.shared_latent or self.recent > 0 or self.rope == "on_read")

    @functools.cached_property
    def sides(self) -> tuple[StoredShape, StoredShape]:
        """What is stored of keys and of values, which have no heads of their own in a shared latent."""
        return (
            StoredShape(self.num_kv_heads, self.head_dim, self.k_bits),
            StoredShape(0 if self.shared_latent else self.num_v_heads, self.v_head_dim, self.v_bits),
        )

    def predicting(self, width: int) -> int:
        """Of a layer below that stores heads of `width` numbers, how many say something of this one."""
        return min(width, self.leading or width)

    def bytes_of_predictors(self, known: CacheSpec, itemsize: int) -> int:
        """Of one token of a layer below, what is read of it for this one."""
        return known._bytes_of_first(self.predicting(known.head_dim), itemsize)

    @property
    def widest(self) -> int:
        """Numbers per token of the larger side, as it is read."""
        return max(side.elements for side in self.sides) + self.predictors

    def bytes_per_token(self, itemsize: int) -> float:
        """Stored for one token, scales included; what several tokens share is shared out."""
        return sum(side.bytes_per_token(itemsize) for side in self.sides) + self.bytes_beside(itemsize)

    def bytes_beside(self, itemsize: int) -> float:
        """What is stored of a token beside its keys and values."""
        index = self.reading.index_bytes_per_token(self.head_dim, itemsize) if self.reading is not None else 0.0
        return self.num_kv_heads * (self._numbers_of_kept + index)

    @property
    def _numbers_of_kept(self) -> int:
        """Bytes beside each token in every head, where some are dropped: what is added to its scores, what it is said to be
        worth, and its column."""
        if self.tokens is None:
            return 0
        numbers = ADDED_BYTES * self.tokens.matched + WORTH_BYTES * self.tokens.foreseen
        return numbers + COLUMN_BYTES * self.knows_columns

    @property
    def knows_columns(self) -> bool:
        """Whether it is stored where each token stood."""
        return self.tokens is not None and (self.tokens.columns or self.rope == "on_read")

    def index_bytes(self, context_len: int, itemsize: int) -> int:
        """What is stored beside keys and values of so many tokens to choose which are read."""
        if self.reading is None:
            return 0
        return self.num_kv_heads * self.reading.index_bytes(round_up(context_len), self.head_dim, itemsize)

    def bytes_allocated(self, context_len: int, itemsize: int) -> int:
        """Of the storage that `context_len` tokens need."""
        if self.tokens is not None:
            kept = sum(self._bytes_of_run(run, context_len, itemsize) for run in self.tokens.runs)
            return kept + self.recent_bytes(context_len, itemsize)
        tokens = self.tokens_allocated(context_len)
        stored = sum(side.bytes_allocated(tokens, itemsize) for side in self.sides)
        return stored + self.recent_bytes(context_len, itemsize) + self.index_bytes(context_len, itemsize)

    def bytes_read(self, context_len: int, itemsize: int) -> float:
        """Of the stored tokens and what is stored beside them, by one decode step."""
        tokens = min(self.tokens_read(context_len), self.kept(context_len))
        if self.reading is None:
            return self.bytes_per_token(itemsize) * tokens
        chosen, (keys, _) = self.reading.chosen(context_len), self.sides
        whole = sum(side.bytes_per_token(itemsize) for side in self.sides)
        leading = self._bytes_of_first(self.reading.leading, itemsize) * keys.num_heads if self.reading.leading else 0
        return whole * chosen + leading * (context_len - chosen) + self.bytes_beside(itemsize) * context_len

    def _bytes_of_first(self, width: int, itemsize: int) -> int:
        """Of the first numbers of a stored key."""
        return width * itemsize if self.k_bits is None else self.k_bits.bytes_of_first(width)

    def _bytes_of_run(self, run: TokenRun, context_len: int, itemsize: int) -> int:
        tokens = room_for(run, context_len)
        sides = (side._replace(num_heads=len(run.heads)) for side in self.sides if side.num_heads)
        beside = self._numbers_of_kept * len(run.heads) * tokens
        return sum(side.bytes_allocated(tokens, itemsize) for side in sides) + beside

    def recent_bytes(self, context_len: int, itemsize: int) -> int:
        """Of the newest tokens in their finer form."""
        if not self.recent:
            return 0
        tokens = min(context_len, self.recent)
        return sum(side.bytes_allocated(tokens, itemsize) for side in self.recent_sides)

    def tokens_allocated(self, context_len: int) -> int:
        """Tokens for which a cache has room after `context_len` tokens: whole blocks, at most a window and a block more."""
        capacity = round_up(context_len)
        return capacity if self.window is None else min(capacity, round_up(self.window) + CACHE_BLOCK)

    def tokens_read(self, context_len: int) -> int:
        """Tokens that one decode step attends to."""
        return context_len if self.window is None else min(context_len, self.window)

    def kept(self, context_len: int) -> float:
        """Tokens that stay of `context_len`, in the mean over heads; a sliding window of the source is not asked."""
        return context_len if self.tokens is None else self.tokens.kept(context_len)


def room_for(run: TokenRun, context_len: int) -> int:
    """Tokens for which a run of heads has room after `context_len` tokens: whole blocks, and, where some are dropped, a block
    more."""
    if run.keeps_all:
        return round_up(context_len)
    return min(round_up(context_len, RUN_BLOCK), round_up(run.kept(context_len), RUN_BLOCK) + RUN_BLOCK)


def round_up(tokens: int, block: int = CACHE_BLOCK) -> int:
    """`tokens` rounded up to whole blocks."""
    return -(-tokens // block) * block


def divisors(number: int) -> list[int]:
    """All whole numbers that divide `number`, in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]
