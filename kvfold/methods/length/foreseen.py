"""foreseen: every head keeps the tokens of which the layer's input says that they will be worth most to it."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.length._tokens_per_head import TokensPerHead
from kvfold.plan.token_runs import FORESEEN, PROMPTS, TokenRun, TokenRuns


@dataclass(frozen=True, kw_only=True)
class Foreseen(TokensPerHead):
    """Said when a token comes, by one product with the layer's input that was fitted to what calibration tokens turned out to
    be worth (as KVzap does, but to what their loss does to the layer's output). It stands for tokens that are
    generated as well, and does not depend on the steps in which a prompt comes.

    prompt: `masked`: tokens are dropped while a prompt is read; `whole`: when it was read, which loses less of prompts that
        come in one step.
    kept, sharing, sinks, newest, grows, recall: as in `recency`.
    """

    prompt: str = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt not in PROMPTS:
            raise RecipeError(f"length.prompt is {self.prompt!r}; it is one of {', '.join(PROMPTS)}.")

    @property
    def after_reading(self) -> bool:
        return self.prompt == "whole"

    @property
    def scorer(self) -> str:
        return FORESEEN

    @property
    def foresees(self) -> bool:
        return True

    def _tokens(self, *runs: TokenRun) -> TokenRuns:
        return TokenRuns(runs=runs, rule=FORESEEN, sinks=self.sinks, newest=self.newest, prompt=self.prompt)
