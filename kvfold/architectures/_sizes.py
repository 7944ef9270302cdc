"""What a config.json may say at all, before any code of a family builds a model by it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from kvfold.errors import CheckpointError
from kvfold.plan.typed import shortened

MOST = {
    "num_hidden_layers": 4096, "n_layer": 4096, "num_layers": 4096,
    "hidden_size": 2**18, "n_embd": 2**18,
    "num_attention_heads": 2**14, "n_head": 2**14, "num_key_value_heads": 2**14, "num_kv_heads": 2**14, "head_dim": 2**14,
    "intermediate_size": 2**22, "vocab_size": 2**26, "max_position_embeddings": 2**28, "n_positions": 2**28,
    "n_layers": 4096, "d_model": 2**18, "n_heads": 2**14, "max_seq_len": 2**28, "rotary_dim": 2**14,
    "num_experts": 2**14, "num_local_experts": 2**14, "num_experts_per_tok": 2**14,
}  # fmt: skip
"""Field -> far more than any model has."""
SHARES = frozenset({"partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"})
"""Of a head's numbers."""
MAY_BE_ZERO = frozenset({"num_experts", "num_local_experts"})


def check_sizes(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise CheckpointError on sizes that are no sizes, on numbers that are none, on parts that are no parts."""
    for name, value in config.items():
        if name in MOST and value is not None:
            least = 0 if name in MAY_BE_ZERO else 1
            if type(value) is not int or not least <= value <= MOST[name]:
                raise CheckpointError(
                    f"{where}: {name} is {shortened(value)}; a number from {least} to {MOST[name]:,} was expected."
                )
        if name.endswith("_config") and value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"{where}: {name} is {shortened(value)} where fields of its own were expected.")
        if name == "text_config" and isinstance(value, Mapping):
            check_sizes(value, f"{where}: text_config")
    for name, number in _numbers(config):
        if isinstance(number, float) and not math.isfinite(number):
            raise CheckpointError(f"{where}: {name} is no finite number; download it again.")
        if name in SHARES and not 0 <= number <= 1:
            raise CheckpointError(f"{where}: {name} is {shortened(number)}; a share from 0 to 1 was expected.")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, value
