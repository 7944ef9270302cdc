"""The README.md of a folded model: what it takes, how it was made, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvfold.compression.recipe import Recipe
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.base import runtime, servable_by

CONTEXTS = (2_048, 8_192, 32_768)

CARD = """---
library_name: transformers
base_model: {model}
tags: [kvfold, kv-cache]
---

# {name}

`{model}` with a smaller KV cache, folded by [kvfold](https://pypi.org/project/kvfold/): preset `{preset}`, width method
`{width}`, bits method `{bits}`, {kv_budget:.4g} of the original bytes over {context_len:,} tokens.

## Bytes of cache ({dtype})

| | original | this model | kept |
|---|---|---|---|
| per token | {source_bytes:,} | {bytes:,} | {share:.4f} |
{contexts}
| read per decode step at 32,768 tokens | {source_read:,} | {read:,} | {read_share:.4f} |

"this model" counts what kvfold's cache allocates, unfilled blocks included; "original" what a DynamicCache holds.
Attention parameters: {source_parameters:,} before, {parameters:,} after.

Quality is not stated here because it was not measured in this step. Measure it on your own text:
`kvfold evaluate {out} --against {model} --data FILE`.

## Load

```python
import kvfold  # teaches transformers' Auto classes this model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")
```

{serving}

## How it was made

`kvfold compress --recipe recipe.yaml` with kvfold {version}:

```yaml
{recipe}```
"""


def write_card_text(
    recipe: Recipe, plan: CachePlan, *, config: Mapping[str, Any], version: str, parameters: tuple[int, int]
) -> str:
    """The card of a model with this config.json. `parameters`: numbers in attention weights before and after."""
    contexts = [
        f"| {n:,} tokens | {plan.source_kv_bytes(n):,} | {plan.kv_bytes(n):,} |"
        f" {plan.kv_bytes(n) / plan.source_kv_bytes(n):.4f} |"
        for n in CONTEXTS
    ]
    source_read = source_read_bytes(plan, CONTEXTS[-1])
    read = plan.kv_read_bytes(CONTEXTS[-1])
    return CARD.format(
        model=recipe.model,
        name=Path(recipe.out).name,
        out=recipe.out,
        preset=recipe.preset or "(none)",
        width=recipe.width["method"],
        bits=recipe.bits["method"],
        dtype=plan.dtype,
        kv_budget=plan.kv_budget,
        context_len=plan.context_len,
        share=plan.kv_bytes_per_token() / plan.source_kv_bytes_per_token(),
        source_bytes=plan.source_kv_bytes_per_token(),
        bytes=plan.kv_bytes_per_token(),
        contexts="\n".join(contexts),
        source_read=source_read,
        read=read,
        read_share=read / source_read,
        source_parameters=parameters[0],
        parameters=parameters[1],
        version=version,
        recipe=recipe.to_yaml(),
        serving=" ".join(_serving(plan, config, recipe.out)),
    )


def _serving(plan: CachePlan, config: Mapping[str, Any], out: str) -> Iterator[str]:
    """A sentence per runtime that has a command to serve with."""
    for name, obstacle in servable_by(plan, config).items():
        command = runtime(name).serve_command(out)
        if command:
            serves = f"{name} serves it without flags (`pip install 'kvfold[{name}]'`): `{command}`."
            yield serves if obstacle is None else f"{name} does not serve it: {obstacle}"


def source_read_bytes(plan: CachePlan, context_len: int) -> int:
    """Bytes of cache that one decode step of the original model reads."""
    tokens = [(layer, context_len if layer.window is None else min(context_len, layer.window)) for layer in plan.source]
    return plan.itemsize() * sum(layer.elements_per_token * count for layer, count in tokens)
