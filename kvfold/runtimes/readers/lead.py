"""lead: the first numbers of the stored keys choose, and of the chosen tokens the rest is read."""

from __future__ import annotations

from kvfold.runtimes.readers.base import Asked, Choice, Reader


class Lead(Reader):
    """Wants keys whose first numbers say most of their scores, as those of low-rank methods do, and stores nothing beside
    them."""

    def choose(self, asked: Asked) -> Choice:
        worth_BGS = asked.attention(asked.leading(self.reading.leading))
        return Choice(self.best(worth_BGS, asked), None, asked.count / asked.keys.shape[2])
