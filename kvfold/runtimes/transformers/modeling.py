"""One model class per family: the stock class with its attention replaced, and the folded cache in generate()."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from kvfold import registry
from kvfold.architectures._rotary import CHANGING, rope_types
from kvfold.architectures.base import Architecture, all_architectures
from kvfold.checkpoint.atomic import write_text
from kvfold.checkpoint.remote_code import FILE, auto_map, remote_code
from kvfold.errors import CheckpointError, PlanError
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.kernels.rotary import made_tables
from kvfold.runtimes.transformers.attention import FoldedAttention, attention_class
from kvfold.runtimes.transformers.cache import FoldedCache
from kvfold.runtimes.transformers.forward_state import CURRENT_STATE, ForwardState, note_positions
from kvfold.runtimes.transformers.joint import JointAttention
from kvfold.runtimes.transformers.padding import warn_of_holes
from kvfold.runtimes.transformers.position_tables import PositionTables
from kvfold.runtimes.transformers.projections import GroupedLinear


class FoldedModel:
    """Mixin before a stock causal model. Raises PlanError if the config holds no plan that this runtime serves."""

    architecture: Architecture
    config: Any

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self._replace_attention()

    @property
    def kv_plan(self) -> CachePlan:
        """The plan that the config holds."""
        return CachePlan.from_dict(self.config.kv_compression_config)

    def _in_state(self, stock_class: Any, arguments: dict[str, Any]) -> Any:
        """The stock forward, whose layers share what they have to."""
        if not self.needs_state:
            return stock_class.forward(self, **arguments)
        state = ForwardState(self._rotation(), self.position_tables)
        if self.architecture.passes_keywords:
            return stock_class.forward(self, **arguments, kv_state=state)
        token = CURRENT_STATE.set(state)
        try:
            return stock_class.forward(self, **arguments)
        finally:
            CURRENT_STATE.reset(token)

    def _rotation(self) -> Any:
        """(hidden states, positions) -> cos and sin; None in families that do not rotate."""
        if self.makes_tables:
            return functools.partial(made_tables, self.makes_tables)
        rotary = self.architecture.rotary
        return self.get_submodule(rotary) if rotary else None  # type: ignore[attr-defined]

    def _and_again(self, stock_class: Any, arguments: dict[str, Any]) -> Any:
        """The same; a prompt that a scorer asks for is read a second time behind itself, to choose what of it stays."""
        out, cache = self._in_state(stock_class, arguments), arguments.get("past_key_values")
        if isinstance(cache, FoldedCache) and cache.waits:
            if self.has_windows and _is_padded(cache):
                raise ValueError(
                    "a prompt that is read twice to choose from it cannot be padded where layers have windows: padding would"
                    " stand between both readings. Give sequences of one length, or choose another length.rule, observed."
                )
            with torch.no_grad(), cache.reading_again():
                self._in_state(stock_class, arguments | second_reading(cache.owned[0].length, arguments))
        return out

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with what loads the folder where nobody imports kvfold."""
        names = type(self.config).__name__, type(self).__name__
        self.config.auto_map = auto_map(*names)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        self._write_code(save_directory)

    def _write_code(self, folder: Any) -> None:
        write_text(Path(folder) / FILE, remote_code(type(self.config).__name__, type(self).__name__))

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which uploads before its `save_pretrained` returns."""
        self._write_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: transformers would copy this module beside what it saves."""

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As the family's. Where factors of rotation switch with the length (LongRoPE), all tokens are run again, with a new
        cache: the stock method forgets the old one and goes on with the last token alone."""
        cache, switch = kwargs.get("past_key_values"), switch_of_rotation(self.config)
        if switch and cache is not None and cache.get_seq_length() <= switch < input_ids.shape[1]:
            kwargs |= {"past_key_values": None, "next_sequence_length": None, "position_ids": None}
            if (mask := kwargs.get("attention_mask")) is not None:
                kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _replace_attention(self) -> None:
        if self.config.kv_compression_config is None:
            raise PlanError(f"the config has no {CONFIG_KEY}; load a folder that `kvfold compress` wrote.")
        plan = self.kv_plan
        self.has_readers = plan.predicts or any(target is not None for target in plan.kv_sharing_target_layer)
        rules = {spec.tokens.rule for spec in plan.owned if spec.tokens and spec.tokens.scored}
        self.repeats = any(registry.load("scorers", rule).repeats for rule in rules)
        if self.repeats and any(spec.drops_of_layer for spec in plan.owned):
            raise PlanError(
                "tokens: a prompt that is read twice to choose from it wants keys as they are read, and no finer form of"
                " recent tokens; choose another length.rule, observed for example."
            )
        self.counts_tokens = any(spec.tokens is not None or spec.recent for spec in plan.owned)
        layers = self.architecture.describe(self)  # type: ignore[arg-type]
        self.needs_state = (
            self.has_readers or plan.position_bytes > 0 or plan.joint or any(x.temperature for x in layers)
        )
        self.has_windows = any(layer.window for layer in layers)
        self.makes_tables = layers[0].rotary_speeds if layers[0].makes_tables else ()
        rotary = self.get_submodule(self.architecture.rotary) if self.architecture.rotary else None  # type: ignore[attr-defined]
        changes = rotary is not None and not CHANGING.isdisjoint(rope_types(rotary).values())
        self.position_tables = None if changes else PositionTables()
        if rotary is not None and not self.architecture.tells_positions:
            rotary.register_forward_pre_hook(note_positions)
        for facts, old in zip(layers, self.architecture.modules(self), strict=True):  # type: ignore[arg-type]
            weight = next(old.parameters())
            spec, norms, owner = plan.cache_of(facts.index), self.architecture.norms(old), plan.owner(facts.index)
            users: Any = tuple(plan.readers(owner)) if spec.joint else owner
            base = JointAttention if spec.joint else FoldedAttention
            new = attention_class(type(old), base)(  # type: ignore[arg-type]
                self.config, facts, spec, norms, users, device=weight.device, dtype=weight.dtype
            )
            parent = self.get_submodule(self.architecture.prefix(facts.index).rstrip("."))  # type: ignore[attr-defined]
            setattr(parent, self.architecture.attention, new)
            if weight.device.type != "meta":
                new.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GroupedLinear):
            init.normal_(module.weight, std=self.config.get_text_config().initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, FoldedAttention):
            if module.sinks is not None:
                init.normal_(module.sinks, std=self.config.get_text_config().initializer_range)
        else:  # the family's rule would look for the family's tensors in it
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but an incomplete checkpoint is an error: its missing tensors would be random numbers."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        faults = {key: sorted(map(str, info[key]))[:3] for key in info if info[key] and key.endswith("_keys")}
        if faults:
            where = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise CheckpointError(f"{where} does not hold the weights that its {CONFIG_KEY} asks for: {faults}")
        return (model, info) if output_loading_info else model

    def _set_gradient_checkpointing(self, *args: Any, gradient_checkpointing_func: Any = None, **kwargs: Any) -> None:
        if self.has_readers and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "reentrant gradient checkpointing would silently lose the gradients that readers send to the layer whose"
                ' cache they share; enable it with gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        if self.needs_state and gradient_checkpointing_func and not self.architecture.passes_keywords:
            gradient_checkpointing_func = _with_current_state(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            *args, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        elif kind in (None, "dynamic"):
            cache = FoldedCache(self.kv_plan)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
        else:
            raise ValueError(
                f"cache_implementation={kind!r} cannot hold a folded cache; leave it out. Bits per number are part of the"
                " plan, not of generate()."
            )


def switch_of_rotation(config: PretrainedConfig) -> int | None:
    """The length of a sequence behind which keys are rotated by other factors; None where they always are by the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def second_reading(length: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that differ when a step, the last of `length` columns, is read once more behind them: its tokens see
    themselves as they did, at positions that go on."""
    tokens = _inputs(arguments)
    B, T = tokens.shape[:2]
    mask = arguments.get("attention_mask")
    mask = torch.ones(B, length, dtype=torch.long, device=tokens.device) if mask is None else mask
    if mask.ndim != 2:
        raise ValueError("a prompt that is read twice takes an attention_mask [batch, tokens].")
    twice = torch.cat([mask, mask[:, -T:]], dim=1)
    positions = (twice.long().cumsum(1) - 1).clamp_min(0)[:, -T:]
    return {"attention_mask": twice, "position_ids": positions, "use_cache": True, "labels": None, "logits_to_keep": 1}


def _with_current_state(checkpoint: Any) -> Any:
    """A checkpoint function whose recomputation, long after the forward, still sees the state of that forward."""

    def run(function: Any, *args: Any, **kwargs: Any) -> Any:
        state = CURRENT_STATE.get()

        def in_state(*inner: Any, **named: Any) -> Any:
            token = CURRENT_STATE.set(state)
            try:
                return function(*inner, **named)
            finally:
                CURRENT_STATE.reset(token)

        return checkpoint(in_state, *args, **kwargs)

    return run


def _is_padded(cache: FoldedCache) -> bool:
    """Whether some sequence begins behind the first column."""
    begins = [layer.begin_B for layer in cache.owned if layer.begin_B is not None]
    return bool(begins) and bool((begins[0] > 0).any())


def _inputs(arguments: dict[str, Any]) -> Any:
    """The tokens of a forward [B, T], or their embeddings [B, T, D]."""
    tokens = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if tokens is None else tokens


def _folded_forward(stock_class: type[PreTrainedModel]) -> Any:
    """The family's forward, with a FoldedCache where it would make a DynamicCache. Its signature stays: generate(),
    Trainer and peft inspect it."""
    signature = inspect.signature(stock_class.forward)

    @functools.wraps(stock_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(self, *args, **kwargs).arguments
        bound |= bound.pop("kwargs", {})  # some families name use_cache, some do not
        use_cache = bound.get("use_cache")
        wanted = self.config.get_text_config().use_cache if use_cache is None else use_cache
        if self.training and use_cache is None:  # the stock forward would make a cache that nobody reads
            wanted = bound["use_cache"] = False
        if wanted and bound.get("past_key_values") is None:
            bound["past_key_values"] = FoldedCache(self.kv_plan)
        bound.pop("self")
        if self.counts_tokens:
            warn_of_holes(bound.get("attention_mask"), _inputs(bound))
        return self._and_again(stock_class, bound) if self.repeats else self._in_state(stock_class, bound)

    return forward


def _folded_preparation(stock_class: type[PreTrainedModel]) -> Any:
    """The mixin's, under the family's signature, by which generate() sees whether it takes inputs_embeds."""

    @functools.wraps(stock_class.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FoldedModel.prepare_inputs_for_generation(self, *args, **kwargs)

    return prepare_inputs_for_generation


@functools.cache
def folded_classes(arch: Architecture) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The config class and the model class of a folded family, for example KvfoldLlamaForCausalLM."""
    stem = arch.config_class.__name__.removesuffix("Config")
    config = type(
        f"Kvfold{stem}Config",
        (arch.config_class,),
        {
            "__module__": __name__,
            "__annotations__": {CONFIG_KEY: dict | None},
            "model_type": MODEL_TYPE_PREFIX + arch.model_type,
            CONFIG_KEY: None,
            "register_for_auto_class": classmethod(lambda cls, auto_class="AutoConfig": None),
            "base_model_tp_plan": None,
            "base_model_pp_plan": None,
        },
    )
    model = type(
        f"Kvfold{arch.causal_lm}",
        (FoldedModel, arch.model_class),
        {
            "__module__": __name__,
            "__annotations__": {"config": config},
            "architecture": arch,
            "config_class": config,
            "forward": _folded_forward(arch.model_class),
            "prepare_inputs_for_generation": _folded_preparation(arch.model_class),
            "_tp_plan": None,
            "_pp_plan": None,
            "_supports_flash_attn": False,
            "_supports_flex_attn": False,
        },
    )
    globals()[config.__name__], globals()[model.__name__] = config, model  # pickle looks classes up here
    return config, model


def register() -> None:
    """Teach AutoConfig and AutoModelForCausalLM the folded families. Safe to call twice."""
    for arch in all_architectures():
        config, model = folded_classes(arch)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        if arch.beside:
            AutoModelForImageTextToText.register(config, model, exist_ok=True)
        if arch.experts:
            # files keep experts one by one, and are read as the family's are
            register_checkpoint_conversion_mapping(
                config.model_type, get_checkpoint_conversion_mapping(arch.model_type), overwrite=True
            )


def empty_folded_model(arch: Architecture, config: dict[str, Any]) -> PreTrainedModel:
    """A folded model on the meta device, from the dictionary of its config.json: names and shapes of its tensors."""
    config_class, model_class = folded_classes(arch)
    with torch.device("meta"):
        return model_class(config_class.from_dict(config))
