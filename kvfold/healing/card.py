"""The README.md of a healed model: its fold's, under its own name, with what the training was."""

from __future__ import annotations

from pathlib import Path

from kvfold.checkpoint.push import renamed
from kvfold.healing.recipe import Healing

CARD = "README.md"
MADE = "## How it was made\n"
HEALED = """## How it was healed

`kvfold heal {folded}` trained {train} on up to {tokens:,} tokens of {data}, objective `{objective}`{teacher}. All settings
are in `healing.yaml`, losses in `loss.svg`. What follows made `{folded}`.

"""


def healed_card(text: str, healing: Healing) -> str:
    """Of the folder `healing.out`; `text`: the card of the folder that was healed."""
    head, made, recipe = renamed(text, healing.out, title=Path(healing.out).name).partition(MADE)
    said = HEALED.format(
        folded=healing.folded,
        train={"all": "all weights", "attention": "attention", "fold": "the fold's own matrices", "lora": "LoRA"}[
            healing.train
        ],
        tokens=healing.max_tokens,
        data=f"`{healing.data}`",
        objective=healing.objective,
        teacher=f", from `{healing.teacher}`" if healing.teacher else "",
    )
    return head + said + made + recipe
