"""vLLM's backend of packed caches: who asks for what in a step, in which pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvfold.plan.naming import CONFIG_KEY
from kvfold.plan.plan import CachePlan
from kvfold.plan.token_runs import FEW_TOKENS
from kvfold.runtimes.vllm import BACKEND
from kvfold.runtimes.vllm.batches import Batch, batches
from kvfold.runtimes.vllm.reading import reads_in_place
from kvfold.runtimes.vllm.recent_pages import RecentSpec

READING_BYTES = 1 << 30
"""What reading takes for a while on a GPU at most: masks, scores, and what is rebuilt of a piece of a prompt."""


@dataclass
class PackedMetadata:
    """One step's batches. fresh: by layer and side rows [1, heads, tokens, bytes] of all tokens of the step, in their order,
    if there are prompts whose tokens need not be in pages."""

    batches: list[Batch]
    fresh: dict[tuple[int, str], Tensor] | None = None
    kept_T: Tensor | None = None

    def fresh_of(self, key: tuple[int, str], batch: Batch) -> Tensor | None:
        """Those of a prompt; None of few tokens, which are in pages."""
        if self.fresh is None or batch.queries <= FEW_TOKENS:
            return None
        return self.fresh[key][:, :, batch.rows]

    def kept(self, slots_T: Tensor, page_tokens: int) -> Tensor:
        """Slots, -1 of tokens that have no page: vLLM gives them its first, which stands for none."""
        if self.kept_T is None:
            self.kept_T = slots_T.masked_fill(slots_T < page_tokens, -1)
        return self.kept_T


class PackedBuilder(AttentionMetadataBuilder[PackedMetadata]):
    """Who reads together."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config = vllm_config.model_config
        plan = CachePlan.from_dict(getattr(config.hf_config, CONFIG_KEY))
        self.drafts = vllm_config.speculative_config is not None
        self.in_place = reads_in_place(torch.device(device), config.dtype, plan.owned)
        self.leaves_out = isinstance(kv_cache_spec, RecentSpec)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> PackedMetadata:
        """Of what vLLM says of all sequences."""
        common = common_attn_metadata
        starts, lengths = common.query_start_loc_cpu.tolist(), self._lengths(common)
        found = batches(starts, lengths, common.block_table_tensor, in_place=self.in_place)
        prompts = self.leaves_out and any(batch.queries > FEW_TOKENS for batch in found)
        return PackedMetadata(found, {} if prompts else None)

    def _lengths(self, common: Any) -> list[int]:
        """Of all sequences. The CPU knows them, but for drafts of which the device has not said yet how many were right."""
        known = None if self.drafts else common.seq_lens_cpu_upper_bound
        lengths: list[int] = (common.seq_lens if known is None else known).tolist()
        return lengths


class PackedImpl(AttentionImpl[PackedMetadata]):
    """Hands everything to the layer of the model, which knows its regions."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **rest: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        layer.folded.store(key, value, kv_cache, slots)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """[T, N, width] of queries [T, N, H], into `output`; without metadata vLLM measures memory."""
        if attn_metadata is None:
            if output.is_cuda:  # taken and given back, so that vLLM leaves room for it
                torch.empty(READING_BYTES, dtype=torch.uint8, device=output.device)
            return output.zero_()
        for place, batch in enumerate(attn_metadata.batches):
            part = output[batch.rows] if isinstance(batch.rows, slice) else None  # a slice is the output's own memory
            found = layer.folded.read(query[batch.rows], kv_cache, batch, place, part)
            if found is not part:
                output[batch.rows] = found
        return output


class PackedBackend(AttentionBackend):
    """Rows of bytes that other backends could not read."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> Any:
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return PackedBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Any, so that no page is split: it has an interior."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """Those in which a page is one piece of memory."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.BLHNC, KVCacheLayout.BLNHC)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True
