"""The original model with one layer in memory at a time, showing the queries, keys and values that pass, and how much what
the model predicts depends on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.architectures.base import Architecture, empty_model, source_config
from kvfold.calibration.statistics import Seen
from kvfold.checkpoint.reader import Checkpoint
from kvfold.checkpoint.source import source_dtype
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.kernels.aged_attention import Aged, aged_attention
from kvfold.runtimes.kernels.aged_prefill import prefill_by_age
from kvfold.runtimes.kernels.attention import grouped_attention, prefill_attention
from kvfold.runtimes.kernels.rotary import tables_of

OBSERVED = "kvfold_observed"
"""Name under which attention that shows its queries, keys and values is registered with transformers."""

TOKENS_PER_BATCH = 4096

LOGITS_AT_ONCE = 2**26
"""Predicted tokens x vocabulary that are in memory at once."""


class Watching(NamedTuple):
    """What the attention of the running layer shows and how. order: of the numbers of its heads, where it is not the one that
    is expected of families."""

    observer: Callable[..., None]
    recent: int
    order: list[int] | None


WATCHING: ContextVar[Watching] = ContextVar("kvfold_watching")
"""Not an argument, since the layers of some families hand none on."""

Observer = Callable[[Seen], None]
"""Called with what passes through attention, for every batch of a layer."""


def ignore(seen: Seen) -> None:
    """The observer of a pass that only moves hidden states."""


class StreamedModel:
    """A checkpoint's model on the meta device, of which single parts get their weights when they run.

    `recent`: gradients are by keys and values as queries see them that stand at least so many tokens behind, and apart from
    those as all others see them, where the family's attention is observed through transformers' interface. `outputs`:
    gradients are by what attention gives to the projection behind it as well.
    """

    def __init__(
        self, checkpoint: Checkpoint, arch: Architecture, device: str, recent: int = 0, *, outputs: bool = False
    ) -> None:
        self.recent, self.outputs = recent, outputs
        config = source_config(arch, checkpoint.config)
        self.checkpoint, self.arch, self.device = checkpoint, arch, device
        config._attn_implementation = "eager" if arch.only_eager else "sdpa"
        self.model: PreTrainedModel = empty_model(arch, config)
        self.observed = arch.observable(self.model)
        if self.observed:
            self.model.config._attn_implementation = _register_observed_attention()
        self.layers = arch.describe(self.model)
        self.is_bfloat16 = source_dtype(checkpoint, arch, self.layers[0]) == "bfloat16"
        self.vocab_size = config.get_text_config(decoder=True).vocab_size
        self.calls: list[dict[str, Any]] = []

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] that enter the first layer.

        The family's own forward computes them, with layers that only record what else they are given (masks, rotary tables).
        All sequences are full and equally long, so the arguments of one serve all.
        """
        prefix = self.arch.base_prefix(self.model)
        base = self.model.get_submodule(prefix.rstrip("."))
        self._load(base, prefix, skip=self._skipped(prefix))
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
        _unload(self.model)
        return hidden_BTD

    def advance(self, layer: AttentionLayer, hidden_BTD: Tensor, observe: Observer) -> None:
        """Replace the hidden states that enter `layer` by those that leave it, in place."""
        with self._own_precision(), self._loaded(layer) as run:
            for part in hidden_BTD.split(_rows(hidden_BTD)):
                left, seen = run(part.to(self.device))
                observe(seen)
                part.copy_(left)

    def retreat(self, layer: AttentionLayer, hidden_BTD: Tensor, gradient_BTD: Tensor, observe: Observer) -> None:
        """Replace the gradients by what leaves `layer` by those by what enters it, `hidden_BTD`, in place.

        The layer runs once more to get there. Its observer sees the gradients by rotated keys and values as well.
        """
        with self._own_precision(), self._loaded(layer) as run, torch.enable_grad():
            rows = _rows(hidden_BTD)
            for part, gradient in zip(hidden_BTD.split(rows), gradient_BTD.split(rows), strict=True):
                entered = part.to(self.device).requires_grad_()
                left, seen = run(entered)
                parts = seen.differentiated
                by_hidden, *by_parts = torch.autograd.grad(
                    left, (entered, *parts.values()), gradient.to(self.device), materialize_grads=True
                )
                gradient.copy_(by_hidden)
                gradients: dict[str, Any] = dict(zip(parts, by_parts, strict=True))
                observe(seen.detached()._replace(**gradients))

    @torch.no_grad()
    def label_gradients(self, tokens_BT: Tensor, hidden_BTD: Tensor, draws_BT: Tensor) -> Tensor:
        """[B, T, D]: gradients, by the hidden states that leave the last layer, of the log-probability of a label at every
        position. Labels are drawn from the model's own predictions: `draws_BT` are uniform numbers from 0 to 1.

        The family's own forward leads from there to the logits, with layers that do nothing.
        """
        self._load(self.model, "", skip=self._skipped(""))
        self.model.tie_weights()
        modules = list(self.model.get_submodule(self.arch.layers).children())
        leaf: list[Tensor] = []
        for module in modules:
            module.forward = lambda hidden_states, *args, **kwargs: self.arch.layer_output(leaf[0])
        gradients_BTD = torch.empty_like(hidden_BTD)
        for row, hidden_TD in enumerate(hidden_BTD):
            leaf[:] = [hidden_TD[None].to(self.device).requires_grad_()]
            tokens = tokens_BT[row : row + 1].to(self.device)
            with self._own_precision():
                gradients_BTD[row] = self._row_gradients(tokens, leaf[0], draws_BT[row].to(self.device)).cpu()
        for module in modules:
            del module.forward
        _unload(self.model)
        return gradients_BTD

    def _row_gradients(self, tokens_1T: Tensor, leaf_1TD: Tensor, draws_T: Tensor) -> Tensor:
        """Of one sequence, as many positions at a time as LOGITS_AT_ONCE allows."""
        total_1TD = torch.zeros_like(leaf_1TD)
        positions = torch.arange(tokens_1T.shape[1], device=self.device)
        for kept in positions.split(max(LOGITS_AT_ONCE // self.vocab_size, 1)):
            with torch.enable_grad():
                logits_KV = self.model(input_ids=tokens_1T, use_cache=False, logits_to_keep=kept).logits[0]
            total_1TD += torch.autograd.grad(logits_KV, leaf_1TD, _score(logits_KV.detach(), draws_T[kept]))[0]
        return total_1TD[0]

    @contextmanager
    def _own_precision(self) -> Iterator[None]:
        """Products of float32 numbers may round them to bfloat16 where the model's own dtype would: with instructions made
        for it that is two to three times faster. Sums, and all that is not a product, stay in float32."""
        try:
            before = torch.get_float32_matmul_precision() if self.is_bfloat16 else None
        except RuntimeError:  # set by torch's newer API, which does not go with this one
            before = None
        if before is None:
            yield
            return
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    @contextmanager
    def _loaded(self, layer: AttentionLayer) -> Iterator[Callable[[Tensor], tuple[Tensor, Seen]]]:
        """A function that runs `layer`: hidden states of some sequences -> those that leave it, and what attention saw."""
        module = self.model.get_submodule(self.arch.prefix(layer.index).rstrip("."))
        self._load(module, self.arch.prefix(layer.index))
        call = self.calls[layer.index]
        in_float32 = torch.empty(0)  # as weights are
        tables = tables_of(layer, in_float32, call.get("position_embeddings"), call.get("position_ids"))
        cos, sin = tables or (None, None)
        found: list[Seen] = []
        entered: list[Tensor] = []

        def observer(q: Tensor, k: Tensor, v: Tensor, scaling: float = layer.scaling, **recent: Tensor) -> None:
            # some families scale queries before attention and not in it
            q = q if scaling == layer.scaling else q * (scaling / layer.scaling)
            found.append(Seen(q, k, v, cos, sin, layer.fast_pairs, **recent))

        def with_output(projection: Any, args: tuple[Tensor, ...]) -> None:
            found[-1] = found[-1]._replace(out=args[0], hidden=entered.pop())

        def with_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])

        hooks, attention = [], getattr(module, self.arch.attention)
        if self.outputs:
            hooks.append(attention.register_forward_pre_hook(with_input, with_kwargs=True))
            hooks.append(getattr(attention, self.arch.output).register_forward_pre_hook(with_output))
        if not self.observed:
            hooks.append(self.arch.watch(attention, observer))
        watching = Watching(observer, self.recent, list(layer.order_of_numbers) if layer.interleaved else None)

        def run(hidden_BTD: Tensor) -> tuple[Tensor, Seen]:
            token = WATCHING.set(watching)
            try:
                out = module(hidden_BTD, **self.arch.for_rows(call, len(hidden_BTD)))
            finally:
                WATCHING.reset(token)
            return out[0] if isinstance(out, tuple) else out, found.pop()

        yield run
        for hook in hooks:
            hook.remove()
        _unload(module)

    def _skipped(self, prefix: str) -> tuple[str, ...]:
        """Beginnings of names behind `prefix`: of layers, and of what no text passes."""
        return tuple(name.removeprefix(prefix) for name in (f"{self.arch.layers}.", *self.arch.beside))

    def _load(self, module: torch.nn.Module, prefix: str, skip: tuple[str, ...] | None = None) -> None:
        """Give a module its weights, in float32. `skip`: beginnings of parameters that stay on the meta device."""
        names = [name for name, _ in module.named_parameters() if skip is None or not name.startswith(skip)]
        state = {name: self.checkpoint.read(prefix + name).to(self.device, torch.float32) for name in names}
        module.load_state_dict(state, assign=True, strict=skip is None)
        module.requires_grad_(False)


def _rows(hidden_BTD: Tensor) -> int:
    """Sequences that run at once."""
    return max(TOKENS_PER_BATCH // hidden_BTD.shape[1], 1)


def _unload(module: torch.nn.Module) -> None:
    """Give the memory of its parameters back. Buffers, such as rotary frequencies, are small and stay."""
    for name in [name for name, _ in module.named_parameters()]:
        set_module_tensor_to_device(module, name, "meta")


def _score(logits_KV: Tensor, draws_K: Tensor) -> Tensor:
    """d log p(label) / d logits = onehot(label) - p, with each label drawn from p."""
    probs_KV = logits_KV.softmax(-1)
    summed_KV = probs_KV.cumsum(-1)
    labels_K1 = torch.searchsorted(summed_KV, draws_K[:, None] * summed_KV[:, -1:]).clamp_max(probs_KV.shape[1] - 1)
    return probs_KV.neg_().scatter_add_(1, labels_K1, torch.ones_like(probs_KV[:, :1]))


def _of_two_ages(far: Tensor, near: Tensor, recent: int) -> Aged:
    T = far.shape[2]
    return Aged(lambda start, end: far[:, :, start:end], lambda start, end: near[:, :, start:end], T, T, recent)


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`s_aux`: transformers' name of sinks."""
    observer, recent, order = WATCHING.get()
    if order is not None:
        query, key = query[..., order], key[..., order]
    if recent and torch.is_grad_enabled():
        # the same numbers four times, with gradients of their own
        far_key, far_value, near_key, near_value = key.clone(), value.clone(), key.clone(), value.clone()
        observer(query, far_key, far_value, scaling, recent_k=near_key, recent_v=near_value)
        keys, values = (far_key, near_key), (far_value, near_value)
        if softcap is None:
            return prefill_by_age(query, keys, values, attention_mask, recent=recent, scale=scaling, sinks=s_aux), None
        aged = _of_two_ages(*keys, recent), _of_two_ages(*values, recent)
        sizes: dict[str, Any] = {
            "elements": key.shape[1] * key.shape[3],
            "scale": scaling,
            "softcap": softcap,
            "sinks": s_aux,
        }
        return aged_attention((query, query), *aged, attention_mask, value.shape[3], **sizes), None
    observer(query, key, value, scaling)
    if softcap is not None:  # which torch's fused kernel would ignore
        return grouped_attention(query, key, value, attention_mask, scale=scaling, softcap=softcap)[0], None
    if s_aux is not None:
        return prefill_attention(query, key, value, attention_mask, scale=scaling, sinks=s_aux), None
    kwargs |= {"attention_mask": attention_mask, "scaling": scaling}
    return sdpa_attention_forward(module, query, key, value, **kwargs)
