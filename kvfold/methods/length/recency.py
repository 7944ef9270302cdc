"""recency: every head keeps the first tokens of a sequence and the newest, as many as it needs; others are dropped."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.length._tokens_per_head import TokensPerHead
from kvfold.plan.token_runs import PROMPTS, TokenRun, TokenRuns


@dataclass(frozen=True, kw_only=True)
class Recency(TokensPerHead):
    """Sinks and a window (StreamingLLM, arXiv 2309.17453), of a size for each head: some heads look far back and others never
    do, which is a property of the model and not of the text.

    kept: share of the tokens that stay, in the mean over heads; null: what a budget leaves of them.
    sharing: `equal` keeps as many in every head; `pyramid` fewer from layer to layer (PyramidKV, arXiv 2406.02069);
        `ada` lets the heads of a layer compete for its tokens by a scorer's own count (`scored`; Ada-KV, arXiv 2407.11550:
        there in every prompt, here in the mean over calibration text);
        `measured` gives them to the heads that forgetting costs most, in nats; `classes` lets those keep
        everything and all others only what is recent (DuoAttention, arXiv 2410.10819).
    sinks: of the first tokens. newest: of the last ones, which every head keeps at least.
    grows: windows grow with contexts that are longer than the one for which bytes were counted; otherwise the cache of a
        head that forgets has one size.
    prompt: `masked`: tokens are dropped while a prompt is read, so that it may come in pieces; `whole`: when it was read,
        which loses less of prompts that come in one step.
    recall: what finding passages again counts beside predicting ordinary text, where forgetting is weighed.
    """

    prompt: str = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt not in PROMPTS:
            raise RecipeError(f"length.prompt is {self.prompt!r}; it is one of {', '.join(PROMPTS)}.")

    @property
    def after_reading(self) -> bool:
        return self.prompt == "whole"

    def _tokens(self, *runs: TokenRun) -> TokenRuns:
        return TokenRuns(runs=runs, sinks=self.sinks, prompt=self.prompt)
