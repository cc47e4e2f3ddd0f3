"""Coordinate search over recipes within a time budget, judged on facts that it never saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.errors import ConfigError, NoRoomError, SolveError, StatisticsError
from nulledit.evaluation.costs import Learned
from nulledit.io.settings import check_whole
from nulledit.io.untrusted import one_line
from nulledit.tuning.measure import Measured
from nulledit.tuning.moves import Move, moves, name_of, stages_of
from nulledit.tuning.objective import WEIGHT, Outcome, choose, difference
from nulledit.tuning.split import Split

START = "starting recipe"
NO_TIME = "no time left"
BOUND = "--candidates was reached"


class Measures(Protocol):
    """What the search needs of a bench."""

    @property
    def depth(self) -> int:
        """The model's number of blocks."""

    def measure(self, recipe: Recipe, facts: Sequence[Fact]) -> Measured:
        """Edit `facts` as one batch on the clean model, and measure."""

    def unedited(self, facts: Sequence[Fact]) -> Outcome:
        """The clean model itself."""


@dataclass(frozen=True)
class TuneSettings:
    """What bounds and steers a search."""

    seconds: float = 1800.0
    """Wall time for all of it, judging included."""
    candidates: int | None = None
    """Most candidates beside the starting recipe; None: as many as there is time for."""
    weight: float = WEIGHT
    """What a nat of KL a token costs, in the score's unit."""
    windows: tuple[tuple[int, ...], ...] = ()
    """Layers to try beside shifted ones."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"the time budget is {self.seconds} s; expected more than 0")
        if self.candidates is not None:
            check_whole("candidates", self.candidates)
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"the weight of KL is {self.weight}; expected 0 or more")


@dataclass(frozen=True)
class Candidate:
    """A recipe that was measured on the tuning facts."""

    stage: str
    """What was varied; empty for the starting recipe."""
    label: str
    """The change in words."""
    base: int
    """Number of the candidate that was changed, from 0; its own for the starting recipe."""
    recipe: Recipe
    measured: Measured


@dataclass(frozen=True)
class Untried:
    """A recipe that was not measured."""

    stage: str
    """What would have been varied."""
    label: str
    """The change in words."""
    base: int
    """Number of the candidate that would have been changed."""
    reason: str
    """Why it was not."""


@dataclass(frozen=True)
class Tuning:
    """What a search did and found."""

    settings: TuneSettings
    split: Split
    candidates: tuple[Candidate, ...]
    """Measured ones in their order; the first is the starting recipe."""
    untried: tuple[Untried, ...]
    """Those that the search would have measured."""
    chosen: int
    """Number of the winner."""
    unedited: Outcome
    """The model without edits, on the report facts."""
    started: Measured
    """The starting recipe on the report facts."""
    judged: Measured
    """The winner on the report facts; `started` where the start won."""
    seconds: float
    """Wall time, all in all."""
    cpu_seconds: float
    """Processor time of this process."""

    @property
    def winner(self) -> Candidate:
        """The candidate that was chosen."""
        return self.candidates[self.chosen]

    @property
    def gain(self) -> tuple[float, float]:
        """Winner above start on the report facts, and its standard error."""
        weight = self.settings.weight
        return difference(self.judged.outcome, self.started.outcome, weight)


@dataclass
class Search:
    """A search at work."""

    bench: Measures
    """Measures recipes."""
    split: Split
    settings: TuneSettings
    clock: Callable[[], float] = time.perf_counter
    """Seconds of wall time."""
    begun: float | None = None
    """What the clock said when the budget began; None: when the search is made."""
    tell: Callable[[Candidate | Untried, int], None] | None = None
    """Called with each candidate as it is done, and the number of the one that leads."""
    candidates: list[Candidate] = field(default_factory=list, init=False)
    """Measured so far."""
    untried: dict[str, Untried] = field(default_factory=dict, init=False)
    """By the recipe's name."""

    def __post_init__(self) -> None:
        self._begun = self.clock() if self.begun is None else self.begun

    def run(self, start: Recipe) -> Tuning:
        """Search from `start`, which names its layers, and judge what is found.

        StatisticsError where `start` itself lacks statistics. The starting recipe and the judging
        are done whatever the budget.
        """
        cpu = time.process_time()
        report = self.split.report
        unedited = self.bench.unedited(report)
        self._costs = Learned(self.bench.depth)
        self._seen: set[str] = set()
        self._measure("", START, 0, start)
        started = self.bench.measure(start, report)
        self._learn(start, report, started)
        while True:
            before = self._chosen()
            for stage in stages_of(start):
                base = self._chosen()
                recipe = self.candidates[base].recipe
                for move in moves(stage, recipe, self.bench.depth, self.settings.windows):
                    self._try(move, base)
            if self._chosen() == before:
                break
        chosen = self._chosen()
        winner = self.candidates[chosen].recipe
        judged = started if chosen == 0 else self.bench.measure(winner, report)
        return Tuning(
            self.settings,
            self.split,
            tuple(self.candidates),
            tuple(self.untried.values()),
            chosen,
            unedited,
            started,
            judged,
            self.clock() - self._begun,
            time.process_time() - cpu,
        )

    def _try(self, move: Move, base: int) -> None:
        name = name_of(move.recipe)
        if name in self._seen:
            return
        reason = self._refusal(move.recipe)
        if not reason:
            self._seen.add(name)
            self.untried.pop(name, None)
            reason = self._measure(move.stage, move.label, base, move.recipe)
        if reason and name not in self.untried:
            self.untried[name] = Untried(move.stage, move.label, base, reason)
            if self.tell:
                self.tell(self.untried[name], self._chosen())

    def _refusal(self, recipe: Recipe) -> str:
        """Why a candidate can't be begun; empty if it can."""
        most = self.settings.candidates
        if most is not None and len(self.candidates) > most:
            return BOUND
        costs, report = self._costs, len(self.split.report)
        # What is chosen is judged, be it the one that leads now or this one; the start is already.
        judging, leads = costs.anew(recipe, report), self._chosen()
        if leads:
            judging = max(judging, costs.anew(self.candidates[leads].recipe, report))
        end = self.clock() - self._begun + costs.again(recipe, len(self.split.tuning)) + judging
        return NO_TIME if end > self.settings.seconds else ""

    def _measure(self, stage: str, label: str, base: int, recipe: Recipe) -> str:
        """Measure a candidate; why it can't be, or nothing."""
        try:
            measured = self.bench.measure(recipe, self.split.tuning)
        except (StatisticsError, NoRoomError, SolveError) as error:
            if not self.candidates:
                raise
            return one_line(str(error))
        self._seen.add(name_of(recipe))
        self._learn(recipe, self.split.tuning, measured)
        self.candidates.append(Candidate(stage, label, base, recipe, measured))
        if self.tell:
            self.tell(self.candidates[-1], self._chosen())
        return ""

    def _learn(self, recipe: Recipe, facts: Sequence[Fact], measured: Measured) -> None:
        values = measured.value_seconds
        self._costs.add(
            recipe,
            len(facts),
            rest=measured.seconds - values,
            values=values,
            passes=measured.passes,
            optimised=measured.optimised,
        )

    def _chosen(self) -> int:
        """Number of the one to take of those measured so far."""
        held = self.candidates
        costs = [c.recipe.values.steps * (self.bench.depth - c.recipe.layers[-1]) for c in held]
        return choose([c.measured.outcome for c in held], costs, self.settings.weight)
