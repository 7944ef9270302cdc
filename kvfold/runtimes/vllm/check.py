"""What vLLM cannot serve is said before any process starts to load weights."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from kvfold.architectures.base import architecture
from kvfold.errors import PlanError
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.vllm.ranks import not_shared_out
from kvfold.runtimes.vllm.runtime import Vllm, is_packed

DRAFTED_BY_TEXT = ("ngram", "suffix")
"""Ways to draft that need no second model, whose cache would lie beside packed pages."""


class CheckedConfig(VerifyAndUpdateConfig):
    """vLLM calls it for every folded family."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_servable(vllm_config)


def check_servable(vllm_config: Any) -> None:
    """Raise PlanError that names the obstacle."""
    config = vllm_config.model_config.hf_config
    plan = CachePlan.from_dict(getattr(config, CONFIG_KEY))
    arch = architecture(config.model_type.removeprefix(MODEL_TYPE_PREFIX))
    if obstacle := Vllm().obstacle(plan, config.to_dict()):
        raise PlanError(obstacle)
    if is_packed(plan):
        _check_packed(vllm_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1 and arch.sums_late:
        raise PlanError(
            f"tensor_parallel_size {ranks}: vLLM's {arch.model_type} adds up what processes have of attention later than"
            " kvfold's attention does; serve it with 1."
        )
    if (layer := not_shared_out(plan, ranks)) is not None:
        source, spec = plan.source[layer], plan.caches[layer]
        stored = [] if spec is None else [spec.num_kv_heads, spec.num_v_heads]
        raise PlanError(
            f"tensor_parallel_size {ranks}: layer {layer} has {source.num_attention_heads} query heads,"
            f" {source.num_kv_heads} of keys and values, stored {stored or 'by another layer'}; they cannot be shared out"
            " evenly. Choose a number that divides them."
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and any(
        target is not None for target in plan.kv_sharing_target_layer
    ):
        raise PlanError("pipeline_parallel_size: layers that share a cache must be in one process.")


def _check_packed(vllm_config: Any) -> None:
    """What pages of bytes do not go with."""
    parallel, cache, compilation = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.compilation_config
    method = getattr(vllm_config.speculative_config, "method", None)
    wrong = {
        f"pipeline_parallel_size {parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1,
        f"decode_context_parallel_size {parallel.decode_context_parallel_size}": parallel.decode_context_parallel_size
        > 1,
        f"kv_cache_dtype {cache.cache_dtype}": cache.cache_dtype
        not in ("auto", str(vllm_config.model_config.dtype).split(".")[1]),
        "enable_dbo and ubatch_size": parallel.use_ubatching,
        # what vLLM would capture in graphs of a GPU holds the storing of tokens, which asks the host where to
        "use_inductor_graph_partition": bool(compilation.use_inductor_graph_partition),
        "VLLM_USE_BREAKABLE_CUDAGRAPH": envs.VLLM_USE_BREAKABLE_CUDAGRAPH,
        "kv_transfer_config": vllm_config.kv_transfer_config is not None,
        f"speculative method {method}": method not in (None, *DRAFTED_BY_TEXT),
    }
    for option, found in wrong.items():
        if found:
            raise PlanError(
                f"{option}: kvfold's packed pages are not served with this option yet; leave it out, or serve what"
                " kvfold compress --runtime vllm --preset served makes."
            )
