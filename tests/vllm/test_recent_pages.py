"""Pages of recent tokens: what a query sees is there, others are left out where there is no room, and all come back."""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec

from kvfold.runtimes.vllm.recent_pages import RecentManager, RecentSpec

PAGE, WINDOW, LENGTH = 8, 20, 400


def manager(pages, *, caching=True, behind=0):
    """And the pool that it takes pages from, of which other kinds take one per 32 tokens."""
    facts = {"num_kv_heads": 1, "head_size": 6, "head_size_v": 0, "dtype": torch.uint8}
    spec = RecentSpec(block_size=PAGE, sliding_window=WINDOW, behind=behind, beside=(32,), **facts)
    pool = BlockPool(num_gpu_blocks=pages + 1, enable_caching=caching, hash_block_size=PAGE)
    options = {"block_pool": pool, "enable_caching": caching, "kv_cache_group_id": 0, "scheduler_block_size": 32}
    made = get_manager_for_kv_cache_spec(spec, max_in_flight_tokens=2 * LENGTH, max_model_len=LENGTH, **options)
    assert type(made) is RecentManager
    return made, pool


def step(made, request, computed, tokens, lookahead=0):
    """What vLLM asks of a manager in a step that brings a request from so many tokens to `tokens`; returns its new pages."""
    made.remove_skipped_blocks(request, computed)
    counted = made.get_num_blocks_to_allocate(request, tokens + lookahead, [], computed, computed, tokens)
    if request not in made.num_cached_block:
        made.add_local_computed_blocks(request, [], 0, 0)
    new = made.allocate_new_blocks(request, tokens + lookahead, tokens)
    assert sum(not block.is_null for block in new) >= counted
    return new, counted


def places(made, request):
    return [place for place, block in enumerate(made.req_to_blocks[request]) if not block.is_null]


def test_of_a_long_prompt_the_last_pages_are_kept():
    made, pool = manager(10)
    new, counted = step(made, "a", 0, 100)
    assert counted == 3 == sum(not block.is_null for block in new)  # tokens from 81 on are seen by the next query
    assert len(new) == 13 and places(made, "a") == [10, 11, 12] and pool.get_num_free_blocks() == 7
    made.free("a")
    assert pool.get_num_free_blocks() == 10


@pytest.mark.parametrize("caching", [True, False])
def test_where_there_is_room_others_find_the_prompt_again(caching):
    made, pool = manager(40, caching=caching)
    new, counted = step(made, "a", 0, 100)
    assert counted == 3 and sum(not block.is_null for block in new) == (13 if caching else 3)
    step(made, "a", 100, 101)
    assert places(made, "a") == [10, 11, 12] and pool.get_num_free_blocks() == 37


def test_what_other_kinds_need_in_this_step_is_left():
    made, pool = manager(13 + 4 - 1)
    assert sum(not block.is_null for block in step(made, "a", 0, 100)[0]) == 3
    made, pool = manager(13 + 4)
    assert sum(not block.is_null for block in step(made, "a", 0, 100)[0]) == 13
    assert pool.get_num_free_blocks() == 4


@pytest.mark.parametrize("behind", [0, 5])
def test_every_token_that_a_query_sees_has_a_page_or_came_in_its_step(behind):
    rng = random.Random(0)
    for _ in range(50):
        pages = rng.randint(12, 60)
        made, pool = manager(pages, behind=behind)
        computed = 0
        while computed < LENGTH:
            tokens = min(computed + rng.choice((1, 1, 3, 17, 40, 160)), LENGTH)
            lookahead = min(rng.choice((0, 3)), LENGTH - tokens)
            free = pool.get_num_free_blocks() + len(places(made, "a"))
            new, _ = step(made, "a", computed, tokens, lookahead)
            assert pool.get_num_free_blocks() == pages - len(places(made, "a")) and free == pages
            there = {place * PAGE + i for place in places(made, "a") for i in range(PAGE)}
            assert there >= set(range(max(computed - WINDOW + 1, 0), computed))  # seen, and not of this step
            wrong = min(behind, tokens - computed - 1)  # drafts, at most
            assert there >= set(range(max(tokens - wrong - WINDOW + 1, 0), tokens + lookahead))  # seen later
            assert len(made.req_to_blocks["a"]) == -(-(tokens + lookahead) // PAGE) or not new
            computed = tokens - rng.randint(0, wrong)
        made.free("a")
        assert pool.get_num_free_blocks() == pages and not made.first


def test_a_request_that_waits_is_counted_as_one_that_runs():
    """And is let in where there is room for some windows, not for all of its prompt."""
    made, _ = manager(40)
    asked = {"new_computed_blocks": [], "total_computed_tokens": 0, "num_local_computed_tokens": 0}
    assert (
        made.get_num_blocks_to_allocate("a", 390, num_tokens_main_model=390, apply_admission_cap=True, **asked) == 3 * 4
    )
    assert made.get_num_blocks_to_allocate("a", 390, num_tokens_main_model=390, **asked) == 3
    assert made.get_num_blocks_to_allocate("a", 30, num_tokens_main_model=390, apply_admission_cap=True, **asked) == 4


def test_pages_that_were_left_out_are_not_offered_to_others():
    made, pool = manager(10)
    step(made, "a", 0, 96)
    hashes = [bytes([place]) * 32 for place in range(LENGTH // PAGE)]
    request = SimpleNamespace(request_id="a", block_hashes=hashes, shared_prefix_boundary=0)
    made.cache_blocks(request, 96, replay_boundaries=(95,))
    found = {place for place, key in enumerate(hashes) if pool.get_cached_block(key, [0])}
    assert found and found <= {9, 10, 11}
