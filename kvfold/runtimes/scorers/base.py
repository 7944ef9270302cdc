"""The contract of a scorer, and what it sees of a prompt."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.kernels import effects
from kvfold.runtimes.kernels.attention import exact, scores_of, softmax, weighted
from kvfold.runtimes.kernels.rotary import apply_rotary

AT_ONCE = 256
"""Queries of which probabilities exist."""
QUERIES, TOKENS = 64, 512
"""So many are asked again for every so many tokens of a prompt; of one of twice as many tokens or less, once."""
ROUNDS_AT_ONCE = 4
"""Of which the kernel keeps losses apart."""
AHEAD, STRIDE = 128, 37
"""They are turned to places among the next AHEAD tokens, STRIDE apart, which has no divisor in common."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What heads that hold the same tokens hold when a prompt was read, and its queries.

    queries_BnTH: of the n query heads that read them, rotated, of the step's T tokens, which are the last of the S held ones.
        absorb: leads such queries to stored keys.
    keys_BCSR, values_BCSV: as stored, C heads of them.
    seen: (rows) -> what these queries see of the S tokens, as a mask [B or 1, n or 1, rows, S]: bool, or numbers to add.
    first_B: [B] or [1], the first of the T queries that is no padding.
    output: gives [D, n, V], how averages of stored values come into the residual stream.
    root: gives the `root_of` it, if somebody keeps that.
    again: of the S tokens the last so many are those of a second reading, of which nothing stays.
    """

    layer: AttentionLayer
    queries_BnTH: Tensor
    absorb: Callable[[Tensor], Tensor]
    keys_BCSR: Tensor
    values_BCSV: Tensor
    seen: Callable[[slice], Tensor]
    first_B: Tensor
    output: Callable[[], Tensor]
    root: Callable[[], Tensor] | None = None
    again: int = 0

    @property
    def steps(self) -> int:
        """T."""
        return self.queries_BnTH.shape[2]

    @functools.cached_property
    def seen_at_the_end(self) -> Tensor:
        """[B or 1, n or 1, 1, S]: of the last query, and of all that will come."""
        return self.seen(slice(self.steps - 1, self.steps))

    @functools.cached_property
    def shown_BS(self) -> Tensor:
        """[B, S] bool: which tokens are no padding."""
        seen = self.seen_at_the_end
        shown = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        return shown[:, 0, 0].expand(len(self.keys_BCSR), -1)

    def pieces(self) -> Iterator[slice]:
        """Of all queries AT_ONCE at a time."""
        for start in range(0, self.steps, AT_ONCE):
            yield slice(start, min(start + AT_ONCE, self.steps))

    def probabilities(self, rows: slice) -> Tensor:
        """[B, n, rows, S] of the prompt's own queries; 0 of padding."""
        probs = self.attention(self.queries_BnTH[:, :, rows], self.seen(rows))
        at = torch.arange(self.steps, device=probs.device)[rows]
        return probs * (at >= self.first_B[:, None])[:, None, :, None]

    def attention(self, queries_BnQH: Tensor, seen: Tensor) -> Tensor:
        """[B, n, Q, S]."""
        scores = self.capped(scores_of(self.absorb(queries_BnQH) * self.layer.scaling, self.keys_BCSR))
        if seen.dtype == torch.bool and seen.shape[2] == 1 and seen.all():  # a whole pass over memory less
            return scores.softmax(-1)
        return softmax(scores, seen)

    def capped(self, scores: Tensor) -> Tensor:
        """Scores as the layer's softmax takes them."""
        cap = self.layer.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    @functools.cached_property
    def rounds_B(self) -> Tensor:
        """[B]: how often QUERIES queries of a sequence are asked again."""
        tokens_B = self.steps - self.first_B
        rounds_B = torch.where(tokens_B > 2 * TOKENS, tokens_B // TOKENS, 1)
        return rounds_B.expand(len(self.queries_BnTH))

    @functools.cached_property
    def rounds(self) -> int:
        """Of the sequence that has most of them."""
        return int(self.rounds_B.max())

    @functools.cached_property
    def asked_again(self) -> Tensor:
        """[B, n, QUERIES, S]: what queries of the prompt, evenly, would attend to if they were asked again behind it."""
        return self._asked(0)

    def lost(self) -> Tensor:
        """[B, n, S]: the `effect` on what the queries of all rounds attend to."""
        total_BnS = self._lost_from(0)
        for first in range(ROUNDS_AT_ONCE, self.rounds, ROUNDS_AT_ONCE):
            total_BnS += self._lost_from(first)
        return total_BnS

    def _lost_from(self, first: int) -> Tensor:
        """Of ROUNDS_AT_ONCE rounds; 0 of sequences that have no such round."""
        rounds = range(first, min(first + ROUNDS_AT_ONCE, self.rounds))
        if self.by_kernel:
            found = self.losses if first == 0 else self._losses(rounds)
            parts = found.effect_BnpS.unflatten(2, (len(rounds), -1)).sum(3).unbind(2)
        else:
            parts = tuple(self.effect(self.asked_again if round == 0 else self._asked(round)) for round in rounds)
        return sum(part * (round < self.rounds_B)[:, None, None] for round, part in zip(rounds, parts, strict=True))

    def _asked(self, round: int) -> Tensor:
        return self.attention(self.questions(round), self.seen_at_the_end)

    @property
    def by_kernel(self) -> bool:
        """Whether the CPU's kernel says what queries that are asked again lose."""
        return effects.serves(self.queries_BnTH, self.keys_BCSR, self.values_BCSV)

    @functools.cached_property
    def losses(self) -> effects.Losses:
        """Of the first rounds, by the kernel."""
        return self._losses(range(min(ROUNDS_AT_ONCE, self.rounds)))

    @functools.cached_property
    def first_losses(self) -> effects.Losses:
        """Of the first round at least."""
        return self.losses if "losses" in self.__dict__ else self._losses(range(1))

    def _losses(self, rounds: range) -> effects.Losses:
        root_nVV = self.root() if self.root else root_of(self.output())
        queries_BnQR = torch.cat([self.absorbed_again if round == 0 else self._absorbed(round) for round in rounds], 2)
        given = (queries_BnQR, self.keys_BCSR, self.values_BCSV, self.hidden_at_the_end, root_nVV)
        return effects.losses(*given, softcap=self.layer.softcap)

    @functools.cached_property
    def absorbed_again(self) -> Tensor:
        """[B, n, QUERIES, R]: the first round's, scaled, as they meet stored keys."""
        return self._absorbed(0)

    def _absorbed(self, round: int) -> Tensor:
        return self.absorb(self.questions(round)) * self.layer.scaling

    @functools.cached_property
    def hidden_at_the_end(self) -> Tensor | None:
        """`seen_at_the_end` as numbers to add to scores [B or 1, n or 1, S]; None where nothing is hidden."""
        seen = self.seen_at_the_end[:, :, 0]
        if seen.dtype != torch.bool:
            return seen
        lowest = torch.finfo(torch.float32).min
        return None if seen.all() else torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, lowest)

    def questions(self, round: int) -> Tensor:
        """[B, n, QUERIES, H]: queries of the prompt as they are asked again behind it, of each round others, between those of
        the rounds before."""
        # the first round asks those in the middle of what all rounds of a sequence share
        at_B1 = ((round + self.rounds_B // 2) % self.rounds_B)[:, None]
        at_Q = torch.arange(QUERIES, device=at_B1.device)
        at_BQ = self.places(at_Q * self.rounds_B[:, None] + at_B1, QUERIES * self.rounds_B[:, None])
        beyond_Q = (at_Q + round * QUERIES) * STRIDE % AHEAD + 1
        return self.ahead(at_BQ, beyond_Q.expand_as(at_BQ))

    def ahead(self, at_BQ: Tensor, beyond_BQ: Tensor) -> Tensor:
        """[B, n, Q, H]: the queries at places of the step, as if they stood so many tokens behind its last one."""
        B, n, _, H = self.queries_BnTH.shape
        index = at_BQ[:, None, :, None].expand(B, n, -1, H)
        cos, sin = self.turns(self.steps - 1 - at_BQ + beyond_BQ)
        return apply_rotary(self.queries_BnTH.gather(2, index), cos, sin)

    def turns(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., r] of what turns a query as if it stood so many tokens later; nothing, without rotation."""
        speeds = torch.tensor(self.layer.rotary_speeds, dtype=torch.float32, device=by.device)
        angles = (by[..., None] * speeds)[..., : self.layer.rotary_dim // 2]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def spread(self, count: int) -> Tensor:
        """[B, Q]: `count` places of the step, evenly, behind padding; some of them several times in a short one."""
        return self.places(torch.arange(count, device=self.first_B.device), count)

    def places(self, index: Tensor, count: Tensor | int) -> Tensor:
        """[B, Q]: of `count` places [B, 1] these [Q or B, Q]."""
        first_B1 = self.first_B[:, None].expand(len(self.queries_BnTH), 1)
        return (first_B1 + ((self.steps - first_B1) * ((index.double() + 0.5) / count)).long()).clamp_max(
            self.steps - 1
        )

    def effects(self, probs_BnQS: Tensor) -> Tensor:
        """[B, n, Q, S]: the square of how far a query's head moves in the residual stream when one token is dropped,
        p / (1 - p) W (v - o); exact for one token."""
        led_BnSV, own_BnS = self._led
        odds_BnQS, out_BnQV, out_BnQ, at_BnQ1, of_most_BnQ1 = self._parted(probs_BnQS)
        far_BnQS = own_BnS[:, :, None] + out_BnQ[..., None] - 2 * out_BnQV @ led_BnSV.transpose(2, 3)
        return (far_BnQS.clamp_min(0) * odds_BnQS.square()).scatter(3, at_BnQ1, of_most_BnQ1)

    def effect(self, probs_BnQS: Tensor) -> Tensor:
        """[B, n, S]: `effects` summed over queries, by one product of odds with what they weigh."""
        led_BnSV, own_BnS = self._led
        odds_BnQS, out_BnQV, out_BnQ, at_BnQ1, of_most_BnQ1 = self._parted(probs_BnQS)
        ones_BnQ1 = torch.ones_like(out_BnQ)[..., None]
        weights_BnSQ = odds_BnQS.square_().transpose(2, 3)
        sums_BnSV = weights_BnSQ @ torch.cat([-2 * out_BnQV, ones_BnQ1, out_BnQ[..., None]], dim=-1)
        mixed_BnSV, odds_BnS, out_BnS = sums_BnSV[..., :-2], sums_BnSV[..., -2], sums_BnSV[..., -1]
        others_BnS = ((mixed_BnSV * led_BnSV).sum(-1) + odds_BnS * own_BnS + out_BnS).clamp_min_(0)
        return others_BnS.scatter_add_(2, at_BnQ1[..., 0], of_most_BnQ1[..., 0])

    def _parted(self, probs_BnQS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """p / (1 - p) of all tokens but the one that a query attends to most; o [B, n, Q, V] and o M o [B, n, Q], with the
        metric M; where that one is [B, n, Q, 1], and its effect, by the average of the others: its p may be almost 1, and
        nothing be left of v - o."""
        most_BnQ1, at_BnQ1 = probs_BnQS.max(-1, keepdim=True)
        others_BnQS = probs_BnQS.scatter(3, at_BnQ1, 0)
        rest_BnQV = weighted(others_BnQS, self._values, self._values.dtype)
        own_BnQV = self._values_at(at_BnQ1)
        away_BnQV = own_BnQV - rest_BnQV / others_BnQS.sum(-1, keepdim=True).clamp_min(1e-30)
        of_most_BnQ = (away_BnQV @ self._metric * away_BnQV).sum(-1).clamp_min(0)
        out_BnQV = rest_BnQV + most_BnQ1 * own_BnQV
        out_BnQ = (out_BnQV @ self._metric * out_BnQV).sum(-1)
        # in place: new memory takes longer than what is done with it
        odds_BnQS = (1 - others_BnQS).reciprocal_().mul_(others_BnQS)
        return odds_BnQS, out_BnQV, out_BnQ, at_BnQ1, of_most_BnQ[..., None] * most_BnQ1.square()

    def _values_at(self, at_BnQ1: Tensor) -> Tensor:
        """[B, n, Q, V]."""
        index_BCM1 = at_BnQ1.unflatten(1, (self._values.shape[1], -1)).flatten(2, 3)
        found_BCMV = self._values.gather(2, index_BCM1.expand(-1, -1, -1, self._values.shape[3]))
        return found_BCMV.reshape(*at_BnQ1.shape[:3], -1)

    @functools.cached_property
    def _led(self) -> tuple[Tensor, Tensor]:
        """Values times the metric M [B, n, S, V], and v M v [B, n, S]."""
        n, C = self.queries_BnTH.shape[1], self._values.shape[1]
        values_BnSV = self._values.repeat_interleave(n // C, dim=1)
        led_BnSV = values_BnSV @ self._metric
        return led_BnSV, (led_BnSV * values_BnSV).sum(-1)

    @functools.cached_property
    def _values(self) -> Tensor:
        """[B, C, S, V] as exact as probabilities are."""
        return self.values_BCSV.to(exact(self.queries_BnTH))

    @functools.cached_property
    def _metric(self) -> Tensor:
        """[n, V, V]."""
        led_nDV = self.output().transpose(0, 1).float()
        return (led_nDV.transpose(1, 2) @ led_nDV).to(self._values.dtype)

    def by_stored_head(self, x_BnS: Tensor) -> Tensor:
        """[B, C, S]: summed over the query heads that read one stored head."""
        return x_BnS.unflatten(1, (self.keys_BCSR.shape[1], -1)).sum(2)


def root_of(output_DnV: Tensor) -> Tensor:
    """[n, V, V] R: the squares of output v and of R v are the same, but for what is small."""
    of_heads = (led_DV.double() for led_DV in output_DnV.unbind(1))  # one by one: of all heads they are large
    metric_nVV = torch.stack([led_DV.mT @ led_DV for led_DV in of_heads])
    least_n1 = 1e-6 * metric_nVV.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30  # of heads that say nothing
    metric_nVV.diagonal(dim1=1, dim2=2).add_(least_n1)
    return torch.linalg.cholesky_ex(metric_nVV)[0].mT.float()


class Scorer(ABC):
    """Says which tokens of a prompt its heads keep, when it was read and before anything is asked.

    repeats: whether the prompt is read a second time for it, behind itself; the queries are those of that reading then, and
    the tokens it reads the last of those held, of which nothing stays.
    agree: whether what it says of a head depends on the others of its run; if not, heads of several runs are asked together.
    """

    repeats: ClassVar[bool] = False
    agree: ClassVar[bool] = False

    @abstractmethod
    def score(self, prompt: Prompt) -> Tensor:
        """[B, C, S]: of every stored head, what the tokens are worth; the highest stay. What it says of padding, of the first
        tokens and of the newest does not matter."""


CONTRACT = Scorer
