"""Study of collapse: which signs warn of it, and how many edits before."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor
from nulledit.errors import ConfigError
from nulledit.evaluation.hidden_norms import edit_rows, norm_growth, state_norms, text_rows
from nulledit.evaluation.stats import Rate
from nulledit.report.document import Column, FigureSpec, StudyTable, Value
from nulledit.report.points import Point
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.results import Outcome, StudySpec, Work, growth, rate, text_cells
from nulledit.studies.scale import chosen
from nulledit.studies.stream import Stream, StreamPlan


@dataclass(frozen=True)
class Checkpoint:
    """A stream behind some of its edits: signs of what is to come, and what has come."""

    edits: int
    """Facts edited."""
    room: Mapping[str, float | None]
    """Layer -> share of its usable directions that no edit has taken."""
    update_share: Mapping[str, float]
    """Layer -> ‖Δ‖/‖W₀‖."""
    at_edits: Rate
    """Growth of ‖h‖ behind the last edited block at the subjects of all facts so far."""
    on_text: Rate
    """The same on text that no edit touches."""
    strict: Rate
    """Strict efficacy of all facts so far."""
    oldest: Rate
    """Strict efficacy of the oldest cohort."""
    perplexity: float | None
    """Growth in %; None for a perplexity without end."""
    kl: Value | float | None
    """KL per token from the unedited model on the same text, mnat."""


@dataclass(frozen=True)
class Signal:
    """A number that is cheap to watch during a stream and may warn of a collapse."""

    name: str
    """In tables."""
    title: str
    """In words."""
    falls: bool
    """Whether it warns by falling below its threshold, not by rising above it."""
    value: Callable[[Checkpoint], float | None]
    """In %."""

    def crossed(self, value: float | None, threshold: float) -> bool:
        """Whether `value` warns; what is not finite does."""
        if value is None:
            return False
        if not math.isfinite(value):
            return True
        return value < threshold if self.falls else value > threshold


def _least(values: Mapping[str, float | None]) -> float | None:
    held = [value for value in values.values() if value is not None]
    return 100 * min(held) if held else None


SIGNALS = (
    Signal("room", "room left, least of the layers", True, lambda c: _least(c.room)),
    Signal("norm", "‖Δ‖/‖W₀‖, most", False, lambda c: 100 * max(c.update_share.values())),
    Signal("at_edits", "‖h‖ at edited subjects", False, lambda c: 100 * c.at_edits.mean),
    Signal("on_text", "‖h‖ on other text", False, lambda c: 100 * c.on_text.mean),
)


@dataclass(frozen=True)
class Course:
    """A stream from its first checkpoint to its collapse or its end."""

    label: str
    """The arm and its records."""
    along: tuple[Checkpoint, ...]
    """In order."""
    collapsed: int | None
    """Edits at the first checkpoint where it had; None if it never did."""
    cause: str
    """What had happened there."""
    whole: int
    """Edits at the first checkpoint that has all of the oldest cohort."""

    @property
    def first(self) -> Checkpoint:
        """What later checkpoints of the oldest cohort are compared with."""
        return _first(self.along, self.whole)


@dataclass(frozen=True)
class Bounds:
    """What counts as collapsed, and as well."""

    growth: float
    """Collapsed: perplexity has grown by this many %."""
    loss: float
    """Collapsed: the oldest cohort has lost this many % of the strict efficacy it began with."""
    healthy_growth: float
    """Well: perplexity has grown by less, %."""
    healthy_loss: float
    """Well: the oldest cohort has lost less, %."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Bounds:
        """From a study's settings; ConfigError for what can't be."""
        for name in ("growth", "loss", "healthy_growth", "healthy_loss"):
            value = settings[name]
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ConfigError(f"{name} is {value!r}; expected a number of % above 0")
        found = cls(**{name: float(settings[name]) for name in cls.__dataclass_fields__})
        if found.healthy_growth >= found.growth or found.healthy_loss >= found.loss:
            raise ConfigError(
                "healthy_growth and healthy_loss must lie below growth and loss: a stream is well "
                "before it has collapsed"
            )
        oldest = settings["oldest"]
        if not isinstance(oldest, int) or isinstance(oldest, bool) or oldest < 1:
            raise ConfigError(f"oldest is {oldest!r}; expected a number of facts above 0")
        return found

    def cause(self, first: Checkpoint, now: Checkpoint) -> str:
        """Why a stream has collapsed; empty if it has not."""
        said = []
        if _grown(now) >= self.growth:
            said.append(f"perplexity {_signed(now.perplexity)}")
        if _lost(first, now) >= self.loss:
            said.append(f"the oldest hold {100 * now.oldest.mean:.0f} %")
        return ", ".join(said)

    def well(self, first: Checkpoint, now: Checkpoint) -> bool:
        """Whether nothing is amiss yet."""
        return _grown(now) < self.healthy_growth and _lost(first, now) < self.healthy_loss


def _grown(now: Checkpoint) -> float:
    value = now.perplexity
    return math.inf if value is None or math.isnan(value) else value


def _lost(first: Checkpoint, now: Checkpoint) -> float:
    """Of the strict efficacy that the oldest cohort began with, %."""
    began = first.oldest.mean
    return 100 * (1 - now.oldest.mean / began) if began else 100.0


# -- the streams ---------------------------------------------------------------------------------


class _Collapsed(Exception):
    """Ends a stream's edits behind a finished batch."""


def plans_of(lab: Lab) -> list[StreamPlan]:
    """One stream per arm, each on records of its own: the first sets thresholds for the others."""
    size = lab.settings["facts"]
    plans, used = [], set()
    for i, arm in enumerate(chosen(lab.settings)):
        start = lab.settings["skip"] + i * size
        queue = [f for f in lab.facts(size, skip=start) if f.key not in used]
        used |= {fact.key for fact in queue}
        plans.append(lab.plan(arm, queue, label=f"{arm}, from record {start}"))
    return plans


def follow(lab: Lab, plan: StreamPlan, bounds: Bounds) -> Course:
    """Edit a stream batch by batch until it has collapsed, asking behind each batch."""
    base = _Unedited.of(lab, plan)  # first: it takes the bench
    stream = lab.bench.stream(plan)
    along: list[Checkpoint] = []
    cohort = plan.facts[: lab.settings["oldest"]]
    whole = min(at for at in plan.checkpoints() if at >= len(cohort))

    def look(at: int) -> None:
        along.append(_look(lab, stream, at, base, [fact.id for fact in cohort]))
        if bounds.cause(_first(along, whole), along[-1]):
            raise _Collapsed

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "edited":
            if lab.progress:
                lab.progress(f"{plan.label}: edits", done, total)
            look(done)

    cause = ""
    try:  # every finished batch is kept, so a stream may be left between two of them
        for at in _finished(stream):
            look(at)
        stream.edit(tell)
    except _Collapsed:
        cause = bounds.cause(_first(along, whole), along[-1])
    return Course(plan.label, tuple(along), along[-1].edits if cause else None, cause, whole)


def _first(along: Sequence[Checkpoint], whole: int) -> Checkpoint:
    """The first checkpoint with the whole oldest cohort; before it, the last one there is."""
    return next((c for c in along if c.edits >= whole), along[-1])


@dataclass(frozen=True)
class _Unedited:
    """What checkpoints are compared with."""

    facts: tuple[Fact, ...]
    """The queue without paraphrases and neighbours, which are not asked."""
    at_edits: Sequence[float]
    """‖h‖ at the subject of each fact of the queue."""
    on_text: Sequence[float]
    """‖h‖ at the end of each piece of other text."""
    text: Mapping[str, Any] | None
    """Its perplexity."""
    layer: int
    """Behind which ‖h‖ is read."""

    @classmethod
    def of(cls, lab: Lab, plan: StreamPlan) -> _Unedited:
        """Asked once of the unedited model."""
        bare = tuple(replace(f, paraphrases=(), neighbours=(), portability=()) for f in plan.facts)
        layer = plan.recipe.layers[-1]

        def norms(rows: Sequence[Sequence[int]]) -> Sequence[float]:
            settings = _norm_settings(rows, layer)
            found = lab.of_unedited("norm", settings, lambda editor: _norms(editor, rows, layer))
            return list(found)

        at_edits = norms(edit_rows(lab.bench.model, bare))
        on_text = norms(text_rows(lab.windows()))
        return cls(bare, at_edits, on_text, lab.text(None, 0), layer)


def _norms(editor: Editor, rows: Sequence[Sequence[int]], layer: int) -> list[float]:
    return [float(norm) for norm in state_norms(editor.editable, rows, layer)]


def _norm_settings(rows: Sequence[Sequence[int]], layer: int) -> dict[str, Any]:
    return {"rows": hash_of([list(row) for row in rows]), "layer": layer}


def _look(lab: Lab, stream: Stream, at: int, base: _Unedited, cohort: Sequence[str]) -> Checkpoint:
    facts = base.facts[:at]
    asked = lab.asked(stream, at, facts)
    text = text_rows(lab.windows())

    def grown(rows: Sequence[Sequence[int]], before: Sequence[float]) -> Rate:
        after = stream.measure(
            at,
            "norm",
            _norm_settings(rows, base.layer),
            lambda editor: _norms(editor, rows, base.layer),
        )
        now = [math.nan if value is None else value for value in after]
        return norm_growth(torch.tensor(before), torch.tensor(now))

    layers = stream.measure(at, "layers", {}, lambda editor: _layers(editor, at))
    read = lab.text(stream, at)
    strict, oldest = rate(asked, "efficacy_strict"), rate(asked, "efficacy_strict", cohort)
    if strict is None or oldest is None:
        raise ValueError("every fact is asked for its target")
    return Checkpoint(
        edits=at,
        room=layers["room"],
        update_share=layers["update_share"],
        at_edits=grown(edit_rows(stream.editor.editable, facts), base.at_edits[:at]),
        on_text=grown(text, base.on_text),
        strict=strict,
        oldest=oldest,
        perplexity=growth(read, base.text),
        kl=text_cells(read, base.text).get("kl"),
    )


def _layers(editor: Editor, at: int) -> dict[str, dict[str, float | None]]:
    """Room and ‖Δ‖/‖W₀‖ by layer, behind `at` facts.

    Room is told of the whole ledger, so a checkpoint that lies before its end has none: it is asked
    behind each batch, and only missing where an interruption came just between the two.
    """
    weights, at_end = editor.weights, len(editor.facts) == at
    found = weights.reports()

    def share(layer: int) -> float:
        base = weights.base(layer)
        return float((weights.exact(layer).cpu() - base).norm() / base.norm())

    return {
        "room": {str(r.layer): r.room if at_end else None for r in found},
        "update_share": {str(r.layer): share(r.layer) for r in found},
    }


def _finished(stream: Stream) -> list[int]:
    """Checkpoints that an earlier call edited."""
    marks = stream.folder / "marks.json"
    return sorted(map(int, json.loads(marks.read_text("utf-8")))) if marks.is_file() else []


def _signed(value: float | None) -> str:
    return "without end" if value is None else f"{value:+.0f} %"


# -- thresholds, and what they are worth ---------------------------------------------------------


@dataclass(frozen=True)
class Warned:
    """When a sign warned on a stream, and how long before the collapse."""

    signal: Signal
    """Which."""
    threshold: float | None
    """%; None where the first stream set none."""
    crossed: int | None
    """Edits at the first checkpoint that crossed it; None: never."""
    before: int | None
    """Edits between that and the collapse; None where one of them is missing."""


def thresholds_of(course: Course, bounds: Bounds) -> dict[str, float | None]:
    """Signal -> its value at the last checkpoint at which the stream was well.

    None for all if the stream never collapsed or was never well: it says nothing of a collapse.
    """
    healthy: Checkpoint | None = None
    first = course.first
    for now in course.along:
        if not bounds.well(first, now):
            break
        healthy = now
    known = healthy is not None and course.collapsed is not None
    return {s.name: s.value(healthy) if known and healthy else None for s in SIGNALS}


def warnings_on(course: Course, thresholds: Mapping[str, float | None]) -> list[Warned]:
    """When each sign warned on a stream."""
    found = []
    for signal in SIGNALS:
        bound = thresholds[signal.name]
        crossed = None
        if bound is not None:
            spots = [c.edits for c in course.along if signal.crossed(signal.value(c), bound)]
            crossed = spots[0] if spots else None
        both = crossed is not None and course.collapsed is not None
        before = course.collapsed - crossed if both else None  # type: ignore[operator]
        found.append(Warned(signal, bound, crossed, before))
    return found


def run_collapse(lab: Lab) -> Outcome:
    """Streams to their collapse; thresholds from the first, judged on the others."""
    bounds = Bounds.of(lab.settings)
    courses = [follow(lab, plan, bounds) for plan in plans_of(lab)]
    thresholds = thresholds_of(courses[0], bounds)
    warned = {course.label: warnings_on(course, thresholds) for course in courses}
    outcome = Outcome(_shows(courses, warned))
    outcome.tables.append(_warning_table(courses, warned, bounds))
    outcome.tables += [_course_table(i, course, bounds) for i, course in enumerate(courses, 1)]
    outcome.figures += _figures(courses, bounds)
    for course in courses:
        if course.collapsed is None:
            lab.notices.append(
                f"{course.label}: had not collapsed behind {course.along[-1].edits} edits, where "
                "its facts ran out."
            )
    return outcome


def _warning_table(
    courses: Sequence[Course], warned: Mapping[str, Sequence[Warned]], bounds: Bounds
) -> StudyTable:
    columns = (
        Column("stream", "stream"),
        Column("signal", "sign"),
        Column("threshold", "threshold", None, "%"),
        Column("crossed", "crossed at", None, "", 0),
        Column("collapsed", "collapse at", None, "", 0),
        Column("before", "edits before", None, "", 0),
        Column("cause", "what had happened"),
    )
    rows: list[dict[str, Any]] = []
    for i, course in enumerate(courses):
        for warning in warned[course.label]:
            rows.append(
                {
                    "stream": course.label + (" (sets the thresholds)" if i == 0 else ""),
                    "signal": warning.signal.title,
                    "threshold": warning.threshold,
                    "crossed": warning.crossed,
                    "collapsed": course.collapsed,
                    "before": warning.before,
                    "cause": course.cause or "no collapse",
                }
            )
    caption = (
        f"Collapse: the first checkpoint at which perplexity had grown by {bounds.growth:g} % or "
        f"the oldest cohort had lost {bounds.loss:g} % of the strict efficacy it began with. "
        "A threshold is the sign's value at the last checkpoint at which the first stream was well "
        f"(perplexity less than {bounds.healthy_growth:g} % up, the oldest less than "
        f"{bounds.healthy_loss:g} % down); the other streams, each on records of its own, judge "
        "it. Edits are counted at checkpoints; 0 before means that it came with the collapse."
    )
    return StudyTable("warnings", "How early each sign warns", caption, columns, tuple(rows))


def _course_table(number: int, course: Course, bounds: Bounds) -> StudyTable:
    layers = list(course.along[0].room)
    columns = [Column("edits", "edits", None, "", 0)]
    columns += [Column(f"room{layer}", f"room, layer {layer}", None, "%") for layer in layers]
    columns += [Column(s.name, s.title, None, "%") for s in SIGNALS if s.name != "room"]
    columns += [
        Column("strict", "strict, all", None, "%"),
        Column("oldest", "strict, oldest", None, "%"),
        Column("perplexity", "perplexity growth", None, "%"),
        Column("kl", "KL per token", None, "mnat"),
        Column("state", "state"),
    ]
    rows: list[dict[str, Any]] = []
    for now in course.along:
        state = "well" if bounds.well(course.first, now) else ""
        row: dict[str, Any] = {
            "edits": str(now.edits),
            "norm": SIGNALS[1].value(now),
            "at_edits": Value.percent(now.at_edits),
            "on_text": Value.percent(now.on_text),
            "strict": Value.percent(now.strict),
            "oldest": Value.percent(now.oldest),
            "perplexity": now.perplexity,
            "kl": now.kl,
            "state": "collapsed" if now.edits == course.collapsed else state,
        }
        row |= {f"room{k}": None if v is None else 100 * v for k, v in now.room.items()}
        rows.append(row)
    caption = (
        "Behind each batch. Room: share of a layer's usable directions that no edit has taken; "
        "‖Δ‖/‖W₀‖ of the layer where it is largest; growth of ‖h‖ behind the last edited block, "
        "at the subjects of all facts so far and at the ends of pieces of other text."
    )
    return StudyTable(f"stream-{number}", course.label, caption, tuple(columns), tuple(rows))


def _figures(courses: Sequence[Course], bounds: Bounds) -> list[FigureSpec]:
    signs, outcomes = [], []
    for course in courses:
        for now in course.along:
            for signal in SIGNALS:
                value = signal.value(now)
                known = value if value is not None and math.isfinite(value) else None
                signs.append(Point(now.edits, known, series=course.label, panel=signal.title))
            for panel, found in (("strict, all", now.strict), ("strict, oldest", now.oldest)):
                error = None if math.isnan(found.standard_error) else 100 * found.standard_error
                mean = 100 * found.mean
                outcomes.append(Point(now.edits, mean, error, found.n, course.label, panel))
            panel = "perplexity growth"
            outcomes.append(Point(now.edits, now.perplexity, series=course.label, panel=panel))
    ends = [f"{c.label} at {c.collapsed}" for c in courses if c.collapsed is not None]
    said = f"Streams end where they collapse ({', '.join(ends)})." if ends else "None collapsed."
    return [
        FigureSpec(
            "signs", f"Signs along each stream. {said}", "lines", "edits", "%", "stream", "sign",
            points=tuple(signs),
        ),
        FigureSpec(
            "outcomes",
            f"Outcomes along each stream; bars: one standard error over facts. Collapse: "
            f"{bounds.growth:g} % more perplexity, or {bounds.loss:g} % of the oldest lost.",
            "lines", "edits", "%", "stream", "outcome",
            points=tuple(outcomes),
        ),
    ]  # fmt: skip


def _shows(courses: Sequence[Course], warned: Mapping[str, Sequence[Warned]]) -> str:
    first, *others = courses
    if first.collapsed is None:
        return (
            f"{first.label} did not collapse within {first.along[-1].edits} edits, so no threshold "
            "was set."
        )
    parts = [f"{first.label} collapsed at {first.collapsed} edits ({first.cause})."]
    for course in others:
        if course.collapsed is None:
            false = [w.signal.title for w in warned[course.label] if w.crossed is not None]
            parts.append(
                f"{course.label} did not collapse within {course.along[-1].edits} edits; "
                f"signs that warned all the same: {', '.join(false) or 'none'}."
            )
            continue
        told = [
            f"{w.signal.title} {w.before} edits before"
            if w.before is not None
            else f"{w.signal.title} never"
            for w in sorted(warned[course.label], key=lambda w: -(w.before or -1))
        ]
        parts.append(
            f"{course.label} collapsed at {course.collapsed} ({course.cause}); with the first "
            f"stream's thresholds warned: {'; '.join(told)}."
        )
    return " ".join(parts)


def collapse_work(lab: Lab) -> Work:
    """At most: streams end when they have collapsed."""
    Bounds.of(lab.settings)
    plans = plans_of(lab)
    spots = [plan.checkpoints()[1:] for plan in plans]
    return Work(
        plans,
        asked=sum(map(sum, spots)) // 4,  # the facts' own prompts only
        perplexities=len(plans) + sum(map(len, spots)),
    )


COLLAPSE = StudySpec(
    name="collapse",
    title="Signs before a collapse",
    question="Which sign says that a stream of edits will ruin the model, and how many edits "
    "before it does?",
    needs=("facts", "text"),
    cannot_show="Thresholds come from one stream of one model and setting; where streams collapse "
    "for another reason (long values, another method), a sign may come late or never. Edits are "
    "counted at checkpoints, a batch apart.",
    work=collapse_work,
    run=run_collapse,
)
