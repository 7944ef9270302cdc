"""The vLLM plug-in: `vllm serve FOLDER` loads a folded model, without flags.

vLLM calls `register` in every process (entry point group vllm.general_plugins), so it is cheap and may be called again.
"""

from __future__ import annotations

import torch

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Bloom")
"""Of those that kvfold folds, what vLLM has as models of its own."""


def register() -> None:
    """Tell vLLM where the folded families are, and transformers what their configurations are called."""
    from vllm import ModelRegistry

    import kvfold  # noqa: F401

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # vLLM's attention in bfloat16 uses AMX tiles without asking the kernel for them
    for family in FAMILIES:
        name = f"Kvfold{family}ForCausalLM"
        ModelRegistry.register_model(name, f"kvfold.serving.vllm.models:{name}")
