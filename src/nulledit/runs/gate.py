"""Measure what limits ask for, and nothing else: base and edited model of an editor in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from nulledit.data.facts import Fact
from nulledit.editing.call_log import Progress
from nulledit.editing.displacement import of_history
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.capability import TaskResult, capability
from nulledit.evaluation.hidden_norms import edit_rows, hidden_growth, text_rows
from nulledit.evaluation.kept_reading import base_reading, edited_reading
from nulledit.evaluation.measures import AT_RELATIONS
from nulledit.evaluation.opening import gates_of
from nulledit.evaluation.queries import KINDS as ASKED
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.reading import Reading, read
from nulledit.evaluation.relations import kept_relations, relation_states
from nulledit.evaluation.runner import ACCELERATOR_POSITIONS, CPU_POSITIONS
from nulledit.evaluation.scores import Score, per_fact, score
from nulledit.evaluation.stats import Rate, perplexity_growth
from nulledit.evaluation.tasks import read_tasks
from nulledit.report.document import Value
from nulledit.runs.gate_report import FAILED, OK, UNMEASURED, GateReport, Row
from nulledit.runs.limits import KINDS, Bound, Least, Limits, Most, Oldest, Tasks, why_absent
from nulledit.runs.measure import read_text
from nulledit.runs.tables import OPENINGS, of_text

RATE, POINTS = (0.0, 100.0), (-100.0, 100.0)
"""Ends of a mean of shares, and of what it lost."""
SURE = 1.645  # standard errors of a one-sided 95 %
DOUBT = 0.05  # chance of a sample like this that `confident` accepts
NO_TEXT = "no window of text with two tokens or more"


@dataclass(frozen=True)
class Found:
    """A measured number."""

    value: float
    """In the limit's unit."""
    error: float | None = None
    """Standard error, same unit; None for what is no estimate."""
    n: int | None = None
    """What it is over."""
    over: str = ""
    """What n counts."""
    agreed: bool = False
    """Whether it is a mean of shares that are all the same, which hides how few they are."""
    note: str = ""
    """Where it was found, or how it is spread."""
    ends: tuple[float, float] = (-math.inf, math.inf)
    """What it can't be below or above."""

    @classmethod
    def of(
        cls,
        rate: Rate,
        over: str,
        *,
        shares: bool = False,
        ends: tuple[float, float] = (-math.inf, math.inf),
    ) -> Found:
        """From a rate in shares of one."""
        return cls(
            100 * rate.mean,
            100 * rate.standard_error,
            rate.n,
            over,
            shares and rate.standard_error == 0,
            ends=ends,
        )

    @property
    def margin(self) -> float:
        """How far the truth may lie from `value` by one-sided 95 %.

        Where all n facts agree the normal bound would be 0; then it is what n draws in a row leave
        open (Clopper and Pearson): 1 − 0.05^(1/n), 11 points for 25 facts. nan for n = 1.
        """
        if self.error is None:
            return 0.0
        if self.agreed and self.n:
            return 100 * (1 - DOUBT ** (1 / self.n))
        return SURE * self.error

    def bound(self, side: str, *, confident: bool) -> float:
        """The value, or where it ends by one-sided 95 %, on the side that a limit reads."""
        margin = self.margin if confident else 0.0
        # The number comes first: beside nan, max and min give what they find first.
        if side == "at_least":
            return max(self.value - margin, self.ends[0])
        return min(self.value + margin, self.ends[1])


@dataclass(frozen=True)
class Missing:
    """Why a limit could not be measured."""

    why: str
    """In words."""


Outcome = Found | Missing


def check(
    editor: EditEngine,
    limits: Limits,
    *,
    facts: Sequence[Fact] | None = None,
    windows: Sequence[Sequence[int]] | None = None,
    tasks: str | Path | None = None,
    progress: Progress | None = None,
) -> GateReport:
    """Compare the editor's model, as it is now, with its base against `limits`.

    Nothing is saved or changed, and only what the limits ask for is measured: norms, leakage and
    room alone take no forward pass. `facts`: by default those in the model. `windows`: token ids of
    a text; by default of the one that comes with the package. `tasks`: the folder of the six
    tasks' files, a ConfigError if it is not there. `progress` receives the stage, what is done and
    what there is in all. A limit that can't be measured fails unless it is optional; so does a
    number that is not finite.
    """
    check_folder(tasks)
    at_work = _Measuring(editor, limits, facts, windows, tasks, progress)
    rows: list[Row] = []
    for name, bound in limits.bounds.items():
        for label, found in at_work.outcomes(name, bound).items():
            rows.append(_judged(label, bound, found, KINDS[name].unit))
    return GateReport(tuple(rows), limits.source)


def _judged(name: str, bound: Bound, found: Outcome, unit: str = "%") -> Row:
    side = "at_least" if isinstance(bound, Least) else "at_most"
    limit = bound.at_least if isinstance(bound, Least) else cast(Most, bound).at_most
    confident = bool(getattr(bound, "confident", False))
    if isinstance(found, Missing):
        verdict = UNMEASURED if bound.optional else FAILED
        return Row(name, None, None, None, "", side, limit, confident, verdict, found.why, unit)
    end = found.bound(side, confident=confident)
    # Every comparison with nan is false, so what is not a number fails.
    holds = end >= limit if side == "at_least" else end <= limit
    note = found.note
    if confident and not holds:
        note = f"{note}, " * bool(note) + f"95 % bound {end:.1f} {unit}"
    known = found.error is not None and math.isfinite(found.error)
    return Row(
        name,
        found.value,
        found.error if known else None,
        found.n,
        found.over,
        side,
        limit,
        confident,
        OK if holds else FAILED,
        note,
        unit,
    )


class _Measuring:
    """Each measure, made when it is first asked for."""

    def __init__(
        self,
        editor: EditEngine,
        limits: Limits,
        facts: Sequence[Fact] | None,
        windows: Sequence[Sequence[int]] | None,
        tasks: str | Path | None,
        progress: Progress | None,
    ):
        self.editor, self.limits = editor, limits
        self.facts = list(editor.facts if facts is None else facts)
        self._given_windows, self._folder, self._progress = windows, tasks, progress
        self._scores: dict[str, list[Score]] = {}
        self._reports: Sequence[Any] | None = None
        self._readings: dict[str, Reading] = {}

    def outcomes(self, name: str, bound: Bound) -> Mapping[str, Outcome]:
        """Row name -> what was found for the limit `name`."""
        if isinstance(bound, Tasks):
            return self._tasks(name, bound)
        if isinstance(bound, Oldest):
            said = [fact for fact in self.facts if not fact.forget]
            return {name: self._rate("efficacy_strict", (said or self.facts)[: bound.first])}
        if name.startswith("specificity") and name.endswith("_drop"):
            return {name: self._drop(name.removesuffix("_drop"))}
        if name in AT_RELATIONS:
            return {name: self._at_relations(name)}
        if name.removesuffix("_strict") in ASKED:
            return {name: self._rate(name, self.facts)}
        found: dict[str, Callable[[], Outcome]] = {
            "perplexity_growth": self._perplexity,
            "kl": self._kl,
            **{opening: partial(self._opening, opening) for opening in OPENINGS},
            "norm_growth": partial(self._of_layers, "update_share", highest=True),
            "displacement": self._displacement,
            "hidden_growth": self._hidden,
            "hidden_growth_text": self._hidden_text,
            "leakage": self._leakage,
            "room_left": partial(self._of_layers, "room", highest=False),
        }
        return {name: found[name]()}

    # -- facts -------------------------------------------------------------------------------

    def _rate(self, measure: str, facts: Sequence[Fact]) -> Outcome:
        values = per_fact(self._asked("edited"))[measure]
        held = [values[fact.id] for fact in facts if fact.id in values]
        if not held:
            return Missing(why_absent(measure, facts))
        return Found.of(Rate.of(held), "facts", shares=True, ends=RATE)

    def _drop(self, measure: str) -> Outcome:
        before, after = (per_fact(self._asked(side))[measure] for side in ("base", "edited"))
        moved = [before[i] - after[i] for i in before if i in after]
        if not moved:
            return Missing(why_absent(measure, self.facts))
        return Found.of(Rate.of(moved), "facts", shares=True, ends=POINTS)

    def _at_relations(self, measure: str) -> Outcome:
        model = self.editor.editable
        with self.editor.base_weights():
            base = relation_states(model, self.facts)
        now = relation_states(model, self.facts)
        if not now:
            return Missing(why_absent(measure, self.facts))
        rate = Rate.of(list(kept_relations(model, self.facts, base, now)[measure].values()))
        if KINDS[measure].unit == "%":
            return Found.of(rate, "facts", shares=True, ends=RATE)
        return Found(rate.mean, rate.standard_error, rate.n, "facts")

    def _asked(self, side: str) -> list[Score]:
        """Scores of the facts' queries, of those kinds that the limits ask for."""
        if side not in self._scores:
            kinds = self._kinds(side)
            queries = [q for fact in self.facts for q in queries_of(fact) if q.kind in kinds]
            if side == "base":
                with self.editor.base_weights():
                    self._scores[side] = self._score(queries, side)
            else:
                self._scores[side] = self._score(queries, side)
        return self._scores[side]

    def _kinds(self, side: str) -> set[str]:
        names = self.limits.bounds
        if side == "base":
            return {"specificity"}
        kinds = {kind for kind in ASKED if any(name.startswith(kind) for name in names)}
        return kinds | ({"efficacy"} if "oldest_cohort" in names else set())

    def _score(self, queries: Sequence[Any], side: str) -> list[Score]:
        if not queries:
            return []
        model = self.editor.editable
        return score(
            model,
            queries,
            positions=model.positions(CPU_POSITIONS, ACCELERATOR_POSITIONS),
            progress=self._stage(f"{side}: facts"),
        )

    # -- weights -----------------------------------------------------------------------------

    def _layers(self) -> Sequence[Any]:
        if self._reports is None:
            self._reports = self.editor.weights.reports()
        return self._reports

    def _of_layers(self, name: str, *, highest: bool) -> Outcome:
        found = {report.layer: getattr(report, name) for report in self._layers()}
        none = Found(0.0 if highest else 100.0, note="nothing is edited")
        return _worst(found, highest=highest) if found else none

    def _displacement(self) -> Outcome:
        by_batch = {d.batch: d.largest for d in of_history(self.editor.weights)}
        return _worst(by_batch, highest=True, what="batch") if by_batch else Found(0.0)

    def _leakage(self) -> Outcome:
        weights = self.editor.weights
        shares = {layer: weights.leakage(layer) for layer in weights.layers}
        return _worst(shares, highest=True) if shares else Missing("nothing is edited")

    # -- texts -------------------------------------------------------------------------------

    def _windows(self) -> Sequence[Sequence[int]]:
        if self._given_windows is None:
            self._given_windows = read_text(self.editor, None).windows
        return self._given_windows

    def _perplexity(self) -> Outcome:
        if not (texts := self._texts()):
            return Missing(NO_TEXT)
        grown = perplexity_growth(*(texts[side].losses for side in ("base", "edited")))
        return Found(grown.percent, grown.standard_error, grown.n, "windows")

    def _kl(self) -> Outcome:
        texts = self._texts()
        if not texts or (found := texts["edited"].kl) is None:
            return Missing(NO_TEXT)
        note = f"{100 * found.worst_share:.0f} % of it in the worst 1 %"
        n = len(texts["edited"].windows)
        return Found(found.value, found.standard_error, n, "windows", note=note)

    def _opening(self, name: str) -> Outcome:
        if gates_of(self.editor.weights) is None:
            return Missing("no gated edits in the model")
        texts = self._texts()
        if not texts or (found := texts["edited"].opening) is None:
            return Missing(NO_TEXT)
        told = of_text({"opening_rate": vars(found)}, name)
        if not isinstance(told, Value):  # one gate's share is no estimate
            return Found(cast(float, told), note=f"gate of {found.worst_fact}")
        note, n = f"{found.gates} neurons beside {found.units}", len(texts["edited"].windows)
        return Found(cast(float, told.mean), told.standard_error, n, "windows", note=note)

    def _texts(self) -> Mapping[str, Reading]:
        """What the edited model makes of the windows, and where it is asked for the base, by side.

        Empty without windows; the edited one is compared if that is asked for.
        """
        windows = [ids for ids in self._windows() if len(ids) > 1]
        if windows and not self._readings:
            editor, asked = self.editor, self.limits.bounds
            base: Reading | None = None
            if {"perplexity_growth", "kl"} & set(asked):
                tell = self._stage("base: perplexity")
                base = base_reading(editor, windows, progress=tell)
                self._readings["base"] = base
            gates, tell = gates_of(editor.weights), self._stage("edited: perplexity")
            self._readings["edited"] = (
                edited_reading(editor, windows, base, gates=gates, progress=tell)
                if base
                else read(editor.editable, windows, gates=gates, progress=tell)
            )
        return self._readings

    def _hidden(self) -> Outcome:
        if not self.facts:
            return Missing("no facts in the model")
        rows = edit_rows(self.editor.editable, self.facts)
        return Found.of(hidden_growth(self.editor, rows), "facts")

    def _hidden_text(self) -> Outcome:
        rows = text_rows(self._windows())
        return Found.of(hidden_growth(self.editor, rows), "pieces")

    # -- tasks -------------------------------------------------------------------------------

    def _tasks(self, name: str, bound: Tasks) -> Mapping[str, Outcome]:
        if self._folder is None:
            return {name: Missing("no folder of tasks was given")}
        try:
            items = read_tasks(self._folder, names=bound.tasks, limit=bound.items)
        except FactError as error:
            if bound.optional:
                return {name: Missing(str(error))}
            raise

        def ask(side: str) -> dict[str, TaskResult]:
            return capability(
                self.editor.editable.plain,
                items,
                progress=self._stage(f"{side}: tasks"),
            )

        with self.editor.base_weights():
            before = ask("base")
        after = ask("edited")
        return {f"{name} {task}": _task_drop(before[task], after[task]) for task in before}

    def _stage(self, stage: str) -> Callable[[int, int], None] | None:
        return partial(self._progress, stage) if self._progress else None


def _task_drop(before: TaskResult, after: TaskResult) -> Outcome:
    """Points of the right answer's probability that were lost, paired over items.

    An item that the base model gives no number for says nothing; one that only the edited model
    gives none for makes the whole nan.
    """
    moved = [
        a.probability - b.probability
        for a, b in zip(before.items, after.items, strict=True)
        if math.isfinite(a.probability)
    ]
    if not moved:
        return Missing("the base model gives no number for any item")
    if not all(map(math.isfinite, moved)):
        return Found(math.nan, math.nan, len(moved), "items")
    return Found.of(Rate.of(moved), "items", ends=POINTS)


def _worst(shares: Mapping[int, float], *, highest: bool, what: str = "layer") -> Found:
    """The largest or smallest share, in %, with its layer; nan if one is."""
    pick, end = (max, math.inf) if highest else (min, -math.inf)
    worst = pick(shares, key=lambda i: end if math.isnan(shares[i]) else shares[i])
    return Found(100 * shares[worst], note=f"{what} {worst}")


def check_folder(tasks: str | Path | None) -> None:
    """Refuse a folder of tasks that is not there, whether or not a limit reads it."""
    if tasks is not None and not Path(tasks).is_dir():
        raise ConfigError(
            f"{tasks}: no such folder: expected one with the tasks' files, sst2.jsonl and so on"
        )


def check_tasks(limits: Limits | None, tasks: str | Path | None) -> None:
    """Refuse limits on tasks that could only fail, before hours are spent on edits."""
    check_folder(tasks)
    for name, bound in (limits.bounds if limits else {}).items():
        if not isinstance(bound, Tasks) or bound.optional:
            continue
        if not tasks:
            raise ConfigError(
                f"{limits.source if limits else ''}: {name} needs the tasks' files: give "
                "--capability DIR, or call it optional"
            )
        read_tasks(tasks, names=bound.tasks, limit=bound.items)
