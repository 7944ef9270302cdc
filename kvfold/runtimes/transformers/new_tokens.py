"""What new tokens add to a cache, and what a layer then sees of all tokens."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.kernels.dispatch import rotated_heads
from kvfold.runtimes.kernels.packed_tokens import (
    IndexedTokens,
    RunTokens,
    Stored,
    by_runs,
    first_numbers,
    newest,
    side_by_side,
    with_gradient,
)
from kvfold.runtimes.kernels.rotary import apply_rotary
from kvfold.runtimes.kernels.seen_tokens import begin_of
from kvfold.runtimes.transformers.foreseen_run import without_cache
from kvfold.runtimes.transformers.forward_state import ForwardState


@functools.cache
def _warn_of_floats(cache: str, packed: bool) -> None:
    """Once for each kind of cache."""
    if packed:
        warnings.warn(
            f"this model's cache is packed in few bits, but a {cache} keeps its numbers as they are, at full size: leave"
            " past_key_values out, or pass kvfold.FoldedCache(model.kv_plan).",
            stacklevel=2,
        )


class NewTokens(nn.Module):
    """The part of `FoldedAttention` that makes and stores keys and values."""

    spec: CacheSpec
    layer: AttentionLayer
    layer_idx: int
    owner: int
    made_heads: int
    k_norm: Any
    k_proj: Any
    v_proj: Any
    k_a_proj: Any
    k_p_proj: Any
    k_u_proj: Any
    v_a_proj: Any
    s_proj: Any
    _heads: Callable[[Tensor, int, nn.Module | None], Tensor]
    _way: Callable[[str, Tensor], Tensor]
    _aged: Callable[[Tensor, int], Any]

    def _keys_values(
        self,
        hidden_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Any,
        state: ForwardState | None,
        mask: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """All tokens that the T queries may see: z [B, C, S, R], y [B, U, S, V]."""
        if self.owner != self.layer_idx:
            return self._stored_by(self.owner, state, hidden_BTD.device)
        new_z, new_y = self._new_keys_values(hidden_BTD, rotary)
        known = (self._stored_by(layer, state, new_z.device)[0] for layer in self.spec.predicted_from)
        below = [first_numbers(stored, self.spec) for stored in known]
        if below:
            new_z = new_y = new_z - self.k_p_proj(newest(side_by_side(below), new_z.shape[2]))
        z: Any = new_z
        y: Any = new_y
        if cache is not None and (self.spec.recent or self.s_proj is not None) and not hasattr(cache, "owned"):
            raise ValueError(
                "recent tokens in a finer form, and tokens that stay for what they are worth, need kvfold's own cache: leave"
                " past_key_values out, or pass kvfold.FoldedCache(model.kv_plan)."
            )
        if cache is not None and not hasattr(cache, "owned"):
            _check_foreign(cache, self.layer_idx, new_z)
            _warn_of_floats(type(cache).__name__, self.spec.k_bits is not None or self.spec.v_bits is not None)
        if not hasattr(cache, "owned"):  # without kvfold's own cache numbers lose what it would lose
            z, y = new_z, new_y = self._as_stored(new_z, new_y)
        if cache is not None:
            row = {} if self.spec.tokens is None else {"begin_B": begin_of(mask)}
            worth = {} if self.s_proj is None else {"worth_BCT": self._worth(hidden_BTD)}
            z, y = cache.update(new_z, new_y, self.layer_idx, **row, **worth)
            z, y = with_gradient(z, new_z), y if self.spec.shared_latent else with_gradient(y, new_y)
            y = (z.stored if isinstance(z, IndexedTokens) else z) if self.spec.shared_latent else y
        # without a cache a prompt sees all of itself where it is chosen from when it was read
        if self.spec.tokens is not None and not isinstance(z, RunTokens) and not self.spec.drops_of_layer:
            z, y = by_runs(z, self.spec.tokens), by_runs(y, self.spec.tokens)
            if self.s_proj is not None:
                z = without_cache(z, self._worth(hidden_BTD), begin_of(mask))
                y = y._replace(places=z.places)
        if state is not None:
            state.stored[self.layer_idx] = (z, y)
        if below:
            z = y = side_by_side([z, *below])
        return z, y

    def _worth(self, hidden_BTD: Tensor) -> Tensor:
        """[B, C, T]: what the tokens will be worth to each stored head."""
        return self.s_proj(hidden_BTD.detach()).transpose(1, 2)

    def _stored_by(self, layer: int, state: ForwardState | None, device: torch.device) -> tuple[Stored, Stored]:
        """What another layer stores of all tokens that queries may see."""
        if state is None or layer not in state.stored:
            raise ValueError(
                f"layer {self.layer_idx} reads the cache of layer {layer}, which has not run in this forward; call"
                " the whole ...ForCausalLM model, not a part of it."
            )
        z, y = state.stored[layer]
        return z.to(device), y.to(device)

    def _new_keys_values(self, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """What the T new tokens add to the cache: z [B, C, T, E], y [B, U, T, G], which a shared latent is at once."""
        heads = self.spec.num_kv_heads if self.k_a_proj is None else self.made_heads
        z = self._heads(self.k_proj(hidden_BTD), heads, self.k_norm)
        if rotary is not None and (self.spec.rope == "applied" or self.spec.fast_pairs):
            z = self._turn(z, rotary, self.spec.fast_pairs or None)
        if self.spec.shared_latent:
            y = None
        elif self.v_a_proj is None:
            y = self.v_proj(hidden_BTD).unflatten(-1, (-1, self.spec.made_widths[1])).transpose(1, 2)
        else:
            y = self._way("v_a", self.v_proj(hidden_BTD).unflatten(-1, (self.spec.num_v_heads, -1)).transpose(1, 2))
        if self.k_a_proj is not None:
            z = self._way("k_a", z.unflatten(1, (self.spec.num_kv_heads, -1)).transpose(2, 3).flatten(3))
        if self.k_u_proj is not None:
            z = z + self._heads(self.k_u_proj(hidden_BTD), self.spec.num_kv_heads, None)
        if y is None and self.v_proj is not None:
            z = z + self._heads(self.v_proj(hidden_BTD), self.spec.num_kv_heads, None)
        return z, z if y is None else y

    def _turn(self, x_BNTH: Tensor, rotary: Any, pairs: int | None = None) -> Tensor:
        """Heads of new tokens, rotated by cos and sin of these, of which the first `pairs` turn; all if None."""
        cos, sin = rotary
        if self.spec.rope == "applied":
            return apply_rotary(x_BNTH, cos, sin)  # to the original's last bit
        return rotated_heads(x_BNTH, x_BNTH.shape[3], cos, sin, pairs)

    def _as_stored(self, z_BCTE: Tensor, y_BUTG: Tensor) -> tuple[Any, Any]:
        """What a cache would give back of new tokens."""
        if self.spec.shared_latent:
            z = self._aged(z_BCTE, 0)
            return z, z
        return self._aged(z_BCTE, 0), self._aged(y_BUTG, 1)


def _check_foreign(cache: Any, layer: int, new_BCTR: Tensor) -> None:
    """Raise ValueError where a cache that is not ours shows places of tokens to come, which would be taken for tokens, or
    holds keys that this layer has not made."""
    layers = getattr(cache, "layers", ())
    own = layers[layer] if layer < len(layers) else None
    if getattr(own, "is_compileable", False):
        raise ValueError(
            f"a {type(cache).__name__} shows a folded model places of tokens that are not there yet: leave past_key_values"
            " out, or pass kvfold.FoldedCache(model.kv_plan)."
        )
    held = getattr(own, "keys", None)
    if held is not None and held.numel() and held.shape[1::2] != new_BCTR.shape[1::2]:
        raise ValueError(
            f"the cache that was passed holds {held.shape[1]} key heads of {held.shape[3]} numbers in layer {layer}, which"
            f" stores {new_BCTR.shape[1]} of {new_BCTR.shape[3]}. Prefix tuning makes keys of the original's shape: train by"
            " LoRA or prompt tuning instead."
        )
