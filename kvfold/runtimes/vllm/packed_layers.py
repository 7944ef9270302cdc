"""What vLLM knows of a packed model: its layers, and who of them stands for which pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvfold.plan.plan import CachePlan
from kvfold.plan.token_runs import FEW_TOKENS
from kvfold.runtimes.vllm.packed_backend import PackedBackend, PackedMetadata
from kvfold.runtimes.vllm.pages import RECENT, Kind, Layout
from kvfold.runtimes.vllm.ranks import Rank
from kvfold.runtimes.vllm.recent_pages import RecentSpec

TOKENS = 32
"""Of a page at least, where there are several kinds of pages, unless the user asks for others: prompts are compared, and
sequences that are short waste, by whole pages."""


class PackedPages:
    """The pages of a model, and who of its layers stands for which of them in vLLM."""

    recent: RecentPages
    """Where a plan has recent tokens."""

    def __init__(self, plan: CachePlan, vllm_config: Any) -> None:
        self.rank = Rank(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        self.owned = {layer: self.rank.spec(spec) for layer, spec in enumerate(plan.caches) if spec is not None}
        self.layout = Layout(self.owned, vllm_config.model_config.dtype)
        self.vllm_config = vllm_config
        self.last_reader, self.last_user = plan.last_predicted, _last_users(plan)
        self.names: dict[Kind, str] = {}
        self.new: dict[int, Any] = {}
        """What layers whose numbers others read have stored in this step."""

    def standing_for(self, kind: Kind, name: str) -> str | None:
        """The layer that stands for a kind of pages; None: the one that asks, which is the first."""
        if RECENT in self.layout.formats and not self.names:
            self.recent = RecentPages(self, f"{name}.{RECENT}")
        first = self.names.setdefault(kind, name)
        return None if first == name else first

    def spec(self, kind: Kind) -> Any:
        """What vLLM is to know of pages of a kind."""
        cache, row = self.vllm_config.cache_config, self.layout.formats[kind].row_bytes
        free = len(self.layout.formats) > 1 and not cache.user_specified_block_size
        tokens, page = self.layout.page_tokens(min(cache.block_size, TOKENS) if free else cache.block_size)
        facts = {
            "block_size": tokens[kind], "num_kv_heads": 1, "head_size": row, "head_size_v": 0, "dtype": torch.uint8,
            "num_head_slots": 1, "state_content_bytes": row,
            "page_size_padded": None if tokens[kind] * row == page else page,
        }  # fmt: skip
        if kind is None:
            return FullAttentionSpec(**facts)
        window: Any = self.layout.recent if kind == RECENT else kind
        if kind != RECENT or self.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            return SlidingWindowSpec(**facts, sliding_window=window)
        beside = tuple(tokens[other] for other in self.layout.formats if other != RECENT)
        return RecentSpec(**facts, sliding_window=window, behind=self._behind(window), beside=beside)

    def _behind(self, window: int) -> int:
        """Tokens behind the recent ones that stay: drafts that turn out to be wrong, and what few queries that come together
        see."""
        drafts = self.vllm_config.speculative_config
        return max(0 if drafts is None else drafts.num_speculative_tokens, FEW_TOKENS - window)


class RecentPages(nn.Module, AttentionLayerBase):
    """Stands in vLLM for the pages of recent tokens."""

    def __init__(self, pages: PackedPages, name: str) -> None:
        super().__init__()
        self.pages, self.layer_name, self.kv_cache = pages, name, torch.tensor([])
        pages.vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> Any:
        return PackedBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self.pages.spec(RECENT)

    @property
    def step(self) -> PackedMetadata:
        """The running one; without metadata vLLM measures memory."""
        metadata = get_forward_context().attn_metadata
        return PackedMetadata([]) if metadata is None else metadata[self.layer_name]


class PackedAttention(Attention):
    """What vLLM knows of a layer. Queries, stored numbers and output have shapes of their own, which its operators hand
    through; an Attention, since it asks for that class where layers share pages."""

    def __init__(self, folded: Any, pages: PackedPages, name: str, window: int | None) -> None:
        layer = folded.layer
        super().__init__(
            layer.num_attention_heads,
            layer.head_dim,
            layer.scaling,
            num_kv_heads=layer.num_attention_heads,
            cache_config=pages.vllm_config.cache_config,
            per_layer_sliding_window=window,
            prefix=name,
            attn_backend=PackedBackend,
            kv_sharing_target_layer_name=pages.standing_for(window, name),
        )
        self.pages, self.kind = pages, window
        object.__setattr__(self, "folded", folded)  # which this is a part of

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self.pages.spec(self.kind)

    def forward(self, query: Tensor, key: Tensor | None, value: Tensor | None, width: int) -> Tensor:
        """[T, N, width] of queries [T, N, H], after z [T, C, E] and y [T, U, G] are stored."""
        output = torch.empty(len(query), self.num_heads, width, dtype=query.dtype, device=query.device)
        name, done = _encode_layer_name(self.layer_name), None
        if key is not None:
            done = torch.ops.vllm.unified_kv_cache_update(key, value, name)
        torch.ops.vllm.unified_attention_with_output(query, key, value, output, name, kv_cache_dummy_dep=done)
        return output


def _last_users(plan: CachePlan) -> dict[int, int]:
    """Of each layer that stores something, the last one that reads it."""
    users = {plan.owner(layer): layer for layer in range(len(plan.caches))}
    return {owner: max(last, plan.last_predicted.get(owner, last)) for owner, last in users.items()}
