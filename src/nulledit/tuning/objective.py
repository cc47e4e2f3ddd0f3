"""What is maximised, how sure it is, and which of the candidates that tie is taken.

    score = H(efficacy, paraphrases, neighbours) - weight * KL

H is the harmonic mean of means over facts, 0 to 1. KL is that of the unedited model's next-token
distribution from the edited one's on other text, nats a token: on text that the unedited model
itself would write, it is what the logarithm of perplexity grows by, without the noise of one text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nulledit.evaluation.scores import Score, per_fact
from nulledit.evaluation.stats import Rate, jackknife_variance

KINDS = ("efficacy", "paraphrases", "neighbours")
WEIGHT = 2.0  # a growth of perplexity by one per cent, about 0.01 nats, costs two points


@dataclass(frozen=True)
class Outcome:
    """What a recipe did to facts and to other text."""

    facts: Mapping[str, Mapping[str, float]]
    """Kind -> fact id -> its share, 0 to 1; a fact that lacks such prompts is not in it."""
    drift: tuple[float, ...]
    """KL by window of the text, nats a token."""

    def rate(self, kind: str) -> Rate | None:
        """Mean over the facts that have prompts of this kind; None if none has."""
        values = list(self.facts.get(kind, {}).values())
        return Rate.of(values) if values else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that at least two facts have: they make up the score."""
        return tuple(kind for kind in KINDS if len(self.facts.get(kind, {})) > 1)


def shares(scores: Iterable[Score]) -> dict[str, dict[str, float]]:
    """Kind -> fact id -> share, of the answers to a fact's queries.

    The target, on the fact's prompt and its paraphrases: half for being likelier than the old
    answer, half the share of its tokens that are likeliest; all of it the latter where there is no
    old answer. Neighbours: the share whose answer is likelier than the target; of its tokens that
    are likeliest, where it stands against nothing.
    """
    found = per_fact(scores)
    told: dict[str, dict[str, float]] = {}
    for kind, measure in zip(KINDS, ("efficacy", "generalization", "specificity"), strict=True):
        preferred, tokens = found[measure], found[f"{measure}_tokens"]
        told[kind] = {
            fact: share
            if fact not in preferred
            else preferred[fact]
            if kind == "neighbours"
            else (preferred[fact] + share) / 2
            for fact, share in tokens.items()
        }
    return told


def score(outcome: Outcome, weight: float = WEIGHT) -> float:
    """The objective; minus infinity where the text's distribution is not finite any more."""
    return _score(outcome.facts, outcome.kinds, outcome.drift, weight)


def score_error(outcome: Outcome, weight: float = WEIGHT) -> float:
    """Standard error of `score` over facts and windows, by the jackknife."""
    return _jackknife([outcome], weight, lambda scores: scores[0])


def difference(a: Outcome, b: Outcome, weight: float = WEIGHT) -> tuple[float, float]:
    """How much `a` scores above `b`, and the standard error of that: paired, by the jackknife.

    Both are of the same facts and windows; one of them is left out of both at a time.
    """
    apart = score(a, weight) - score(b, weight)
    if not math.isfinite(apart):
        return apart, 0.0
    return apart, _jackknife([a, b], weight, lambda scores: scores[0] - scores[1])


def choose(outcomes: Sequence[Outcome], costs: Sequence[float], weight: float = WEIGHT) -> int:
    """Place of the one to take: the gentlest of those that tie with the best score.

    A tie is a difference to the best that is smaller than its standard error, so that no row of
    small steps leads away from it (the one-standard-error rule of Breiman et al., 1984). Gentler is
    a smaller mean KL; where that is equal, smaller `costs`; then the earlier one.
    """
    best = max(range(len(outcomes)), key=lambda i: score(outcomes[i], weight))
    tied = [best]
    for i, outcome in enumerate(outcomes):
        apart, error = difference(outcomes[best], outcome, weight)
        if apart == 0 or apart < error:
            tied.append(i)
    return min(tied, key=lambda i: (statistics.fmean(outcomes[i].drift), costs[i], i))


def _score(
    facts: Mapping[str, Mapping[str, float]],
    kinds: Sequence[str],
    drift: Sequence[float],
    weight: float,
    without: str | None = None,
) -> float:
    means = []
    for kind in kinds:
        held = [share for fact, share in facts[kind].items() if fact != without]
        means.append(statistics.fmean(held))
    lost = weight * statistics.fmean(drift)
    if not math.isfinite(lost):
        return -math.inf
    harmonic = statistics.harmonic_mean(means) if means else 0.0
    return harmonic - lost


def _jackknife(
    outcomes: Sequence[Outcome], weight: float, of: Callable[[Sequence[float]], float]
) -> float:
    """Standard error of a function of scores, one fact and then one window left out at a time."""
    kinds = outcomes[0].kinds
    names = dict.fromkeys(fact for kind in kinds for fact in outcomes[0].facts[kind])
    by_fact = [
        of([_score(o.facts, kinds, o.drift, weight, name) for o in outcomes]) for name in names
    ]
    windows = range(len(outcomes[0].drift))
    by_window = [
        of([_score(o.facts, kinds, [*o.drift[:i], *o.drift[i + 1 :]], weight) for o in outcomes])
        for i in windows
        if len(windows) > 1
    ]
    return math.sqrt(jackknife_variance(by_fact) + jackknife_variance(by_window))
