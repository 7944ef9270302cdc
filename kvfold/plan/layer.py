"""The canonical form that every family is read into: facts, weights and folded weights of one attention layer.

Letters of shape suffixes, here and everywhere: B batch, T query tokens, S cached tokens, D hidden, N query heads,
K kv heads of the source, H head_dim, C stored key heads, R width of a stored key head, U stored value heads,
V width of a stored value head, t = K/C source heads per stored head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FAST = 1 / 64
"""Radians per token."""


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """Facts of one layer of the original model.

    `window`: tokens that a query sees at most, itself included: a sliding window, or the chunk that a mask of the family's
    own leaves it. `qk_norm`: queries and keys are normalised before rotation, per head or (`flat_norm`)
    all heads of a token at once; `norm_offset` is added to the norm's weight. `own_norms`: every head has weights of its own
    for that; `centred_norm`: the mean is taken off first; `norm_bias`: there is one. `rotary_dim`: numbers of each head that
    are rotated, 0 for none; `rotary_kind`: which of the family's rotations, if it has several; `rotary_speeds`: radians per
    token of each pair, nothing where they change with the length of a sequence. `interleaved`: the family's own code rotates
    neighbours, and its weights are read in another order (`order_of_numbers`); `tables_interleaved`: so are its tables.
    `makes_tables`: attention makes them itself, of positions and `rotary_speeds`. `position_axes`: positions of one token,
    more than one where it stands in an image. `only_eager`: the family's own code knows no other attention than eager, and
    means by it no more than that masks are numbers to add. `alibi`: scores get a bias by distance. `softcap`: scores are
    capped by tanh. `sinks`: each query head's softmax has one more score, a parameter of its own, which no token goes with.
    `temperature`: (scale, floor) of queries that are multiplied by 1 + scale * log(1 + n) behind n times floor tokens.
    `output_dropout`: of the layer's output, which some families apply inside attention.
    """

    index: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None = None
    rotary_dim: int
    rotary_kind: str | None = None
    rotary_speeds: tuple[float, ...] = ()
    interleaved: bool = False
    tables_interleaved: bool = False
    makes_tables: bool = False
    only_eager: bool = False
    qk_norm: bool = False
    flat_norm: bool = False
    norm_offset: float = 0.0
    own_norms: bool = False
    centred_norm: bool = False
    norm_bias: bool = False
    position_axes: int = 1
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    temperature: tuple[float, int] | None = None
    output_dropout: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    attention_dropout: float = 0.0

    @property
    def order_of_numbers(self) -> tuple[int, ...]:
        """Of each head, as the family's own code has them: the first of each rotated pair, the second ones, then the rest."""
        numbers = range(self.head_dim)
        if not self.interleaved:
            return tuple(numbers)
        return (*numbers[: self.rotary_dim : 2], *numbers[1 : self.rotary_dim : 2], *numbers[self.rotary_dim :])

    @property
    def norms_tell_heads_apart(self) -> bool:
        """Whether a norm does other things to one head than to the next."""
        return self.flat_norm or self.own_norms

    @property
    def fast_pairs(self) -> int:
        """How many of the first pairs of a head turn by more than FAST."""
        slow = (i for i, speed in enumerate(self.rotary_speeds) if speed <= FAST)
        return next(slow, len(self.rotary_speeds))

    def speeds_without(self, fast_pairs: int) -> tuple[float, ...]:
        """Of each pair, 0 for the first ones."""
        return tuple(0.0 if i < fast_pairs else speed for i, speed in enumerate(self.rotary_speeds))


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Tensors of one layer of the original model, [out_features, in_features] as in nn.Linear.

    q_proj [N*H, D], k_proj and v_proj [K*H, D], o_proj [D, N*H]; biases [out] or None; q_norm, k_norm [H] (flat norms, and
    where every head has its own, [N*H] and [K*H]) or None, and so their biases; sinks [N] or None.
    """

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_bias: Tensor | None = None
    sinks: Tensor | None = None
