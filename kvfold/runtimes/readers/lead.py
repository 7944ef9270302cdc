"""lead: the first numbers of the stored keys choose, and of the chosen tokens the rest is read."""

from __future__ import annotations

from torch import Tensor

from kvfold.runtimes.kernels.chosen_tokens import best_by_leading, chooses
from kvfold.runtimes.readers.base import Asked, Choice, Reader


class Lead(Reader):
    """Wants keys whose first numbers say most of their scores, as those of low-rank methods do, and stores nothing beside
    them."""

    def choose(self, asked: Asked) -> Choice:
        index_BGn = self._by_kernel(asked) if chooses(asked.queries_BNTR, asked.keys) else self._best(asked)
        return Choice(index_BGn, None, asked.count / asked.keys.shape[2])

    def _best(self, asked: Asked) -> Tensor:
        """The obvious way."""
        return self.best(asked.attention(asked.leading(self.reading.leading)), asked)

    def _by_kernel(self, asked: Asked) -> Tensor:
        sizes = {"groups": asked.groups, "count": asked.count, "leading": self.reading.leading}
        always = {"sinks": self.reading.sinks, "newest": self.reading.newest}
        return best_by_leading(
            asked.queries_BNTR, asked.keys, asked.seen, **sizes, **always, softcap=asked.softcap
        ).long()
