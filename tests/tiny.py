"""Tiny random models with everything that trips converters up, and ways to run them."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch
import transformers as tf
from families import FAMILIES
from sinks import add_sink
from torch import Tensor

from kvfold.architectures.base import architecture
from kvfold.runtimes.transformers.load import auto_class
from kvfold.testing import assert_close

VOCAB = 211
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
MODELS = {
    "llama_mha": (tf.LlamaConfig, {"num_key_value_heads": 8}),
    "llama_yarn": (tf.LlamaConfig, {"head_dim": 12, "rope_parameters": YARN, "attention_bias": True}),
    "mistral_window": (tf.MistralConfig, {"sliding_window": 9, "head_dim": 16}),
    "qwen2_bias_tied": (tf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3_norm_window": (
        tf.Qwen3Config,
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "use_sliding_window": True,
        },
    ),
}
MODELS["neox_partial"] = (
    tf.GPTNeoXConfig,
    {"num_attention_heads": 4, "num_key_value_heads": 4, "rotary_pct": 0.25, "attention_bias": True},
)
MODELS |= {
    "bloom_alibi": (tf.BloomConfig, {"num_key_value_heads": 8, "n_head": 8, "n_layer": 3}),
    "opt_learned": (tf.OPTConfig, {"num_key_value_heads": 8, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2_conv": (tf.GPT2Config, {"num_key_value_heads": 8, "scale_attn_by_inverse_layer_idx": True}),
    "gemma2_softcap": (
        tf.Gemma2Config,
        {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 11},
    ),
    "gemma3_norm": (
        tf.Gemma3TextConfig,
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3_partial": (
        tf.Phi3Config,
        {
            "head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2_flat_norm": (tf.Olmo2Config, {"rms_norm_eps": 1e-6}),
    "granite_scale": (tf.GraniteConfig, {"attention_multiplier": 0.3}),
}

EXPERTS_IN_TURN = {"experts_implementation": "eager"}
"""In float64, which torch's grouped products do not know."""

SINKS = {
    "llama_sink": (
        tf.LlamaConfig,
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16},
    ),
    "qwen2_sink": (tf.Qwen2Config, {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3_sink": (tf.Qwen3Config, {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}),
}
"""With habits of trained models: sinks.py."""

MODELS |= SINKS
MIXED_WINDOWS = ("qwen3_norm_window", "gemma2_softcap", "gemma3_norm")
FULL_ATTENTION = ("llama_mha", "llama_yarn", "qwen2_bias_tied")


def kv_heads(name):
    """Of a layer of MODELS[name]."""
    return MODELS[name][1].get("num_key_value_heads", 4)


def make_tiny(name: str, *, seed: int = 0, **changes: object) -> tf.PreTrainedModel:
    """A random model whose biases and norms are not at their trivial initial values."""
    config_class, fields = (MODELS | FAMILIES)[name]
    torch.manual_seed(seed)
    config = config_class(**_with_sizes(fields) | changes)
    eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = architecture(config.model_type).model_class._from_config(config, **eager).float().eval()
    with torch.no_grad():
        for inner, parameter in model.named_parameters():
            if parameter.ndim == 1 or inner.endswith("_norm.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return add_sink(model) if name in SINKS else model


def _with_sizes(fields: dict) -> dict:
    """Of the language model, which may stand beside others."""
    inner = fields.get("text_config")
    return (
        COMMON | fields
        if inner is None
        else fields | {"text_config": COMMON | inner, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )


def save_tiny(model: tf.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: str | Path, **options: object) -> tf.PreTrainedModel:
    config = json.loads((Path(folder) / "config.json").read_text())
    if config.get("attn_logit_softcapping") and "kv_compression_config" not in config:
        options.setdefault("attn_implementation", "eager")  # transformers' sdpa drops the cap
    return auto_class(folder).from_pretrained(folder, **options).eval()


def exact_tables(network: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The same in float64, with cos and sin in it too: in float32 their last bit depends on how many are made at once, and a
    last bit decides between two codes. Of families with one plain rotation, or with none."""

    def tables(rotary, x, position_ids):
        angles = (position_ids[..., None].double() * rotary.inv_freq.double()).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    for module in network.modules():
        if hasattr(module, "inv_freq"):
            module.forward = functools.partial(tables, module)
    return network.double()


def tokens(batch: int = 3, length: int = 40, *, seed: int = 7) -> Tensor:
    """Random tokens without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: tf.PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    return model(ids, use_cache=False, **options).logits


def step(network, ids, mask, positions, cache, start, end):
    """Logits of the tokens start:end after those that `cache` holds."""
    with torch.no_grad():
        return network(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits


def in_steps(network, ids, mask, positions, cache, cuts):
    """Logits of all tokens, which come in steps that end at `cuts`."""
    starts = [0, *cuts[:-1]]
    parts = [step(network, ids, mask, positions, cache, *cut) for cut in zip(starts, cuts, strict=True)]
    return torch.cat(parts, 1)


def check_gradients_through_a_cache(network: tf.PreTrainedModel, ids: Tensor, *, tolerance: float) -> None:
    """They are those without one, where a prompt goes in at once."""
    without, through = {}, {}
    for found, use_cache in ((without, False), (through, True)):
        network.zero_grad()
        network(ids, labels=ids, use_cache=use_cache).loss.backward()
        found |= {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert without.keys() == through.keys() and any("k_proj" in name for name in without)
    for name, gradient in without.items():
        if gradient.norm() < 1e-12:  # a bias of keys moves all scores alike: what is left is rounding
            assert through[name].norm() < 1e-12, name
        else:
            assert_close(through[name], gradient, tolerance=tolerance, name=name)


def copy_heads(model: tf.PreTrainedModel, scales: list[float]) -> tf.PreTrainedModel:
    """Every key/value head becomes a scaled copy of the first: keys and values of a layer have rank head_dim."""
    for attention in architecture(model.config.model_type).modules(model):
        for heads_KHD in key_value_heads(attention):
            first = heads_KHD[0].clone()
            heads_KHD.copy_(torch.stack([scale * first for scale in scales]))
        norm = getattr(attention, "k_norm", None)
        if norm is not None and norm.weight.numel() > attention.head_dim:  # one norm over all heads
            norm.weight.data.copy_(norm.weight.data[: attention.head_dim].repeat(len(scales)))
    return model


def key_value_heads(attention: torch.nn.Module) -> list[Tensor]:
    """Views [K, H, ...] of the weights and biases that make keys and values."""
    if hasattr(attention, "query_key_value"):
        fused = attention.query_key_value
        size = getattr(attention, "head_size", None) or attention.head_dim
        heads = [p.data.unflatten(0, (-1, 3, size)) for p in (fused.weight, fused.bias) if p is not None]
        return [tensor[:, which] for tensor in heads for which in (1, 2)]
    if hasattr(attention, "c_attn"):
        tensors = [
            part for p in (attention.c_attn.weight.data.T, attention.c_attn.bias.data) for part in p.chunk(3)[1:]
        ]
    elif hasattr(attention, "qkv_proj"):
        k = attention.num_key_value_heads * attention.head_dim
        tensors = list(attention.qkv_proj.weight.data[-2 * k :].chunk(2))
    else:
        parameters = [t for proj in (attention.k_proj, attention.v_proj) for t in (proj.weight, proj.bias)]
        tensors = [t.data for t in parameters if t is not None]
    return [tensor.unflatten(0, (-1, attention.head_dim)) for tensor in tensors]


def in_attention(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to some family's attention."""
    return re.search(r"\.(self_attn|attention|self_attention|attn)\.", name) is not None


def rotation(kwargs: dict) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin [T, r] in float64 out of what an attention module was called with; None where nothing rotates."""
    tables = kwargs.get("position_embeddings")
    return (None, None) if tables is None else tuple(x[0].double() for x in tables)
