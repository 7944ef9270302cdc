"""The contract of a family: where its attention sits, its facts, and its tensors in canonical form."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from kvfold import registry
from kvfold.architectures._experts import ExpertsOnMeta
from kvfold.architectures._refused import REFUSED
from kvfold.architectures._rotary import rotary_speeds, rotated_numbers
from kvfold.architectures._sizes import check_sizes
from kvfold.errors import CheckpointError, one_line
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.naming import MODEL_TYPE_PREFIX
from kvfold.plan.typed import shortened


class Architecture(ABC):
    """One Hugging Face model_type. The defaults describe the Llama layout, which most families share.

    `layers` and `attention` lead from the causal model to one layer's attention module, `output` from there to the projection
    behind its heads, `rotary` to the module that makes cos and sin; `passes_keywords` says whether a forward's keyword
    arguments reach attention, `tells_positions` whether position_ids do, `base` leads to the model without its head where
    transformers' own `base_model` does not, `dead` are patterns of tensors in old files that no current model reads,
    `keeps_documents_apart` whether positions that begin again start a document that sees nothing of the one before;
    `attn_implementation` names the only one that the family has, if it does not take others from transformers'
    AttentionInterface; `no_stock_gqa` is why the family has no stock grouped-query class, if it has none, `not_in_vllm` why
    kvfold does not serve it there; `mlp_in` and `mlp_out` lead from a layer to the projections whose rows and whose columns
    are the MLP's neurons. `in_gguf`: GGUF files have its projections as kvfold reads them. `beside`: beginnings of
    names of what no text passes. `repeats_heads`: transformers' own model caches every key and value once for each of its
    queries. `sums_late`: vLLM's own model adds up what its processes have of attention together with what they have of the
    MLP. `norm_names`: of the modules that normalise queries and keys, where there are such. `experts`: the parameters in
    which current models have all experts of a layer -> the names of each one's parts in files, whose rows it stacks.
    """

    model_type: ClassVar[str]
    causal_lm: ClassVar[str]
    layers: ClassVar[str] = "model.layers"
    attention: ClassVar[str] = "self_attn"
    output: ClassVar[str] = "o_proj"
    rotary: ClassVar[str | None] = "model.rotary_emb"
    passes_keywords: ClassVar[bool] = True
    tells_positions: ClassVar[bool] = True
    base: ClassVar[str | None] = None
    dead: ClassVar[tuple[str, ...]] = ()
    keeps_documents_apart: ClassVar[bool] = True
    attn_implementation: ClassVar[str | None] = None
    no_stock_gqa: ClassVar[str | None] = None
    not_in_vllm: ClassVar[str | None] = None
    mlp_in: ClassVar[tuple[str, ...]] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: ClassVar[str] = "mlp.down_proj"
    in_gguf: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()
    repeats_heads: ClassVar[bool] = False
    sums_late: ClassVar[bool] = False
    norm_names: ClassVar[tuple[str, str]] = ("q_norm", "k_norm")
    experts: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        """The stock class, for example LlamaForCausalLM."""
        return getattr(transformers, self.causal_lm)

    @property
    def config_class(self) -> type[transformers.PretrainedConfig]:
        return self.model_class.config_class

    @property
    def only_eager(self) -> bool:
        """Whether transformers' own model attends by torch's operations alone."""
        return not self.model_class._supports_sdpa

    def check_sizes(self, config: Mapping[str, Any]) -> None:
        """Raise CheckpointError on sizes in a config.json for which the family's own code would take all memory."""
        return None

    def base_prefix(self, model: transformers.PreTrainedModel) -> str:
        """What the names of all tensors begin with but the head's, and those beside the language model."""
        return f"{self.base or model.base_model_prefix}."

    def prefix(self, layer: int) -> str:
        """What the names of one layer's tensors begin with, in the checkpoint."""
        return f"{self.layers}.{layer}."

    def attention_prefix(self, layer: int) -> str:
        return f"{self.prefix(layer)}{self.attention}."

    def current_name(self, stored: str) -> str:
        """The name in the current model of a tensor in a checkpoint's files; families that were renamed override it."""
        return stored

    def stored_name(self, current: str) -> str:
        """The name that a tensor keeps in files though the current model has another; families whose files still have it
        override it."""
        return current

    def parts(self, name: str, tensor: Tensor) -> list[tuple[str, ...]]:
        """Of a parameter that holds experts the names of each one's parts in files; nothing of others."""
        where, _, parameter = name.rpartition(".")
        if not where.endswith(".experts") or parameter not in self.experts:
            return []
        stored = self.stored_name(where)
        return [
            tuple(f"{stored}.{expert}.{part}.weight" for part in self.experts[parameter])
            for expert in range(len(tensor))
        ]

    def names_in_files(self, model: nn.Module) -> dict[str, list[str]]:
        """Every tensor of a current model -> its names in files: one, or those of the parts of experts."""
        return {
            name: [part for parts in self.parts(name, tensor) for part in parts] or [self.stored_name(name)]
            for name, tensor in model.state_dict().items()
        }

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The attention modules of a stock model, in the order of its layers."""
        return [getattr(layer, self.attention) for layer in model.get_submodule(self.layers).children()]

    def describe(self, model: nn.Module) -> list[AttentionLayer]:
        """Facts of every layer, read off a stock model (on the meta device it costs nothing)."""
        facts = [self.facts(module, index) for index, module in enumerate(self.modules(model))]
        layers = [dataclasses.replace(layer, only_eager=self.only_eager) for layer in facts]
        rotary = None if self.rotary is None else model.get_submodule(self.rotary)
        speeds, turned = rotary_speeds(rotary), rotated_numbers(rotary)
        return [
            dataclasses.replace(x, rotary_speeds=speeds.get(x.rotary_kind, ()), rotary_dim=turned[x.rotary_kind])
            if x.rotary_dim and turned
            else x
            for x in layers
        ]

    def facts(self, module: Any, index: int) -> AttentionLayer:
        """Facts of one layer, read off its attention module: no config logic is copied."""
        config = module.config
        return AttentionLayer(
            index=index,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
            rotary_dim=self.rotary_dim(module),
            window=self.window(module),
            qk_norm=hasattr(module, self.norm_names[0]),
            qkv_bias=module.q_proj.bias is not None,
            o_bias=getattr(module, self.output).bias is not None,
            attention_dropout=module.attention_dropout,
        )

    def rotary_dim(self, module: Any) -> int:
        """Numbers of each head that are rotated."""
        factor = (getattr(module.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        return int(module.head_dim * factor)

    def observable(self, model: nn.Module) -> bool:
        """Let attention go through transformers' AttentionInterface, where the family's own does not; whether it now does."""
        return self.attn_implementation is None

    def watch(self, module: Any, observer: Callable[[Tensor, Tensor, Tensor], None]) -> Any:
        """A hook that shows q, k and v [B, heads, T, H] of a stock attention module that AttentionInterface does not see."""
        raise NotImplementedError("only for families with an attn_implementation of their own")

    def layer_output(self, hidden_BTD: Tensor) -> Any:
        """What a whole layer of this family returns where it leaves the hidden states as they are."""
        return hidden_BTD

    def for_rows(self, call: dict[str, Any], rows: int) -> dict[str, Any]:
        """A layer's arguments, recorded for one sequence, for `rows` sequences at once."""
        return call

    def window(self, module: Any) -> int | None:
        """The sliding window of one layer in tokens, None if it sees everything."""
        return getattr(module, "sliding_window", None)

    def norms(self, module: Any) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules that normalise each head of queries and keys, or None."""
        q_norm, k_norm = (getattr(module, name, None) for name in self.norm_names)
        return q_norm, k_norm

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        """One layer's tensors. `read` takes a name inside the layer's attention, such as `q_proj.weight`."""
        names = {f"{p}_proj": f"{p}_proj.weight" for p in "qkv"} | {"o_proj": f"{self.output}.weight"}
        names |= {f"{p}_bias": f"{p}_proj.bias" for p in "qkv" if layer.qkv_bias}
        names |= {"o_bias": f"{self.output}.bias"} if layer.o_bias else {}
        norms = list(zip("qk", self.norm_names, strict=True)) if layer.qk_norm else []
        names |= {f"{p}_norm": f"{name}.weight" for p, name in norms}
        names |= {f"{p}_norm_bias": f"{name}.bias" for p, name in norms if layer.norm_bias}
        return AttentionWeights(**{field: read(name) for field, name in names.items()})

    def stock_attention(self, folded: FoldedWeights, head_dim: int) -> dict[str, Tensor]:
        """The tensors of a stock attention module, by their names in it."""
        names = dict(zip(("o_proj", "q_norm", "k_norm"), (self.output, *self.norm_names), strict=True))
        tensors = folded.state_dict(folded.q_proj.dtype).items()
        parts = ((name.partition("."), tensor) for name, tensor in tensors)
        return {f"{names.get(module, module)}{dot}{parameter}": x for (module, dot, parameter), x in parts}

    def not_served_by_vllm(self, config: Mapping[str, Any]) -> str | None:
        """Why kvfold does not serve a model of this config.json there; None if it does."""
        return self.not_in_vllm


CONTRACT = Architecture


def refuse_clipping(module: Any) -> None:
    """Raise CheckpointError where queries, keys and values are clipped."""
    if module.config.clip_qkv is not None:
        raise CheckpointError(
            f"config.json: clip_qkv is {module.config.clip_qkv}: values would have to be made at full width and clipped"
            f" before they become latents, which kvfold does not do yet. It folds {module.config.model_type} models that do"
            " not clip queries, keys and values."
        )


def split_interleaved(fused: Tensor, layer: AttentionLayer) -> list[Tensor]:
    """q, k and v out of a weight or bias whose rows hold q, k and v of one head after the other."""
    per_head = fused.unflatten(0, (layer.num_attention_heads, 3, layer.head_dim))
    return [part.flatten(0, 1) for part in per_head.unbind(1)]


def all_architectures() -> list[Architecture]:
    """Every family that kvfold knows."""
    return [architecture(name) for name in registry.names("architectures")]


def architecture(model_type: str) -> Architecture:
    """The family of a model_type. Raises CheckpointError with the reason or the list."""
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json: model_type is {shortened(model_type)}; it is the name of a family.")
    return _of_type(model_type)


@functools.cache
def _of_type(model_type: str) -> Architecture:
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise CheckpointError(
            f"model_type is {model_type!r}: this folder is folded already. Fold the original model again instead."
        )
    known = registry.names("architectures")
    if model_type in known:
        return registry.load("architectures", model_type)()
    others = (
        f"Those that are: {', '.join(known)}. A family is one file: docs/add_an_architecture.md shows how to add it."
    )
    reason = f": {REFUSED[model_type]}" if model_type in REFUSED else f". {others}"
    raise CheckpointError(f"config.json: models of model_type {model_type!r} are not folded{reason}")


def source_config(arch: Architecture, config: dict[str, Any]) -> transformers.PretrainedConfig:
    """The stock config object of a config.json. Raises CheckpointError where sizes are none or do not fit each other."""
    check_sizes(config)
    arch.check_sizes(config)
    with foreign_faults(f"config.json does not describe a {arch.model_type} model"):
        # a copy, since transformers writes its defaults into nested dictionaries
        loaded = arch.config_class.from_dict(copy.deepcopy(config))
        text = loaded.get_text_config(decoder=True)
        heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} query heads are not divisible by {kv_heads} key/value heads. Check num_attention_heads"
            " and num_key_value_heads."
        )
    return loaded


def text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the language model, which may stand beside others."""
    return config.get("text_config") or config


def empty_model(arch: Architecture, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The stock model with parameters on the meta device and real buffers: facts and code for free, no weights."""
    from accelerate import init_empty_weights

    fault = f"transformers cannot build the {arch.model_type} model that config.json describes"
    with foreign_faults(fault), init_empty_weights(include_buffers=False), ExpertsOnMeta(), torch.no_grad():
        return arch.model_class(config).eval()


@contextlib.contextmanager
def foreign_faults(what: str) -> Iterator[None]:
    """Whatever a family's code in transformers stumbles over becomes a CheckpointError that begins with `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {one_line(error, 300)}") from error
