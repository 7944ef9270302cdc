"""What vLLM cannot serve is said before any process starts to load weights."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from kvfold.errors import PlanError
from kvfold.plan import CONFIG_KEY, CachePlan


class CheckedConfig(VerifyAndUpdateConfig):
    """vLLM calls it for every folded family."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_servable(vllm_config)


def check_servable(vllm_config: Any) -> None:
    """Raise PlanError that names the obstacle."""
    plan = CachePlan.from_dict(getattr(vllm_config.model_config.hf_text_config, CONFIG_KEY))
    if obstacle := plan.servable_by()["vllm"]:
        raise PlanError(obstacle)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    for layer, spec in enumerate(plan.caches):
        heads, queries = spec and spec.num_kv_heads, plan.source[layer].num_attention_heads
        if heads and (queries % ranks or (heads % ranks and ranks % heads)):
            raise PlanError(
                f"tensor_parallel_size {ranks}: the {heads} stored heads of layer {layer} and its {queries} query heads"
                " cannot be shared out evenly. Choose a number that divides both."
            )
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and any(plan.kv_sharing_target_layer):
        raise PlanError("pipeline_parallel_size: layers that share a cache must be in one process.")
