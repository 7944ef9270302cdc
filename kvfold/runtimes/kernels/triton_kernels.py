"""Attention over packed numbers on a GPU by Triton: exponentials of scores block by block, what blocks count beside each
other, and weighted sums of values.

No stored number exists outside the chip. What a step needs of every token, one number per query, does: latents of several
layers side by side are wider than the sums that a program can hold, so that a single pass would have to unpack them several
times. `attention.py` has the obvious versions, `triton_attention.py` launches these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvfold.runtimes.kernels.triton_words import numbers_of, words_at

CHANGING = [
    "tokens", "position", "page_tokens", "pages", "page_stride", "head_stride", "row_stride", "row_bytes", "heads", "queries",
    "steps", "tiers", "q_width", "each", "group_stride", "batch_stride", "tile_stride", "function_stride",
    "turned_tokens", "blocks", "first_block", "aligned", "bias_batch", "bias_head", "bias_step", "youngest", "oldest",
    "tiles", "split", "width", "column", "part_stride",
]  # fmt: skip
"""What differs from step to step or layer to layer: kernels are not to be compiled again for it."""


@triton.jit
def span_of(sequences, sequence, tokens, position, SPANS: tl.constexpr):
    """Of a sequence: the first token, the one behind the last, and where its first query stands."""
    if SPANS:
        at = sequences + sequence * 3
        found = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32), tl.load(at + 2).to(tl.int32)
    else:
        found = tokens * 0, tokens, position
    return found


@triton.jit
def _rows_at(
    rows, tables, sequence, head, token, page_tokens, pages, page_stride, head_stride, row_stride, PAGED: tl.constexpr
):  # fmt: skip
    """Where the rows of these tokens begin. A sequence that lies in one piece is a page."""
    rows += head * head_stride
    if PAGED:
        page = tl.load(tables + sequence * pages + token // page_tokens).to(tl.int64)
        at = page * page_stride + (token % page_tokens).to(tl.int64) * row_stride
    else:
        at = sequence * page_stride + token.to(tl.int64) * row_stride
    return rows + at


@triton.jit
def _scale(row, tier, FLOAT8: tl.constexpr):
    """[TOKENS] of a tier."""
    return tl.full(row.shape, 1.0, tl.float32) if FLOAT8 else tl.exp2((tl.load(row + tier).to(tl.float32) - 128) / 8)


@triton.jit
def _of_shares(x, said, FUNCTIONS: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr):
    """[TOKENS, FUNCTIONS * QUERIES] -> [TOKENS, QUERIES], with what `said` [TOKENS, FUNCTIONS] says of a token."""
    return tl.sum(tl.reshape(x, (TOKENS, FUNCTIONS, QUERIES)) * said[:, :, None], axis=1)


@triton.jit
def _products(
    q, said, row, row_bytes, table, tiers,
    KINDS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    TURNED: tl.constexpr, FUNCTIONS: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr, NUMBERS: tl.constexpr,
    FIELDS: tl.constexpr, BY_WORDS: tl.constexpr,
):  # fmt: skip
    """[TOKENS, QUERIES] of all tiers. q [FUNCTIONS * QUERIES]: where the tiles of a query or of one of its shares begin.
    Planes of a tier, the highest bits first, have one sum, which is worth twice as much for every bit that follows; its scale
    and what is `said` of shares come last."""
    number = tl.arange(0, NUMBERS)
    total = tl.zeros((TOKENS, QUERIES), tl.float32)
    for index in range(tiers):
        at = table + index * FIELDS
        byte, column, tiles = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        size, tier, bits = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
        of_tier = tl.zeros((TOKENS, FUNCTIONS * QUERIES), tl.float32)
        for FINER in tl.static_range(4):  # planes of 8, 4, 2 and 1 bits
            if KINDS & 8 >> FINER:
                has = bits & 8 >> FINER != 0
                if FINER > 0:
                    of_tier *= tl.where(has, (1 << (8 >> FINER)) * 1.0, 1.0)
                for i in range(tl.where(has, tiles, 0)):
                    word = words_at(row, byte + i * (NUMBERS >> FINER), row_bytes - 1, NUMBERS >> FINER + 2)
                    x = numbers_of(word, 8 >> FINER, FLOAT8, HALF, TOKENS, NUMBERS, BY_WORDS).to(PRODUCT)
                    part = tl.load((q + (column + i) * NUMBERS)[None, :] + number[:, None]).to(PRODUCT)
                    of_tier = tl.dot(x, part, of_tier, input_precision=PRECISION)
                byte += tl.where(has, (size * (8 >> FINER) + 7) // 8, 0)
        scale = _scale(row, tier, FLOAT8)[:, None]
        total += _of_shares(of_tier, said * scale, FUNCTIONS, TOKENS, QUERIES) if TURNED else of_tier * scale
    return total


@triton.jit
def _seen(
    total, token, step, bias, start, end, position, youngest, oldest, scale, cap, BIASED: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """Scores as a softmax takes them: -inf where a query does not see a token. bias [QUERIES]: where that of each begins."""
    total *= scale
    if CAPPED:
        total = cap * (2 / (1 + tl.exp(-2 * total / cap)) - 1)
    if BIASED:
        total += tl.load(bias[None, :] + tl.maximum(tl.minimum(token, end - 1), 0)[:, None])
    age = (position + step)[None, :] - token[:, None]
    seen = ((token >= start) & (token < end))[:, None] & (age >= youngest) & (age < oldest)
    return tl.where(seen, total, float("-inf"))


@triton.jit(do_not_specialize=CHANGING)
def _scores(
    q, basis, constants, rows, tables, sequences, table, bias, exponentials, raw, counts,
    tokens, position, page_tokens, pages, page_stride, head_stride, row_stride, row_bytes, heads, queries, steps, tiers,
    q_width, each, group_stride, batch_stride, tile_stride, function_stride, turned_tokens, blocks, first_block,
    aligned, bias_batch, bias_head, bias_step, youngest, oldest, scale, cap,
    KINDS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    TURNED: tl.constexpr, FUNCTIONS: tl.constexpr, OFFSET: tl.constexpr, PAGED: tl.constexpr, SPANS: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TOKENS: tl.constexpr,
    QUERIES: tl.constexpr, NUMBERS: tl.constexpr, FIELDS: tl.constexpr, BY_WORDS: tl.constexpr,
):  # fmt: skip
    """Of a block of tokens and queries of a stored head. FIRST and LAST of the places that keys lie in side by side: the last
    one leaves exp(score - the largest of the block) [B, rows, blocks, TOKENS], and in `counts` [B, rows, blocks, 2] that and
    their sum. Of TURNED queries FUNCTIONS shares lie one behind the other, which count as `basis` says of a token."""
    block, head = first_block + tl.program_id(0), tl.program_id(2).to(tl.int64)
    sequence, head_of = head // heads, head % heads
    start, end, at = span_of(sequences, sequence, tokens, position, SPANS)
    begin = start // aligned * aligned + block * TOKENS
    token, query = begin + tl.arange(0, TOKENS), tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    some = tl.maximum(tl.minimum(token, end - 1), 0)
    row = _rows_at(
        rows, tables, sequence, head_of, some, page_tokens, pages, page_stride, head_stride, row_stride, PAGED
    )  # fmt: skip
    one = tl.minimum(query, queries - 1)
    if TURNED:
        share = tl.arange(0, FUNCTIONS * QUERIES)
        of_share = head_of * queries + tl.minimum(tl.program_id(1) * QUERIES + share % QUERIES, queries - 1)
        place = of_share // each * group_stride + sequence * batch_stride + of_share % each * q_width
        place += tl.program_id(0) * TOKENS // turned_tokens * tile_stride + share // QUERIES * function_stride
    else:
        place = (head_of * queries + one) // each * group_stride + sequence * batch_stride
        place += (head_of * queries + one) % each * q_width
    said = tl.zeros((TOKENS, FUNCTIONS), tl.float32)
    if TURNED:
        function = tl.arange(0, FUNCTIONS) * turned_tokens
        said = tl.load(basis + (token % turned_tokens)[:, None] + function[None, :])
    total = _products(
        q + place * NUMBERS, said, row, row_bytes, table, tiers,
        KINDS, FLOAT8, HALF, PRODUCT, PRECISION, TURNED, FUNCTIONS, TOKENS, QUERIES, NUMBERS, FIELDS, BY_WORDS,
    )  # fmt: skip
    if OFFSET:
        constant = tl.load(constants + place // q_width)[None, :] + tl.zeros((TOKENS, FUNCTIONS * QUERIES), tl.float32)
        total += _of_shares(constant, said, FUNCTIONS, TOKENS, QUERIES)
    here, of_row = query < queries, head * queries + query
    to = (of_row * blocks * TOKENS)[None, :] + (block * TOKENS + tl.arange(0, TOKENS))[:, None]
    if not FIRST:
        total += tl.load(raw + to, mask=here[None, :], other=0)
    if not LAST:
        tl.store(raw + to, total, mask=here[None, :])
    else:
        if BIASED:
            bias += sequence * bias_batch + (head_of * queries + one) // steps * bias_head + one % steps * bias_step
        total = _seen(
            total, token, one % steps, bias, start, end, at, youngest, oldest, scale, cap, BIASED, CAPPED
        )  # fmt: skip
        largest = tl.max(total, axis=0)
        exponential = tl.exp(total - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
        tl.store(exponentials + to, exponential.to(exponentials.dtype.element_ty), mask=here[None, :])
        count = counts + (of_row * blocks + block) * 2
        tl.store(count, largest, mask=here)
        tl.store(count + 1, tl.sum(exponential, axis=0), mask=here)


@triton.jit(do_not_specialize=CHANGING)
def _share_out(counts, log_sums, blocks, AT_ONCE: tl.constexpr):
    """What an exponential of a block weighs, in place of the block's largest score, and the logarithm of the sum of all. A
    query that sees no token gives them no weight, and has a sum of 0."""
    row = tl.program_id(0).to(tl.int64)
    counts += row * blocks * 2
    largest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for begin in range(0, blocks, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)
        highest = tl.load(counts + 2 * block, mask=block < blocks, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(highest, axis=0))
        known = tl.where(higher == float("-inf"), 0.0, higher)
        sums = tl.load(counts + 2 * block + 1, mask=block < blocks, other=0)
        total = total * tl.exp(largest - known) + tl.sum(sums * tl.exp(highest - known), axis=0)
        largest = higher
    known = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(log_sums + row, largest + tl.log(tl.maximum(total, 1e-37)))
    for begin in range(0, blocks, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)
        highest = tl.load(counts + 2 * block, mask=block < blocks, other=0)
        tl.store(counts + 2 * block, tl.exp(highest - known) / tl.maximum(total, 1e-37), mask=block < blocks)


@triton.jit
def _add_weighted(
    total, weights, shares, rows, tables, sequence, head, at, tier, start, begin, stop, end, page_tokens, pages,
    page_stride, head_stride, row_stride, row_bytes,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    PAGED: tl.constexpr, TOKENS: tl.constexpr, NUMBERS: tl.constexpr, BY_WORDS: tl.constexpr,
):  # fmt: skip
    """total [NUMBERS, QUERIES] and the sum over the tokens begin:stop of one plane of bits. weights, shares [QUERIES]: where
    those of a query begin."""
    for block in range(begin, stop):
        token = start + block * TOKENS + tl.arange(0, TOKENS)
        some = tl.maximum(tl.minimum(token, end - 1), 0)
        row = _rows_at(
            rows, tables, sequence, head, some, page_tokens, pages, page_stride, head_stride, row_stride, PAGED
        )  # fmt: skip
        x = numbers_of(
            words_at(row, at, row_bytes - 1, NUMBERS * BITS // 32), BITS, FLOAT8, HALF, TOKENS, NUMBERS, BY_WORDS
        )
        weight = tl.load(weights[:, None] + (block * TOKENS + tl.arange(0, TOKENS))[None, :])
        weight = weight.to(tl.float32) * tl.load(shares + block * 2)[:, None] * _scale(row, tier, FLOAT8)[None, :]
        total = tl.dot(tl.trans(x.to(PRODUCT)), tl.trans(weight.to(PRODUCT)), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=CHANGING)
def _weighted(
    weights, shares, rows, tables, sequences, table, out,
    tokens, page_tokens, pages, page_stride, head_stride, row_stride, row_bytes, heads, queries, tiles, blocks, aligned,
    split, width, column, part_stride,
    KINDS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    PAGED: tl.constexpr, SPANS: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr, NUMBERS: tl.constexpr,
    FIELDS: tl.constexpr, BY_WORDS: tl.constexpr,
):  # fmt: skip
    """out[part, b, row, number] = sum over `split` blocks of tokens of weight[b, row, token] number[b, head, token], of a
    tile of numbers, all of its planes of bits."""
    head, part = tl.program_id(2).to(tl.int64), tl.program_id(0) // tiles
    sequence, head_of = head // heads, head % heads
    start, end, _ = span_of(sequences, sequence, tokens, tokens, SPANS)
    at = table + tl.program_id(0) % tiles * FIELDS
    byte, first, size, tier = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    bits, before, wanted = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    of_row = head * queries + tl.minimum(query, queries - 1)
    weights += of_row * blocks * TOKENS
    shares += of_row * blocks * 2
    start = start // aligned * aligned
    begin = part * split
    stop = tl.minimum(begin + split, tl.cdiv(end - start, TOKENS))
    total = tl.zeros((NUMBERS, QUERIES), tl.float32)
    for FINER in tl.static_range(4):  # planes of 8, 4, 2 and 1 bits
        if KINDS & 8 >> FINER:
            has = bits & 8 >> FINER != 0
            if FINER > 0:  # what is there is worth twice as much for every bit that follows
                total *= tl.where(has, (1 << (8 >> FINER)) * 1.0, 1.0)
            total = _add_weighted(
                total, weights, shares, rows, tables, sequence, head_of, byte + (before >> FINER), tier, start, begin,
                tl.where(has, stop, begin), end, page_tokens, pages, page_stride, head_stride, row_stride, row_bytes,
                8 >> FINER, FLOAT8, HALF, PRODUCT, PRECISION, PAGED, TOKENS, NUMBERS, BY_WORDS,
            )  # fmt: skip
            byte += tl.where(has, (size * (8 >> FINER) + 7) // 8, 0)
    number = tl.arange(0, NUMBERS)
    to = out + part.to(tl.int64) * part_stride + (head * queries + query) * width + column + first
    tl.store(to[None, :] + number[:, None], total, mask=(query < queries)[None, :] & (number < wanted)[:, None])


@triton.jit(do_not_specialize=CHANGING)
def _arrange(q, order, out, width, q_width, BLOCK: tl.constexpr):
    """Queries as they meet tiles of numbers: out[row, i] = q[row, order[i]], 0 where a tile has no number."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(order + at, mask=at < q_width, other=-1)
    x = tl.load(q + row * width + number, mask=number >= 0, other=0)
    tl.store(out + row * q_width + at, x.to(out.dtype.element_ty), mask=at < q_width)


@triton.jit
def _part_of(sums, splits, split_stride, row, width, column, BLOCK: tl.constexpr):
    """[BLOCK] numbers from `column` on of the sum of all splits, 0 beside them."""
    number = column + tl.arange(0, BLOCK)
    inside = (number >= 0) & (number < width)
    total = tl.zeros((BLOCK,), tl.float32)
    at = sums + row * width + number
    for _ in range(splits):
        total += tl.load(at, mask=inside, other=0)
        at += split_stride
    return total


@triton.jit(
    do_not_specialize=[*CHANGING, "splits", "split_stride", "beside", "other_splits", "other_stride", "other_width"]
)
def _join(
    sums, log_sums, other, other_log_sums, out, splits, split_stride, width, beside, other_splits, other_stride, other_width,
    other_beside, heads, steps, out_width, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, step, head, number] of averages [splits, b, head, step, number] over one part of the tokens or TWO, each by what
    it counts; `beside`: numbers of `out` before the first of a part."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    total = _part_of(sums, splits, split_stride, row, width, begin - beside, BLOCK)
    if TWO:
        one, two = tl.load(log_sums + row), tl.load(other_log_sums + row)
        share = tl.where(two == -float("inf"), 1.0, 1 / (1 + tl.exp(two - one)))  # neither saw anything: as it is, 0
        total = total * share
        total += _part_of(other, other_splits, other_stride, row, other_width, begin - other_beside, BLOCK) * (
            1 - share
        )
    batch, head, step = row // (heads * steps), row // steps % heads, row % steps
    number = begin + tl.arange(0, BLOCK)
    to = out + ((batch * steps + step) * heads + head) * out_width + number
    tl.store(to, total.to(out.dtype.element_ty), mask=number < out_width)
