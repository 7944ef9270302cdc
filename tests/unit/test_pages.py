"""Packed tokens in pages: every layer finds its own, wherever the block table has put them; and who reads together."""

import pytest
import torch

from kvfold.plan.cache_spec import CacheSpec, StoredShape
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels import cpu, native, paging
from kvfold.runtimes.kernels.cpu_store import LayerWriter, Storage, stores
from kvfold.runtimes.kernels.dispatch import pack, roundtrip
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, read_all
from kvfold.runtimes.vllm.batches import Batch, batches
from kvfold.runtimes.vllm.pages import RECENT, Layout, PageFormat, Span

FOUR = NumberFormat(tiers=((13, 4), (6, 2)))
SIDES = {
    (0, "k"): StoredShape(2, 19, FOUR),
    (0, "v"): StoredShape(3, 5, None),
    (2, "k"): StoredShape(1, 19, NumberFormat(tiers=((19, 8),), scales="float8")),
}


def made(key, tokens, seed=0):
    side = SIDES[key]
    return torch.randn(side.num_heads, tokens, side.width, generator=torch.Generator().manual_seed(seed + key[0]))


@pytest.mark.parametrize("tokens, padding", [(1, 0), (5, 3), (16, 0)])
def test_what_is_written_is_read_back_from_scattered_pages(tokens, padding):
    format = PageFormat(SIDES, torch.float32)
    assert format.row_bytes == 2 * FOUR.row_bytes + 3 * 5 * 4 + 19
    storage = torch.full((40, tokens * format.row_bytes + padding), 255, dtype=torch.uint8)  # 255: stale bytes are NaN
    pages = storage[:, : tokens * format.row_bytes].unflatten(1, (1, tokens, -1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    tables, lengths = order[: 2 * (40 // 2)].view(2, -1), [min(20 * tokens, 37), min(20 * tokens, 11)]
    at = [torch.arange(length) for length in lengths]
    slots = torch.cat([table[t // tokens] * tokens + t % tokens for table, t in zip(tables, at, strict=True)])
    for key in SIDES:
        format.write(format.rows(pages, key), key, slots, made(key, len(slots)))
    assert (storage[:, tokens * format.row_bytes :] == 255).all()
    for key, side in SIDES.items():
        expected = roundtrip(made(key, len(slots))[None], side.format)[0]
        for start in (0, 7):
            spans = [Span(min(start, n - 1), n) for n in lengths]
            found = read_all(format.read(pages, key, tables, spans, 40))
            for row, whole, (first, end) in zip(found, expected.split(lengths, 1), spans, strict=True):
                assert torch.equal(row[:, 40 - (end - first) :], whole[:, first:])
                assert row[:, : 40 - (end - first)].isfinite().all()


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
def test_the_kernel_does_what_torch_does():
    generator = torch.Generator().manual_seed(3)
    storage = torch.randint(0, 256, (12, 3 * 7 * 11 + 5), dtype=torch.uint8, generator=generator)
    pages = storage.as_strided((12, 3, 7, 11), (storage.stride(0), 77, 11, 1), 2)
    assert cpu.pages(pages)
    tables = torch.randperm(12, generator=generator)[:10].view(2, 5)
    for spans in ([(0, 35), (13, 14)], [(6, 22), (7, 21)]):
        assert torch.equal(paging.gather(pages, tables, spans, 36), paging.gather_by_torch(pages, tables, spans, 36))
    new = torch.randint(0, 256, (3, 9, 16), dtype=torch.uint8, generator=generator)[:, :, 2:13]
    slots = torch.tensor([80, -1, 0, 6, 7, 33, 34, -1, 83])
    expected = storage.clone()
    paging.scatter_by_torch(expected.as_strided(pages.shape, pages.stride(), 2), slots, new)
    at_once = storage.clone()
    paging.scatter(pages, slots, new)
    assert torch.equal(storage, expected)
    paging.scatter_at_once(at_once.as_strided(pages.shape, pages.stride(), 2), slots, new)
    assert torch.equal(at_once[1:], expected[1:])  # the first page stands for none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [(0, "k"), (0, "v"), (2, "k")])
def test_a_slot_of_padding_is_written_nowhere(key, dtype):
    """And what is written is returned as it is read."""
    format, side = PageFormat(SIDES, dtype), SIDES[key]
    pages = torch.zeros(4, 1, 8, format.row_bytes, dtype=torch.uint8)
    new = made(key, 3).to(dtype)
    stored = format.write(format.rows(pages, key), key, torch.tensor([-1, 9, -1]), new, read=True)
    assert torch.equal(stored, roundtrip(new[None], side.format)[0]) and stored.dtype == dtype
    rows = format.rows(pages, key)
    found = format.read(pages, key, torch.tensor([[1]], dtype=torch.int32), [Span(0, 2)], 2)
    assert torch.equal(read_all(found)[0, :, 1], stored[:, 1])
    assert (pages != 0).sum() == (rows[1, :, 1] != 0).sum()
    elsewhere = torch.zeros_like(pages)  # read and written anew where pages have moved
    assert format.write(format.rows(elsewhere, key), key, torch.tensor([-1, 9, -1]), new) is None and torch.equal(
        elsewhere, pages
    )


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_stored_as_they_are_packed(dtype):
    """Heads and tokens that do not lie behind each other; of many tokens and of one."""
    for tokens in (1, 300):
        x_CTR = (
            torch.randn(tokens, 2, 25, generator=torch.Generator().manual_seed(tokens))
            .to(dtype)
            .transpose(0, 1)[..., 3:22]
        )
        rows, slots = torch.zeros(40, 2, 8, FOUR.row_bytes, dtype=torch.uint8), torch.arange(tokens) + 5
        expected = rows.clone()
        paging.scatter_by_torch(expected, slots, pack(x_CTR[None], FOUR)[0])
        storages = [Storage(rows, FOUR, read=True), Storage(torch.zeros_like(rows), FOUR)]
        assert all(stores(storage, x_CTR) for storage in storages)
        found, unasked = LayerWriter(storages)([x_CTR, x_CTR], [slots, slots.int()])
        assert all(torch.equal(storage.rows, expected) for storage in storages) and unasked is None
        assert torch.equal(found, roundtrip(x_CTR[None], FOUR)[0])


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_known_of_tokens_is_taken_off_first(dtype):
    """Two storages of the same numbers, by the first numbers of two tensors each."""
    generator = torch.Generator().manual_seed(5)
    for tokens in (1, 70):
        x_TCE = torch.randn(tokens, 2, 30, generator=generator).to(dtype)
        known = [[torch.randn(2, tokens, width, generator=generator).to(dtype) for width in (7, 19)] for _ in range(2)]
        counts, slots = [(4, 9), (7, 1)], torch.arange(tokens)
        ways = [torch.randn(sum(count), 19, generator=generator) for count in counts]
        rows = [torch.zeros(9, 2, 8, FOUR.row_bytes, dtype=torch.uint8) for _ in counts]
        storages = [Storage(rows[i], FOUR, read=True, first=11 * i, ways=ways[i]) for i in range(2)]
        found = LayerWriter(storages, counts)([x_TCE.transpose(0, 1)], [slots, slots], known)
        for i, count in enumerate(counts):
            beside = torch.cat([x[..., :n] for x, n in zip(known[i], count, strict=True)], dim=2).double()
            wanted = x_TCE.transpose(0, 1)[..., 11 * i : 11 * i + 19].double() - beside @ ways[i].double()
            rounded = roundtrip(wanted.float()[None], FOUR)[0].to(dtype)
            assert (found[i] != rounded).double().mean() < 0.01  # sums in another order: some fall to the other side
            packed = rows[i].transpose(0, 1).flatten(1, 2)[None, :, :tokens]
            assert torch.equal(read_all(PackedTokens(packed, FOUR, dtype))[0], found[i])


def spec(width, window=None, recent=0):
    form = NumberFormat(tiers=((width, 4),))
    finer = {"recent": recent, "recent_head_dim": 2 * width, "v_recent_head_dim": 2 * width} if recent else {}
    finer |= (
        {"k_recent_bits": NumberFormat(tiers=((2 * width, 8),)), "v_recent_bits": NumberFormat(tiers=((2 * width, 8),))}
        if recent
        else {}
    )
    return CacheSpec(
        num_kv_heads=1,
        head_dim=width,
        num_v_heads=1,
        v_head_dim=width,
        k_bits=form,
        v_bits=form,
        window=window,
        **finer,
    )


@pytest.mark.parametrize("asked", [16, 64, 128])
def test_pages_of_all_kinds_are_equally_large_and_nearly_full(asked):
    plain = Layout({0: spec(32), 1: spec(48)}, torch.bfloat16)
    assert plain.page_tokens(asked)[0] == {None: asked}
    mixed = Layout(
        {0: spec(32, recent=64), 1: spec(48, recent=64), **{i: spec(32, window=100) for i in range(2, 7)}},
        torch.bfloat16,
    )
    tokens, page = mixed.page_tokens(asked)
    assert set(tokens) == {None, 100, RECENT} and mixed.recent == 64
    for kind, count in tokens.items():
        assert 0.5 * page <= count * mixed.formats[kind].row_bytes <= page
    assert tokens[None] >= asked or tokens[100] >= asked


def test_decoding_sequences_are_read_together_and_prompts_alone():
    tables = torch.arange(12).view(4, 3)
    found = batches([0, 1, 6, 7, 8], [40, 25, 50, 300], tables)
    assert [(torch.arange(40)[batch.rows].tolist(), batch.lengths, batch.width) for batch in found] == [
        ([0, 6], [40, 50], 64),
        ([1, 2, 3, 4, 5], [25], 25),
        ([7], [300], 320),
    ]
    assert torch.equal(found[0].tables_Bp, tables[[0, 2]])
    assert found[0].positions_BS[:, -3:].tolist() == [[37, 38, 39], [47, 48, 49]] and found[0].positions_BS[0, 0] == 0


@pytest.mark.parametrize("window", [None, 10])
def test_masks_show_what_a_loop_shows(window):
    for batch in batches([0, 1, 6, 7], [40, 25, 50], torch.zeros(3, 9, dtype=torch.long)):
        S, T = batch.width_of(window), batch.queries
        expected = torch.zeros(len(batch.lengths), 1, T, S, dtype=torch.bool)
        for row, (length, (start, end)) in enumerate(zip(batch.lengths, batch.spans(window), strict=True)):
            assert end == length and end - start <= S
            for query in range(T):
                position = length - T + query
                for key in range(start, end):
                    seen = key <= position and (window is None or key > position - window)
                    expected[row, 0, query, S - length + key] = seen
        mask = batch.mask(window)
        assert torch.equal(torch.ones_like(expected) if mask is None and T == 1 else mask, expected)


def test_a_prompt_that_sees_all_before_it_needs_no_mask():
    assert batches([0, 8], [8], torch.zeros(1, 1))[0].mask(None) is None
    assert batches([0, 1], [64], torch.zeros(1, 1))[0].mask(None) is None
    assert batches([0, 8], [9], torch.zeros(1, 1))[0].mask(None) is not None  # torch's fused kernel wants one


def test_decoding_sequences_that_are_read_in_place_are_one_batch():
    tables = torch.arange(12).view(4, 3)
    found = batches([0, 1, 2, 42, 43], [7, 300, 40, 2], tables, in_place=True)
    assert sorted((x.queries, x.lengths) for x in found) == [(1, [7, 300, 2]), (40, [40])]
    assert [x.tables_Bp.tolist() for x in found if x.queries == 1] == [[[0, 1, 2], [3, 4, 5], [9, 10, 11]]]
    drafted = batches([0, 4, 5, 9, 26], [7, 300, 40, 17], tables, in_place=True)
    assert [(x.queries, x.lengths) for x in drafted] == [(4, [7, 40]), (1, [300]), (17, [17])]
    assert drafted[0].rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


def batch_of(queries, lengths):
    return Batch(torch.arange(len(lengths) * queries), queries, lengths, torch.zeros(len(lengths), 1), max(lengths))


@pytest.mark.parametrize("window", [None, 3, 7, 8, 12])
@pytest.mark.parametrize("queries, lengths", [(1, [8]), (3, [8]), (8, [8]), (1, [8, 5]), (3, [8, 8]), (3, [5, 8])])
def test_who_sees_all_and_whom_a_mask_tells(queries, lengths, window):
    batch = batch_of(queries, lengths)
    width, mask = batch.width_of(window), batch.mask(window)
    at, token = torch.arange(width - queries, width)[:, None], torch.arange(width)
    causal = (token <= at).expand(len(lengths), 1, -1, -1)
    first = width - torch.tensor(lengths)[:, None, None, None]
    seen = causal & (token >= first) & (token > at - (window or width))
    assert batch.sees_all(window) == torch.equal(seen, causal)
    assert torch.equal(seen, causal) if mask is None else torch.equal(mask, seen)
    assert (mask is None) == (torch.equal(seen, causal) and queries in (1, width))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("ages", [(0, 1 << 62), (0, 5), (5, 1 << 62), (2, 9)])
def test_of_each_sequence_those_are_read_that_some_query_sees(ages, queries):
    lengths = [3, 5, 6, 40]
    batch = batch_of(queries, lengths)
    for length, (start, end, position) in zip(lengths, batch.seen(ages).tolist(), strict=True):
        seen = [s for s in range(length) if any(ages[0] <= t - s < ages[1] for t in range(length - queries, length))]
        assert position == length - queries
        assert list(range(start, end)) == seen
