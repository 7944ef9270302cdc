"""A real model's habits, built into tiny random weights by hand: an attention sink, a massive activation, large key biases.

Trained decoders make their first token a sink, whatever it is: one channel of its residual stream grows to hundreds of
times the others, keys read that channel, most of the attention goes there, and its value is nearly zero. Here it comes
about so:

1. Embeddings are a code, different for every token, and a constant in the channel `CONSTANT`.
2. In layer 0 the first query head of every group attends to all tokens alike (its query is zero) and takes the average of the
   codes away. At the first position that leaves nothing, elsewhere a code that differs from the average.
3. The norm before the MLP therefore makes the constant sqrt(hidden_size) at the first position, and small elsewhere. One
   neuron squares it and writes it into the channel `MASSIVE`.
4. Keys of the later layers read `MASSIVE` into the number of a head that turns slowest with distance, where all queries have
   the constant; values hardly read it.
"""

from __future__ import annotations

import torch
import transformers as tf

MASSIVE, CONSTANT = -1, -2
CODE = 2.0
"""Root mean square of the numbers of a code."""

LEVEL = 0.5
"""The constant, and how large a code's average may be off before it goes unnoticed."""

ACTIVATION = 600.0
KEY = 40.0
SCORE = 6.0
"""What the sink's key has over others, before softmax, at the residual stream that the codes alone would make."""

KEY_BIAS = 30.0


@torch.no_grad()
def add_sink(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The same model, changed in place. Its key/value heads must hold fewer numbers than the residual stream."""
    layers = model.model.layers
    _embed(model, _code_size(model))
    for layer in layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight[[MASSIVE, CONSTANT]] = 0
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[[MASSIVE, CONSTANT]] = 1
        _set_biases(layer.self_attn)
    _take_the_average_away(layers[0], _code_size(model))
    _notice_the_first(layers[0].mlp, model.config.hidden_size)
    for layer in layers[1:]:
        _attend_to_it(layer.self_attn, model.config)
    return model


def _code_size(model: tf.PreTrainedModel) -> int:
    size = model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    assert size <= model.config.hidden_size - 2, "codes and the two channels do not fit beside each other"
    return size


def _embed(model: tf.PreTrainedModel, size: int) -> None:
    """All of one length, so that the first norm divides all by the same."""
    weight_VD = model.get_input_embeddings().weight
    code_VC = weight_VD[:, :size]
    torch.nn.init.normal_(code_VC)  # that of the padding token was zero
    code_VC *= CODE / code_VC.square().mean(1, keepdim=True).sqrt()
    weight_VD[:, size:] = 0
    weight_VD[:, CONSTANT] = LEVEL


def _take_the_average_away(layer: torch.nn.Module, size: int) -> None:
    attention, hidden = layer.self_attn, layer.input_layernorm.weight.shape[0]
    H, group = attention.head_dim, attention.num_key_value_groups
    rms = ((size * CODE**2 + LEVEL**2) / hidden) ** 0.5
    layer.input_layernorm.weight[:size] = rms  # what attention sees of a code is the code
    attention.v_proj.weight[:] = torch.eye(size, hidden)
    out_DKGH = attention.o_proj.weight.view(hidden, -1, group, H)
    out_DKGH *= 0.02  # what the other heads write must not hide that nothing is left
    out_DKGH[:, :, 0] = -torch.eye(hidden, size).view(hidden, -1, H)
    for tensor in (attention.q_proj.weight, attention.q_proj.bias):
        if tensor is not None:
            tensor.view(-1, group, H, *tensor.shape[1:])[:, 0] = 0
    if attention.v_proj.bias is not None:
        attention.v_proj.bias.zero_()


def _notice_the_first(mlp: torch.nn.Module, hidden: int) -> None:
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[0] = 0
        projection.weight[0, CONSTANT] = 1
    mlp.down_proj.weight[:, 0] = 0
    mlp.down_proj.weight[MASSIVE, 0] = ACTIVATION / hidden


def _attend_to_it(attention: torch.nn.Module, config: tf.PretrainedConfig) -> None:
    """Through the last number of the first half of a head, whose partner is the last of all."""
    H, slowest = attention.head_dim, attention.head_dim // 2 - 1
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:, [MASSIVE, CONSTANT]] = 0
    attention.v_proj.weight[:, MASSIVE] = 0.01
    key = KEY
    if hasattr(attention, "k_norm"):  # keys are of one length: what the norm multiplies by makes it huge
        attention.k_proj.weight[slowest::H] *= 0.2
        attention.k_norm.weight[slowest], key = KEY / H**0.5, 8.0
    attention.k_proj.weight[slowest::H, MASSIVE] = key / config.hidden_size**0.5
    attention.q_proj.weight[slowest::H] *= 0.1  # a chance number of a query times a huge key would decide everything
    seen = LEVEL / CODE  # the constant as later layers' norms show it
    attention.q_proj.weight[slowest::H, CONSTANT] = SCORE * H**0.5 / KEY / seen


def _set_biases(attention: torch.nn.Module) -> None:
    """Large ones in the second slowest pair of every key head."""
    if attention.k_proj.bias is not None:
        bias_KH = attention.k_proj.bias.view(-1, attention.head_dim)
        bias_KH[:, attention.head_dim // 2 - 2] += KEY_BIAS
        bias_KH[:, -2] -= KEY_BIAS
