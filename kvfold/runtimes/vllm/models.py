"""vLLM's own models, in which every attention is replaced by one that caches what a plan says. Made on demand, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.transformers import TransformersForCausalLM

from kvfold.architectures.base import Architecture, architecture, empty_model, source_config
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.vllm.attention import FoldedAttention, TransformersFoldedAttention, whole
from kvfold.runtimes.vllm.check import check_servable
from kvfold.runtimes.vllm.packed_attention import PackedFoldedAttention, TransformersPackedAttention
from kvfold.runtimes.vllm.packed_layers import PackedPages
from kvfold.runtimes.vllm.rotary_tables import rotary_tables
from kvfold.runtimes.vllm.runtime import is_packed

Make = Callable[[AttentionLayer, nn.Module, Any], nn.Module]
"""Of facts, the family's attention and vLLM's own part of that: what takes its place."""


def __getattr__(name: str) -> Any:
    if not name.startswith("Kvfold"):
        raise AttributeError(name)
    stock = ModelRegistry.models[name.removeprefix("Kvfold")].load_model_cls()
    before = _FoldedTransformers if issubclass(stock, TransformersForCausalLM) else _Folded
    globals()[name] = made = type(name, (before, stock), {"__module__": __name__})
    return made


class _Folded:
    """Goes before a model class of vLLM's."""

    attention_class: Any = FoldedAttention
    packed_class: Any = PackedFoldedAttention

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_servable(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_text_config
        arch = _architecture(config)
        model = empty_model(arch, source_config(arch, config.to_dict()))
        layers = arch.describe(model)
        self.attentions = {
            arch.attention_prefix(index): path
            for index, path in _places(self, arch)  # type: ignore[arg-type]
        }
        plan = CachePlan.from_dict(getattr(config, CONFIG_KEY))
        make = self._packed(vllm_config, arch, model, plan) if is_packed(plan) else self._stock(vllm_config, plan)
        with torch.device(vllm_config.device_config.device):
            for index, path in _places(self, arch):  # type: ignore[arg-type]
                old = self.get_submodule(path)  # type: ignore[attr-defined]
                (stock,) = (module for module in old.modules() if isinstance(module, Attention))
                del vllm_config.compilation_config.static_forward_context[stock.layer_name]
                self.set_submodule(path, make(layers[index], old, stock))  # type: ignore[attr-defined]

    def _stock(self, vllm_config: Any, plan: CachePlan) -> Make:
        """Attentions over vLLM's own pages of whole heads."""
        names: dict[int, str] = {}

        def make(layer: AttentionLayer, old: nn.Module, stock: Any) -> nn.Module:
            index, owner = layer.index, plan.owner(layer.index)
            names[index] = stock.layer_name
            target = None if owner == index else names[owner]
            new = self.attention_class(layer, plan.cache_of(index), old, stock, target, vllm_config)
            # kernels size their buffers by the model's head size
            facts = vllm_config.model_config.model_arch_config
            facts.head_size = max(facts.head_size, new.attn.head_size)
            return new

        return make

    def _packed(self, vllm_config: Any, arch: Architecture, model: Any, plan: CachePlan) -> Make:
        """Attentions over pages of bytes. model: the stock one, on the meta device."""
        pages, config = PackedPages(plan, vllm_config), vllm_config.model_config
        where = {"dtype": config.dtype, "device": vllm_config.device_config.device}
        tables = rotary_tables(arch, model, positions=config.max_model_len, **where)

        def make(layer: AttentionLayer, old: nn.Module, stock: Any) -> nn.Module:
            spec, owner = plan.cache_of(layer.index), plan.owner(layer.index)
            rotary = tables.get(layer.rotary_kind) if layer.rotary_dim else None
            return self.packed_class(layer, spec, old, stock, owner, pages, rotary)

        return make

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Tensors of attention go where the plan has them, all others as vLLM knows them."""
        loaded: set[str] = set()
        parameters = dict(self.named_parameters())  # type: ignore[attr-defined]

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                prefix = next((prefix for prefix in self.attentions if name.startswith(prefix)), None)
                if prefix is None:
                    yield name, tensor
                    continue
                place = f"{self.attentions[prefix]}.{name.removeprefix(prefix)}"
                part = getattr(parameters[place], "of_rank", whole)(tensor)
                # its own while an engine reloads weights
                getattr(parameters[place], "weight_loader", default_weight_loader)(parameters[place], part)
                loaded.add(place)

        loaded |= super().load_weights(others())  # type: ignore[misc]
        with torch.no_grad():  # loaders count no versions, by which what was made of weights is made anew
            for path in self.attentions.values():
                for parameter in self.get_submodule(path).parameters():  # type: ignore[attr-defined]
                    parameter[:0].zero_()
        return loaded


class _FoldedTransformers(_Folded):
    """Of a family that vLLM takes from transformers."""

    attention_class = TransformersFoldedAttention
    packed_class = TransformersPackedAttention

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        """vLLM builds the stock model, whose attention is replaced later."""
        asked = super()._from_config_kwargs  # type: ignore[misc]
        stock = source_config(_architecture(asked["config"]), asked["config"].to_dict())
        stock._attn_implementation = asked["config"]._attn_implementation
        return asked | {"config": stock}


def _architecture(config: Any) -> Architecture:
    return architecture(config.model_type.removeprefix(MODEL_TYPE_PREFIX))


def _places(model: nn.Module, arch: Architecture) -> list[tuple[int, str]]:
    """(layer, path of its attention module) of the layers that this process has, in their order."""
    pattern = re.compile(rf".*\.(\d+)\.{arch.attention}")
    found = [(pattern.fullmatch(path), path) for path, _ in model.named_modules()]
    return sorted((int(match[1]), path) for match, path in found if match)
