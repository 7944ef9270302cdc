"""The vLLM plug-in: `vllm serve FOLDER` loads a folded model, without flags.

vLLM calls `register` in every process (entry point group vllm.general_plugins), so it is cheap and may be called again.
"""

from __future__ import annotations

import torch

BACKEND = "KVFOLD_PACKED"
"""What vLLM calls the attention over pages of packed tokens."""


def register() -> None:
    """Tell vLLM where the folded families are, and transformers what their configurations are called."""
    from vllm import ModelRegistry
    from vllm.config import model as model_config
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvfold.architectures.base import all_architectures
    from kvfold.plan.naming import MODEL_TYPE_PREFIX
    from kvfold.runtimes.vllm.check import CheckedConfig

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, "kvfold.runtimes.vllm.packed_backend.PackedBackend")

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # vLLM's attention in bfloat16 uses AMX tiles without asking the kernel for them
    no_float16 = getattr(model_config, "_FLOAT16_NOT_SUPPORTED_MODELS", {})
    for arch in all_architectures():
        name = f"Kvfold{arch.causal_lm}"
        if arch.model_type in no_float16:
            no_float16[MODEL_TYPE_PREFIX + arch.model_type] = no_float16[arch.model_type]
        ModelRegistry.register_model(name, f"kvfold.runtimes.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = CheckedConfig
