"""vLLM's own models, in which every attention is replaced by one that caches what a plan says. Made on demand, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm import ModelRegistry
from vllm.model_executor.layers.attention import Attention

from kvfold.architectures.base import architecture, empty_model, source_config
from kvfold.errors import PlanError
from kvfold.plan import CONFIG_KEY, CachePlan
from kvfold.runtime.modeling import MODEL_TYPE_PREFIX
from kvfold.serving.vllm.attention import FoldedAttention


def __getattr__(name: str) -> Any:
    if not name.startswith("Kvfold"):
        raise AttributeError(name)
    stock = ModelRegistry.models[name.removeprefix("Kvfold")].load_model_cls()
    made = type(name, (_Folded, stock), {"__module__": __name__})
    globals()[name] = made
    return made


class _Folded:
    """Goes before a model class of vLLM's."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_text_config
        plan = CachePlan.from_dict(getattr(config, CONFIG_KEY))
        if obstacle := plan.servable_by()["vllm"]:
            raise PlanError(obstacle)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        arch = architecture(config.model_type.removeprefix(MODEL_TYPE_PREFIX))
        layers = arch.describe(empty_model(arch, source_config(arch, config.to_dict())))
        table = vllm_config.compilation_config.static_forward_context
        self.attention_prefixes = tuple(arch.attention_prefix(layer.index) for layer in layers)
        names: dict[int, str] = {}
        with torch.device(vllm_config.device_config.device):
            for layer in layers:
                parent = self.get_submodule(arch.prefix(layer.index).rstrip("."))  # type: ignore[attr-defined]
                old = getattr(parent, arch.attention)
                (stock,) = (module for module in old.modules() if isinstance(module, Attention))
                names[layer.index] = stock.layer_name
                del table[stock.layer_name]
                owner = plan.owner(layer.index)
                target = None if owner == layer.index else names[owner]
                folded = FoldedAttention(layer, plan.cache_of(layer.index), old, stock, target, vllm_config)
                setattr(parent, arch.attention, folded)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Tensors of attention go where the plan has them, all others as vLLM knows them."""
        loaded: set[str] = set()
        parameters = dict(self.named_parameters())  # type: ignore[attr-defined]

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(self.attention_prefixes):
                    parameter = parameters[name]
                    parameter.data.copy_(parameter.of_rank(tensor))
                    loaded.add(name)
                else:
                    yield name, tensor

        return super().load_weights(others()) | loaded  # type: ignore[misc]
