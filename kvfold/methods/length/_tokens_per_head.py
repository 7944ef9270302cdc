"""Methods by which every head keeps as many tokens as it needs, or as all others, and drops the rest."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.rounding import whole
from kvfold.plan.token_runs import TokenRun, TokenRuns

SHARING = ("equal", "pyramid", "ada", "classes", "measured")
STEEPNESS = 20
"""Of a pyramid: how many times less than the mean its last layer keeps."""


@dataclass(frozen=True, kw_only=True)
class TokensPerHead(LengthMethod):
    """How many, and what every head keeps at least. `recency` says what the fields mean."""

    kept: float | None = None
    sharing: str = "measured"
    sinks: int = 4
    newest: int = 32
    grows: bool = True
    recall: float = 1.0

    def __post_init__(self) -> None:
        if self.kept is not None and not 0 < self.kept <= 1:
            raise RecipeError(f"length.kept is {self.kept}; it is a share of the tokens, above 0 and at most 1.")
        if self.sharing not in SHARING:
            raise RecipeError(f"length.sharing is {self.sharing!r}; it is one of {', '.join(SHARING)}.")
        if self.competes and (self.scorer is None or self.foresees):
            raise RecipeError("length.sharing='ada' shares tokens by what a scorer says; take length.method=scored.")
        if self.sinks < 0 or self.newest < 1:
            raise RecipeError(
                f"length.sinks is {self.sinks} and length.newest {self.newest}; every head keeps at least one token."
            )

    @property
    def drops(self) -> bool:
        return True

    @property
    def share_kept(self) -> float | None:
        return self.kept

    @property
    def weighs_heads(self) -> bool:
        return self.sharing in ("ada", "classes", "measured")

    @property
    def competes(self) -> bool:
        return self.sharing == "ada"

    @property
    def scorer(self) -> str | None:
        """Which chooses besides the first tokens and the newest; None where only these stay."""
        return None

    @property
    def least(self) -> int:
        """Tokens that every head keeps."""
        return self.sinks + self.newest

    def spread(self, mean: float, layers: int, context_len: int) -> list[int]:
        if self.sharing != "pyramid" or layers == 1:
            return super().spread(mean, layers, context_len)
        last = max(mean / STEEPNESS, min(self.least, mean), 2 * mean - context_len)
        step = 2 * (mean - last) / (layers - 1)
        return [whole(2 * mean - last - layer * step) for layer in range(layers)]

    def sizes(self, context_len: int, sizes: Sequence[int]) -> list[int]:
        least = min(self.least, context_len)
        kept = [] if self.sharing == "classes" else [size for size in sizes if least < size < context_len]
        return [least, *kept, context_len] if least < context_len else [context_len]

    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        if layer.window is not None:  # which forgets by itself
            return spec
        run = TokenRun(heads=tuple(range(spec.num_kv_heads)), share=self.kept or 1.0, least=self.least)
        return dataclasses.replace(spec, tokens=dataclasses.replace(self._tokens(run), columns=self._columns(layer)))

    def keep(self, spec: CacheSpec, tokens_C: Sequence[int], context_len: int) -> CacheSpec:
        runs = []
        for kept in sorted(set(tokens_C)):
            heads = tuple(head for head, tokens in enumerate(tokens_C) if tokens == kept)
            share = 1.0 if kept >= context_len else (kept - 0.5) / context_len if self.grows else 0.0
            runs.append(TokenRun(heads=heads, share=share, least=min(kept, context_len)))
        assert spec.tokens is not None, "only where tokens are dropped"
        return dataclasses.replace(spec, tokens=dataclasses.replace(spec.tokens, runs=tuple(runs)))

    def _columns(self, layer: AttentionLayer) -> bool:
        """Whether it has to be stored where tokens stood."""
        return layer.alibi and self.scorer is not None

    @abstractmethod
    def _tokens(self, *runs: TokenRun) -> TokenRuns:
        """As the plan has it."""
