"""scored: every head keeps those tokens of a prompt that a scorer says are worth most to it."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold import registry
from kvfold.errors import RecipeError
from kvfold.methods.length._recent_form import with_recent
from kvfold.methods.length._tokens_per_head import TokensPerHead
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.token_runs import TokenRun, TokenRuns


@dataclass(frozen=True, kw_only=True)
class Scored(TokensPerHead):
    """Chosen when a prompt was read, before anything is asked; a prompt that comes in pieces is chosen from at each of them.

    rule: who says it, a file of runtimes/scorers/. `observed` and `repeated` (which reads prompts twice) are ours;
        `snapkv`, `h2o`, `tova`, `expected_attention`, `kvzip`, `keydiff` and `knorm` are the published ones.
    matched: what stays of a prompt stands for the rest of it as well (attention matching, arXiv 2602.16284): its scores and
        values are changed so that the prompt's own queries get of it what they would get of everything.
    recent: so many of the newest tokens are kept in a finer form as well, as in `recent`. Then, and where keys are rotated
        when they are read, all heads of a layer keep the same tokens.
    kept, sharing, sinks, newest, grows, recall: as in `recency`. Windows of these sizes pass by over tokens that come later.
    """

    rule: str = "observed"
    matched: bool = False
    recent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= self.newest:
            raise RecipeError(
                f"length.recent is {self.recent} and length.newest {self.newest}; tokens that have a finer form stay."
            )
        if self.rule not in (known := registry.names("scorers")):
            raise RecipeError(registry.unknown("scorer", self.rule, known))

    @property
    def after_reading(self) -> bool:
        return True

    @property
    def scorer(self) -> str:
        return self.rule

    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        if layer.window is not None:
            return spec
        return super().apply(layer, with_recent(layer, spec, finer, self.recent) if self.recent else spec)

    def _tokens(self, *runs: TokenRun) -> TokenRuns:
        return TokenRuns(
            runs=runs,
            rule=self.rule,
            sinks=self.sinks,
            newest=self.newest,
            prompt="whole",
            matched=self.matched,
        )
