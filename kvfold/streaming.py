"""The original model with one layer in memory at a time, showing the queries, keys and values that pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.architectures.base import Architecture, empty_model, source_config
from kvfold.attention import AttentionLayer
from kvfold.checkpoint import Checkpoint
from kvfold.runtime.attend import grouped_attention
from kvfold.seen import Seen

OBSERVED = "kvfold_observed"
"""Name under which attention that shows its queries, keys and values is registered with transformers."""

TOKENS_PER_BATCH = 4096

Observer = Callable[[Seen], None]
"""Called with what passes through attention, for every batch of a layer."""


class StreamedModel:
    """A checkpoint's model on the meta device, of which single parts get their weights when they run."""

    def __init__(self, checkpoint: Checkpoint, arch: Architecture, device: str) -> None:
        config = source_config(arch, checkpoint.config)
        config._attn_implementation = arch.attn_implementation or _register_observed_attention()
        self.checkpoint, self.arch, self.device = checkpoint, arch, device
        self.model: PreTrainedModel = empty_model(arch, config)
        self.layers = arch.describe(self.model)
        self.calls: list[dict[str, Any]] = []

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] that enter the first layer.

        The family's own forward computes them, with layers that only record what else they are given (masks, rotary tables).
        All sequences are full and equally long, so the arguments of one serve all.
        """
        base, prefix = self.model.base_model, f"{self.model.base_model_prefix}."
        self._load(base, prefix, skip=self.arch.layers.removeprefix(prefix) + ".")
        modules = list(self.model.get_submodule(self.arch.layers).children())
        hidden_BTD = torch.empty(*tokens_BT.shape, self.layers[0].hidden_size)
        row = 0

        signature = inspect.signature(type(modules[0]).forward)

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
            if not self.calls:
                hidden_BTD[row] = hidden_states[0].cpu()
            named = signature.bind(None, hidden_states, *args, **kwargs).arguments
            rest = named.pop("kwargs", {})
            call = {name: value for name, value in named.items() if name not in ("self", "hidden_states")} | rest
            self.calls.append(
                {n: v for n, v in call.items() if n not in ("past_key_values", "layer_past", "use_cache")}
            )
            return self.arch.layer_output(hidden_states)

        for module in modules:
            module.forward = record
        for row in range(len(tokens_BT)):
            self.calls.clear()
            base(input_ids=tokens_BT[row : row + 1].to(self.device), use_cache=False)
        for module in modules:
            del module.forward
        self.model.to("meta")
        return hidden_BTD

    def advance(self, layer: AttentionLayer, hidden_BTD: Tensor, observe: Observer) -> None:
        """Replace the hidden states that enter `layer` by those that leave it, in place."""
        module = self.model.get_submodule(self.arch.prefix(layer.index).rstrip("."))
        self._load(module, self.arch.prefix(layer.index))
        call = self.calls[layer.index]
        cos, sin = call.get("position_embeddings") or (None, None)

        def observer(q: Tensor, k: Tensor, v: Tensor, scaling: float = layer.scaling) -> None:
            # some families scale queries before attention and not in it
            observe(Seen(q if scaling == layer.scaling else q * (scaling / layer.scaling), k, v, cos, sin))

        hook = None
        if self.arch.attn_implementation:
            hook = self.arch.watch(getattr(module, self.arch.attention), observer)
        else:
            call = call | {"kvfold_observer": observer}
        # two batches at least: how far moments still move is seen between the halves of the text
        rows = max(min(TOKENS_PER_BATCH // hidden_BTD.shape[1], -(-len(hidden_BTD) // 2)), 1)
        for part in hidden_BTD.split(rows):
            out = module(part.to(self.device), **self.arch.for_rows(call, len(part)))
            part.copy_(out[0] if isinstance(out, tuple) else out)
        if hook is not None:
            hook.remove()
        module.to("meta")

    def _load(self, module: torch.nn.Module, prefix: str, skip: str | None = None) -> None:
        """Give a module its weights, in float32. `skip`: parameters that stay on the meta device."""
        names = [name for name, _ in module.named_parameters() if skip is None or not name.startswith(skip)]
        state = {name: self.checkpoint.read(prefix + name).to(self.device, torch.float32) for name in names}
        module.load_state_dict(state, assign=True, strict=skip is None)


def _register_observed_attention() -> str:
    AttentionInterface.register(OBSERVED, _observed_attention)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    return OBSERVED


def _observed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    kvfold_observer: Callable[[Tensor, Tensor, Tensor, float], None],
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    kvfold_observer(query, key, value, scaling)
    if softcap is not None:  # which torch's fused kernel would ignore
        return grouped_attention(query, key, value, attention_mask, scale=scaling, softcap=softcap)[0], None
    kwargs |= {"attention_mask": attention_mask, "scaling": scaling}
    return sdpa_attention_forward(module, query, key, value, **kwargs)
