"""Which pages vLLM keeps of recent tokens: of a prompt only those that queries behind it see.

vLLM's own manager of sliding windows finds pages for all tokens of a step and takes most of a prompt's back a step later. In
a finer form these are many bytes, for want of which a request waits. Here such pages are left out, as vLLM leaves out those
that a window has passed: a prompt's own tokens are read from where they were packed (`writing.FreshRows`). Where there is
room they are kept for that step, so that requests which share a part of their prompts find it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

SPANS = 3
"""How many windows of pages a request has at a time at most: behind the last step that is done and the two that may be on
their way."""


@dataclass(frozen=True, kw_only=True)
class RecentSpec(SlidingWindowSpec):
    """behind: tokens behind the window whose pages stay. beside: tokens of a page of each other kind, which the same requests
    need."""

    behind: int = 0
    beside: tuple[int, ...] = ()

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Pages that a request has at most."""
        window = -(-(self.sliding_window - 1 + self.behind) // self.block_size) + 1
        usual: int = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(SPANS * window, usual)


class RecentManager(SlidingWindowManager):
    """Pages whose tokens the window leaves in the step that brings them are vLLM's null block."""

    def __init__(self, kv_cache_spec: RecentSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.first: dict[str, int] = {}
        """Of each request, its first page that may not have been given back."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Without those that the step itself leaves behind; to be let in, a request must find room for some more."""
        usual: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        if apply_admission_cap:
            return usual
        there = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        if request_id not in self.num_cached_block:
            there = max(there, self.get_num_skipped_tokens(total_computed_tokens) // self.block_size)
        return usual - self._passed(there, num_tokens, num_tokens_main_model)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """Those that the step itself leaves behind too, where there is room."""
        blocks = self.req_to_blocks[request_id]
        passed = self._passed(len(blocks), num_tokens, num_tokens_main_model)
        missing = [] if self._has_room(num_tokens, len(blocks)) else [self._null_block] * passed
        blocks.extend(missing)
        return missing + super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Also those before pages that were left out, behind which vLLM's own manager does not look."""
        blocks = self.req_to_blocks.get(request_id, [])
        end = min(self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size, len(blocks))
        first = self.first.get(request_id, 0)
        if first < end:
            left = [block for block in reversed(blocks[first:end]) if not block.is_null]
            blocks[first:end], self.first[request_id] = [self._null_block] * (end - first), end
            self.block_pool.free_blocks(left)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The request is over, or is put off."""
        self.first.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens that are seen no more."""
        return max(super().get_num_skipped_tokens(num_computed_tokens) - self.kv_cache_spec.behind, 0)

    def _passed(self, there: int, tokens: int, computed: int) -> int:
        """How many pages behind the first `there` have only tokens of this step that no later query sees."""
        pages = -(-tokens // self.block_size)
        return max(min(self.get_num_skipped_tokens(computed) // self.block_size, pages) - there, 0)

    def _has_room(self, tokens: int, there: int) -> bool:
        """Whether there are pages for all tokens, those that this step needs of other kinds counted."""
        if not self.enable_caching:
            return False
        sizes = (self.block_size, *self.kv_cache_spec.beside)
        left = self.block_pool.get_num_free_blocks() + there - sum(-(-tokens // size) for size in sizes)
        return bool(left >= 0)


register_all_kvcache_specs(None)  # which vLLM does where none is registered yet
KVCacheSpecRegistry.register(RecentSpec, RecentManager, uniform_type_base_spec=RecentSpec)
