"""observed: what the prompt's own queries would lose, if they were asked again behind it."""

from __future__ import annotations

from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer


class Observed(Scorer):
    """Queries of the text stand for those to come: turned to positions behind the prompt they see all of it, and a token is
    worth the square of what its loss does to the layer's output, summed over them."""

    def score(self, prompt: Prompt) -> Tensor:
        return prompt.by_stored_head(prompt.lost())
