"""What a folded folder holds for programs that load models with trust_remote_code and import nothing: a few lines that lead
to the installed package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.plan.naming import CONFIG_KEY

FILE = "modeling_kvfold.py"
HOME = "kvfold.runtimes.transformers.modeling"


def auto_map(config_class: str, model_class: str) -> dict[str, str]:
    """Of config.json."""
    module = FILE.removesuffix(".py")
    return {"AutoConfig": f"{module}.{config_class}", "AutoModelForCausalLM": f"{module}.{model_class}"}


def class_names(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Those that a folded folder's config.json names; None of others."""
    found = config.get("auto_map")
    if CONFIG_KEY not in config or not isinstance(found, dict):
        return None
    config_class, model_class = (found[name].rpartition(".")[2] for name in ("AutoConfig", "AutoModelForCausalLM"))
    return config_class, model_class


def remote_code(config_class: str, model_class: str) -> str:
    """The file. Where kvfold is missing transformers says that it has to be installed."""
    return (
        '"""Loads this folder with the installed kvfold package: pip install kvfold."""\n\n'
        f"import kvfold\nfrom {HOME} import {config_class}, {model_class}\n"
    )
