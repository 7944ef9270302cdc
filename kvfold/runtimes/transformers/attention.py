"""The one attention module of every folded family."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvfold.errors import PlanError
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.checks import check_sinks
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.tensors import Shape, tensor_shapes
from kvfold.plan.token_runs import RECENCY
from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.attention import (
    chunked_attention,
    grouped_attention,
    kernel_attention,
    kernels_for,
    mask_of,
    prefill_attention,
)
from kvfold.runtimes.kernels.cpu_layer import Form, Steps, asked_of
from kvfold.runtimes.kernels.dispatch import FEW_TOKENS, Way, choose, decode_attention
from kvfold.runtimes.kernels.packed_tokens import (
    AgedTokens,
    IndexedTokens,
    RunTokens,
    Stored,
    read,
    read_all,
    read_for_product,
    read_once,
)
from kvfold.runtimes.kernels.rotary import tables_of
from kvfold.runtimes.transformers.attention_by_age import AttentionByAge
from kvfold.runtimes.transformers.forward_state import CURRENT_STATE, ForwardState
from kvfold.runtimes.transformers.head_runs import AttentionByRun
from kvfold.runtimes.transformers.new_tokens import NewTokens
from kvfold.runtimes.transformers.on_read import Heads, KeysOnRead, all_keys, all_values, tables_on_read, value_map
from kvfold.runtimes.transformers.projections import Made, projections
from kvfold.runtimes.transformers.some_tokens import AttentionToSome
from kvfold.runtimes.transformers.temperature import tempered


class FoldedAttention(NewTokens, AttentionByAge, AttentionByRun, AttentionToSome):
    """Attention of one layer under its cache spec. Takes the place of a family's attention module.

    A layer whose `owner` is another one reads that layer's cache: it has no way to make keys and values itself. `shapes`: of
    its tensors, where a process has only a part of them.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    k_a_proj: Any
    k_p_proj: Any
    k_u_proj: Any
    v_a_proj: Any
    s_proj: Any

    def __init__(
        self,
        config: PretrainedConfig,
        layer: AttentionLayer,
        spec: CacheSpec,
        norms: tuple[nn.Module | None, nn.Module | None],
        owner: int | None = None,
        shapes: Mapping[str, Shape] | None = None,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)  # the family's own __init__ would build the modules that this one replaces
        self.config, self.layer, self.spec = config, layer, spec
        self.layer_idx, self.scaling, self.is_causal = layer.index, layer.scaling, True
        self.owner = layer.index if owner is None else owner
        shapes = shapes or tensor_shapes(layer, spec, owns=self.owner == layer.index)
        self.made_heads = layer.num_kv_heads
        for name, module in projections(shapes, **options).items():
            setattr(self, name, module)
        self.sinks = nn.Parameter(torch.empty(shapes["sinks"][0].size, **options)) if "sinks" in shapes else None
        self.q_norm, self.k_norm = norms[0], norms[1] if "k_norm.weight" in shapes else None
        if layer.alibi and spec.tokens is not None and spec.tokens.rule != RECENCY and not spec.tokens.columns:
            raise PlanError(
                f"layer {layer.index}: with ALiBi it has to be stored where tokens stood of which {spec.tokens.rule} chooses"
                " (tokens.columns); fold the model again."
            )
        check_sinks(layer, spec)
        self.steps, self.made = Steps(), Made()
        if self.s_proj is not None:  # which chooses, and gets no gradient
            self.s_proj.requires_grad_(False)

    def train(self, mode: bool = True) -> FoldedAttention:
        """Forget what was made of weights."""
        self.made.forget()
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        s = self.spec
        whose = "" if self.owner == self.layer_idx else f" of layer {self.owner}"
        bits = "".join(f", {side} {f.tiers}" for side, f in (("keys", s.k_bits), ("values", s.v_bits)) if f)
        return f"keys {s.num_kv_heads} x {s.head_dim}, values {s.num_v_heads} x {s.v_head_dim}{bits}{whose}"

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
        """Takes the arguments of every family: some call the cache layer_past, BLOOM hands over alibi and the residual, MPT a
        bias of positions."""
        if kwargs.get("cache") is not None:
            raise ValueError("continuous batching pages full-width keys; use generate() with a folded model.")
        cache = layer_past if past_key_values is None else past_key_values
        state = CURRENT_STATE.get() if kv_state is None else kv_state
        mask = mask_of(hidden_states, attention_mask, alibi, position_bias, self.layer.num_attention_heads)
        position_embeddings = tables_of(self.layer, hidden_states, position_embeddings, kwargs.get("position_ids"))
        q = tempered(self.layer, self._queries(hidden_states, position_embeddings), state, cache)
        z, y = self._keys_values(hidden_states, position_embeddings, cache, state, mask)
        tables = None
        if self._rotates_on_read:
            state = state or ForwardState()
            seen_by = (cache, hidden_states, kwargs.get("position_ids"))
            tables = tables_on_read(self, position_embeddings, state, *seen_by)
        evenly = state is not None and state.positions_BS is not None and state.once("evenly", state.turns_evenly)
        wants_probs, kept, seen = bool(kwargs.get("output_attentions")), (z, y), mask
        if isinstance(z, RunTokens) and self.spec.drops_of_layer:
            evenly = evenly and z.places[0].first is None
            z, y, seen, tables = self._of_layer(q, z, y, mask, tables, wants_probs=wants_probs)
        out_BTNH, probs = self._read(q, z, y, seen, tables, wants_probs=wants_probs, evenly=evenly)
        scored = isinstance(kept[0], RunTokens) and kept[0].tokens.scored
        if scored and hasattr(cache, "owned") and self.owner == self.layer_idx:
            self._choose(q, *kept, mask, cache.layers[self.layer_idx], tables)
        return self._output(out_BTNH, residual), probs

    @property
    def _rotates_on_read(self) -> bool:
        return self.spec.rope == "on_read" and (self.spec.readers_rotate or self.owner == self.layer_idx)

    def _read(
        self,
        q: Tensor,
        z: Any,
        y: Any,
        mask: Tensor | None,
        tables: tuple[Tensor, Tensor] | None,
        *,
        wants_probs: bool = False,
        evenly: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries [B, N, T, H] over all tokens that they may see, stored as z and y: [B, T, N, H or V], and probabilities
        where they are wanted. `tables`: cos and sin of these tokens, where keys are rotated on read. `evenly`: as KeysOnRead
        has it."""
        if self._reads_some(q, z):
            return self._attend_to_some(q, z, y, mask, wants_probs=wants_probs)
        z = z.stored if isinstance(z, IndexedTokens) else z
        if self.spec.shared_latent:
            z = y = read_once(z)
        keys = None
        if self.spec.rope == "on_read" or self.spec.hidden:
            keys = KeysOnRead(self, tables, evenly=evenly)
        attend: Any = self._attend_by_age if isinstance(z, AgedTokens) else self._attend
        attend = self._attend_by_run if isinstance(z, RunTokens) else attend
        return attend(q, z, y, mask, keys, wants_probs=wants_probs)

    def _queries(self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        q = self._heads(self.q_proj(hidden_BTD), self.layer.num_attention_heads, self.q_norm)
        return q if rotary is None else self._turn(q, rotary)

    def _heads(self, x_BTF: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
        """[B, T, heads*width] -> [B, heads, T, width], normalised where the family does."""
        if norm is not None and self.layer.flat_norm:
            x_BTF, norm = norm(x_BTF), None
        x = x_BTF.unflatten(-1, (heads, -1))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _output(self, out_BTNH: Tensor, residual: Tensor | None) -> Tensor:
        out = self.o_proj(out_BTNH.flatten(2))
        if self.training and self.layer.output_dropout:
            out = nn.functional.dropout(out, self.layer.output_dropout)
        return out if residual is None else residual + out

    def _attend(
        self,
        q: Tensor,
        z: Stored,
        y: Stored,
        mask: Tensor | None,
        on_read: KeysOnRead | None = None,
        *,
        wants_probs: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, N, H or V], and probabilities where they are wanted. on_read: makes the source's keys, where they are
        rebuilt on read; otherwise absorbed queries meet the stored ones."""
        keys = on_read(z) if on_read else None
        dropout = self.layer.attention_dropout if self.training else 0.0
        few = q.shape[2] <= FEW_TOKENS
        absorbed = self._absorb(q) if few and keys is None else None  # kernels are asked about what they will be given
        rebuild = on_read.by_kernel(z, q.dtype) if few and on_read else None
        way = choose(
            q if absorbed is None else absorbed, z, y, on_read=keys is not None, rebuilds=rebuild is not None,
            eager=self._eager() or wants_probs, exact=wants_probs or dropout > 0, softcap=self.layer.softcap,
            head_dim=self.layer.head_dim,
        )  # fmt: skip
        if way is Way.REBUILT:
            k, v = all_keys(self, z, on_read), all_values(self, y)
            return prefill_attention(q, k, v, mask, scale=self.scaling, dropout=dropout, sinks=self.sinks), None
        if way in (Way.CPU, Way.TRITON):
            return self._by_kernel(q if absorbed is None else absorbed, z, y, mask, rebuild), None
        if self.spec.hidden:  # a network's values are rebuilt before they are averaged
            assert keys is not None, "networks are applied on read"
            return self._over_rebuilt(way, q, keys, y, mask, dropout)
        out, probs = self._over_stored(
            way, q if keys else self._absorb(q) if absorbed is None else absorbed, z, y, mask, keys, dropout
        )
        return self._lead_values_back(out), probs

    def _by_kernel(self, q: Tensor, z: Stored, y: Stored, mask: Tensor | None, rebuild: Any) -> Tensor:
        """Few queries, as they meet stored keys or keys that the device's kernel rebuilds."""
        back, out = value_map(self, q.dtype), None
        if kernels_for(q) is cpu_decode:
            forms, asked = [Form(z, y, rebuild=rebuild)], [asked_of(q, z.shape[2], mask)]
            out = self.steps.read(forms, asked, y.shape[3], back, heads=q.shape[1], **self._scores)
        if out is None:
            out = kernel_attention(q, z, y, mask, rebuild=rebuild, map=back, **self._scores)
        return out if back else self._lead_values_back(out)

    def _over_stored(
        self, way: Way, q: Tensor, z: Stored, y: Stored, mask: Tensor | None, keys: Heads | None, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Averages of stored values."""
        if way is Way.PIECES:
            of_values = read if self.spec.shared_latent else read_for_product
            pieces, values = keys or functools.partial(read_for_product, z), functools.partial(of_values, y)
            sizes = {"tokens": z.shape[2], "elements": self._elements_at_a_time} | self._scores
            return chunked_attention(q, pieces, values, mask=mask, **sizes), None
        if way is Way.EAGER:
            k = read_all(z) if keys is None else keys(0, z.shape[2])
            return grouped_attention(q, k, read_all(y), mask, dropout=dropout, **self._scores)
        if way is Way.STORED:
            sizes = {"scale": self.scaling, "dropout": dropout, "sinks": self.sinks}
            return prefill_attention(q, read_all(z), read_all(y), mask, **sizes), None
        return decode_attention(q, z, y, mask, way=way, **self._scores), None

    def _over_rebuilt(
        self, way: Way, q: Tensor, keys: Heads, y: Stored, mask: Tensor | None, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Averages of values that are rebuilt."""
        S = y.shape[2]

        def values(start: int, end: int) -> Tensor:
            return self._rebuild(read(y, start, end), "v_b")

        if way is Way.EAGER:
            return grouped_attention(q, keys(0, S), values(0, S), mask, dropout=dropout, **self._scores)
        elements = self._elements_at_a_time
        return chunked_attention(q, keys, values, S, mask, elements=elements, **self._scores), None

    def _eager(self) -> bool:
        """The fused kernels cap no scores. What a family that only knows eager means by it, masks that are numbers to add,
        they take as well."""
        asked = self.config._attn_implementation == "eager" and not self.layer.only_eager
        return asked or self.layer.softcap is not None

    def _absorb(self, q_BNTH: Tensor) -> Tensor:
        """Queries [B, N, T, H] -> [B, N, T, R], so that they meet the stored keys directly."""
        if self.k_b_proj is None:
            return q_BNTH
        B, N, T, H = q_BNTH.shape
        per_kv_head = q_BNTH.reshape(B, self.layer.num_kv_heads, -1, H)
        return self.k_b_proj(per_kv_head, heads=self.layer.num_kv_heads, transposed=True).reshape(B, N, T, -1)

    def _rebuild(self, z_BCSR: Tensor, way: str, near: bool = False) -> Tensor:
        """Stored heads [B, C, S, R] -> the source's heads [B, K, S, H]; unchanged where there is no way back."""
        if getattr(self, f"{way}_proj") is None:
            return z_BCSR
        return self._way(way, z_BCSR, near).unflatten(3, (-1, self.layer.head_dim)).transpose(2, 3).flatten(1, 2)

    def _way(self, way: str, x: Tensor, near: bool = False) -> Tensor:
        """In ("k_a", "v_a") or back ("k_b", "v_b"): a linear map of each group, and a network where the plan has one."""
        out = getattr(self, f"{way}_proj")(x, last=near)
        if self.spec.hidden:
            inner = nn.functional.gelu(getattr(self, f"{way}_up_proj")(x))
            out = out + getattr(self, f"{way}_down_proj")(inner)
        return out

    def _lead_values_back(self, out_BTNV: Tensor) -> Tensor:
        """Averaged latents [B, T, N, V] -> averaged values of the source's heads [B, T, N, H], if o_proj expects those."""
        if self.v_b_proj is None:
            return out_BTNV
        B, T, N, V = out_BTNV.shape
        per_kv_head = out_BTNV.transpose(1, 2).reshape(B, self.layer.num_kv_heads, -1, V)
        return self.v_b_proj(per_kv_head, heads=self.layer.num_kv_heads).reshape(B, N, T, -1).transpose(1, 2)


@functools.cache
def attention_class(
    family_attention: type[nn.Module], base: type[FoldedAttention] = FoldedAttention
) -> type[FoldedAttention]:
    """`base` that is also an instance of the family's class, by which transformers records attentions."""
    name = base.__name__.removesuffix("Attention") + family_attention.__name__
    cls = type(name, (base, family_attention), {"__module__": __name__})
    globals()[name] = cls  # pickle and copy look a class up by its module and name
    return cls
