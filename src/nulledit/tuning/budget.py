"""What a candidate will take, from those that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.tuning.measure import Measured

SLACK = 1.2  # on what was measured once: the machine may have other work


class Costs:
    """Seconds of wall time.

    Values take the largest share of the allowed passes that any recipe took, or all of them where
    the step size is smaller than all so far. A pass is counted in blocks above the last edited one,
    which is what it runs, at the mean price so far; so is the rest, which is keys, solve, questions
    and text.
    """

    def __init__(self, depth: int):
        """`depth`: the model's number of blocks."""
        self.depth = depth
        self._rates: list[float] = []  # seconds of a pass of a fact through a block
        self._rests: list[float] = []  # seconds a fact of the batch
        self._share = 0.0  # of the allowed passes
        self._slowest = float("inf")  # learning rate
        self._values: dict[object, float] = {}  # seconds of values that were optimised, a fact

    def add(self, recipe: Recipe, facts: Sequence[Fact], measured: Measured) -> None:
        """Learn from a recipe that was measured."""
        self._rests.append((measured.seconds - measured.value_seconds) / len(facts))
        if measured.passes:
            work = measured.passes * self._above(recipe)
            self._rates.append(measured.value_seconds / work)
            values = recipe.values
            allowed = (values.steps + 1) * measured.optimised
            self._share = max(self._share, min(1.0, measured.passes / allowed))
            self._slowest = min(self._slowest, values.learning_rate)
            self._values[self._kept_as(recipe)] = measured.value_seconds / len(facts)

    def of_candidate(self, recipe: Recipe, facts: Sequence[Fact]) -> float:
        """Seconds on facts on which others were measured, so that values may be kept ones."""
        kept = self._kept_as(recipe) in self._values
        return SLACK * (0.0 if kept else self._values_of(recipe, facts)) + self.of_asking(facts)

    def of_judging(self, recipe: Recipe, facts: Sequence[Fact]) -> float:
        """Seconds on facts that were not edited yet; what was measured serves, where it was."""
        known = self._values.get(self._kept_as(recipe))
        values = self._values_of(recipe, facts) if known is None else known * len(facts)
        return SLACK * values + self.of_asking(facts)

    def of_asking(self, facts: Sequence[Fact]) -> float:
        """Seconds of all but values."""
        return SLACK * fmean(self._rests) * len(facts)

    def _values_of(self, recipe: Recipe, facts: Sequence[Fact]) -> float:
        values = recipe.values
        share = self._share if values.learning_rate >= self._slowest else 1.0
        passes = share * (values.steps + 1) * len(facts)
        return self._mean_rate() * passes * self._above(recipe)

    def _mean_rate(self) -> float:
        return fmean(self._rates) if self._rates else 0.0  # methods by gradient have no values

    def _above(self, recipe: Recipe) -> int:
        return self.depth - recipe.layers[-1]

    def _kept_as(self, recipe: Recipe) -> object:
        """The same for recipes whose values are the same (`ValueCache`)."""
        layers = recipe.layers if recipe.values.at == "each" else recipe.layers[-1:]
        return recipe.values, recipe.contexts, layers
