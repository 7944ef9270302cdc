"""What vLLM cannot serve is said before any process starts to load weights."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from kvfold.errors import PlanError
from kvfold.plan.naming import CONFIG_KEY
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.vllm.runtime import Vllm


class CheckedConfig(VerifyAndUpdateConfig):
    """vLLM calls it for every folded family."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_servable(vllm_config)


def check_servable(vllm_config: Any) -> None:
    """Raise PlanError that names the obstacle."""
    plan = CachePlan.from_dict(getattr(vllm_config.model_config.hf_text_config, CONFIG_KEY))
    if obstacle := Vllm().obstacle(plan):
        raise PlanError(obstacle)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    for layer, spec in enumerate(plan.caches):
        source = plan.source[layer]
        counts = (source.num_kv_heads, *([] if spec is None else [spec.num_kv_heads]))
        if source.num_attention_heads % ranks or any(heads % ranks and ranks % heads for heads in counts):
            raise PlanError(
                f"tensor_parallel_size {ranks}: layer {layer} has {source.num_attention_heads} query heads, and of keys and"
                f" values {' and stored '.join(map(str, counts))}; they cannot be shared out evenly. Choose a number that"
                " divides them."
            )
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and any(
        target is not None for target in plan.kv_sharing_target_layer
    ):
        raise PlanError("pipeline_parallel_size: layers that share a cache must be in one process.")
