"""observed: what the prompt's own queries would lose, if they were asked again behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.runtimes.scorers.base import Prompt, Scorer

QUERIES, AHEAD, STRIDE = 96, 128, 37
"""Of the prompt, evenly; turned to places among the next AHEAD tokens, STRIDE apart, which has no divisor in common."""


class Observed(Scorer):
    """Queries of the text stand for those to come: turned to positions behind the prompt they see all of it, and a token is
    worth the square of what its loss does to the layer's output, in the mean over them."""

    def score(self, prompt: Prompt) -> Tensor:
        at_BQ = prompt.spread(QUERIES)
        beyond_Q = torch.arange(at_BQ.shape[1], device=at_BQ.device) * STRIDE % AHEAD + 1
        probs = prompt.attention(prompt.ahead(at_BQ, beyond_Q.expand_as(at_BQ)), prompt.seen_at_the_end)
        return prompt.by_stored_head(prompt.effects(probs).mean(2))
