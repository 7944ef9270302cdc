"""Attention of a layer whose cache holds one latent for several layers, made when all of them have run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.kernels.attention import grouped_attention, mask_of, prefill_attention, softmax
from kvfold.runtimes.kernels.packed_tokens import read_all
from kvfold.runtimes.kernels.rotary import apply_rotary, tables_of
from kvfold.runtimes.transformers.attention import FoldedAttention
from kvfold.runtimes.transformers.forward_state import CURRENT_STATE, ForwardState
from kvfold.runtimes.transformers.projections import GroupedLinear
from kvfold.runtimes.transformers.temperature import tempered


class JointAttention(FoldedAttention):
    """Exact keys and values for the tokens of this step, latents for past ones.

    The latents of new tokens are sums over the layers of the group, so the last one stores them. Without a cache there are no
    past tokens: the result is the original's.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        layer: AttentionLayer,
        spec: CacheSpec,
        norms: tuple[nn.Module | None, nn.Module | None],
        users: tuple[int, ...],
        **options: Any,
    ) -> None:
        super().__init__(config, layer, spec, norms, users[0], **options)
        self.is_last = users[-1] == layer.index

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        alibi: Tensor | None = None,
        position_bias: Tensor | None = None,
        kv_state: ForwardState | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        position_embeddings = tables_of(self.layer, hidden_states, position_embeddings, kwargs.get("position_ids"))
        k = self._heads(self.k_proj(hidden_states), self.layer.num_kv_heads, self.k_norm)
        k = k if position_embeddings is None else apply_rotary(k, *position_embeddings)
        v = self._heads(self.v_proj(hidden_states), self.layer.num_kv_heads, None)
        cache = layer_past if past_key_values is None else past_key_values
        state = CURRENT_STATE.get() if kv_state is None else kv_state
        q = tempered(self.layer, self._queries(hidden_states, position_embeddings), state, cache)
        mask = mask_of(hidden_states, attention_mask, alibi, position_bias, self.layer.num_attention_heads)
        past = self._store(k, v, cache, state)
        if past is None:
            out, probs = self._attend_exact(q, k, v, mask, wants_probs=bool(kwargs.get("output_attentions")))
        else:
            out, probs = self._attend_past(q, k, v, *past, mask)
        if self.is_last and cache is not None and state is not None:  # only now, as past tokens are read in place
            cache.update(*state.stored[self.owner], self.owner)
        return self._output(out, residual), probs

    def _attend_exact(
        self, q: Tensor, z: Tensor, y: Tensor, mask: Tensor | None, *, wants_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Over exact keys and values alone."""
        dropout = self.layer.attention_dropout if self.training else 0.0
        if self._eager() or wants_probs:
            return grouped_attention(q, z, y, mask, scale=self.scaling, dropout=dropout, softcap=self.layer.softcap)
        return prefill_attention(q, z, y, mask, scale=self.scaling, dropout=dropout), None

    def _store(self, k: Tensor, v: Tensor, cache: Any, state: ForwardState | None) -> tuple[Tensor, Tensor] | None:
        """Add this layer's share to the latents of the new tokens; return those of past tokens, None if there are none."""
        if cache is None:
            return None
        if state is None or not hasattr(cache, "owned"):
            raise ValueError(
                "a cache that several layers fill together needs the whole ...ForCausalLM model and kvfold's own cache: leave"
                " past_key_values out, or pass kvfold.FoldedCache(model.kv_plan)."
            )
        if self.owner == self.layer_idx:
            state.stored.pop(self.owner, None)
            state.past[self.owner] = cache.layers[self.owner].live()
        z, y = _latent(k, self.k_a_proj), _latent(v, self.v_a_proj)
        if self.owner in state.stored:
            z_before, y_before = map(read_all, state.stored[self.owner])
            z, y = z + z_before.to(z.device), y + y_before.to(y.device)
        state.stored[self.owner] = (z, y)
        past = state.past[self.owner]
        return past and (read_all(past[0]), read_all(past[1]))

    def _attend_past(
        self, q: Tensor, k: Tensor, v: Tensor, z: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One softmax over past tokens (seen through latents) and new ones (seen exactly): [B, T, N, H]."""
        B, N, T, H = q.shape
        K, S, C, U = k.shape[1], z.shape[2], z.shape[1], y.shape[1]
        scaled = q * self.scaling
        absorbed = self._absorb(scaled).reshape(B, C, N // C * T, -1)
        past = (absorbed @ z.to(q.device).transpose(2, 3)).view(B, N, T, S)
        present = (scaled.reshape(B, K, N // K * T, H) @ k.transpose(2, 3)).view(B, N, T, T)
        scores = torch.cat([past, present], dim=-1)
        if self.layer.softcap is not None:
            scores = self.layer.softcap * torch.tanh(scores / self.layer.softcap)
        probs = softmax(scores, mask)
        seen, own = probs[..., :S], probs[..., S:]
        averaged = (seen.reshape(B, U, N // U * T, S) @ y.to(q.device)).view(B, N, T, -1)
        exact = (own.reshape(B, K, N // K * T, T) @ v).view(B, N, T, H)
        return self._lead_values_back(averaged.transpose(1, 2)) + exact.transpose(1, 2), probs


def _latent(x_BKTH: Tensor, to_latent: nn.Module | None) -> Tensor:
    """A layer's share of the latents of new tokens: [B, K, T, H] -> [B, groups, T, width]."""
    assert isinstance(to_latent, GroupedLinear), "joint layers have a way to the latents"
    groups = to_latent.weight.shape[0]
    return to_latent(x_BKTH.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3))
