"""Studies of streams: the methods' table, and what the projection does for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import PREFERENCE, STRICT, TOKENS, find
from nulledit.evaluation.stats import Rate
from nulledit.report.document import Column, FigureSpec, StudyTable, Value
from nulledit.report.points import Point
from nulledit.studies.context import Lab
from nulledit.studies.results import (
    Outcome,
    Rows,
    StudySpec,
    Work,
    curve,
    difference,
    examples,
    extremes,
    growth,
    intervals,
    present,
    rate,
    rate_cells,
    rate_columns,
    text_cells,
    text_columns,
)
from nulledit.studies.scale import chosen
from nulledit.studies.stream import StreamPlan


@dataclass(frozen=True)
class Followed:
    """One arm's stream, asked at its checkpoints."""

    label: str
    """The arm."""
    checkpoints: list[int]
    """Facts edited."""
    rows: dict[int, Rows]
    """Checkpoint -> fact id -> measures, of all facts so far."""
    text: dict[int, Any]
    """Checkpoint -> perplexity and KL."""
    norms: dict[int, dict[str, Any]]
    """Checkpoint -> norms."""
    own_seconds: float | None
    """Wall seconds per fact of keys and solve."""
    value_seconds: float | None
    """Wall seconds per value that was optimised."""

    @property
    def end(self) -> Rows:
        """Rows at the last checkpoint."""
        return self.rows[self.checkpoints[-1]]

    def update_share(self, at: int) -> float:
        """Largest ‖Δ‖/‖W₀‖ of a layer, in %."""
        return 100 * max(self.norms[at]["update_share"].values())


def follow(lab: Lab, plan: StreamPlan, checkpoints: Sequence[int] | None = None) -> Followed:
    """Edit a stream and ask at `checkpoints` about all facts so far."""
    stream = lab.edited(plan)
    every = asked_at(lab, plan) if checkpoints is None else list(checkpoints)
    rows: dict[int, Rows] = {}
    for at in every:
        rows[at] = lab.asked(stream, at, plan.facts[:at])
    answered = plan.facts[: lab.settings.get("answers", 0)]
    if answered:
        spoken = lab.asked(stream, every[-1], answered, generate=True)
        rows[every[-1]] = {
            key: {**row, **_spoken(spoken.get(key))} for key, row in rows[every[-1]].items()
        }
    written = plan.facts[: lab.settings.get("fluency", 0)]
    if written:
        varied = lab.asked(stream, every[-1], written, fluency=True)
        rows[every[-1]] = {
            key: {**row, "fluency": varied.get(key, {}).get("fluency")}
            for key, row in rows[every[-1]].items()
        }
    return Followed(
        plan.label,
        every,
        rows,
        {at: lab.text(stream, at) for at in every},
        {at: lab.norms(stream, at, plan.facts[: plan.batch_size]) for at in every},
        stream.seconds("keys", "solve"),
        stream.seconds("values"),
    )


def asked_at(lab: Lab, plan: StreamPlan) -> list[int]:
    """Checkpoints at which a stream is asked: every `ask_every` facts, or those listed; its end."""
    every = lab.settings.get("ask_every", 1)
    wanted = every if isinstance(every, list) else range(every, len(plan.facts) + 1, every)
    end = len(plan.facts)
    return [at for at in plan.checkpoints()[1:] if at in wanted or at == end]


def unedited(lab: Lab, facts: Sequence[Fact]) -> tuple[dict[str, dict[str, Any]], Any]:
    """The rows of the model without edits, and what it makes of the text."""
    rows = lab.asked(None, 0, facts)
    answered = facts[: lab.settings.get("answers", 0)]
    if answered:
        spoken = lab.asked(None, 0, answered, generate=True)
        rows = {key: {**row, **_spoken(spoken.get(key))} for key, row in rows.items()}
    written = facts[: lab.settings.get("fluency", 0)]
    if written:
        varied = lab.asked(None, 0, written, fluency=True)
        rows = {
            key: {**row, "fluency": varied.get(key, {}).get("fluency")} for key, row in rows.items()
        }
    return rows, lab.text(None, 0)


def stream_work(lab: Lab, plans: Sequence[StreamPlan], *, every: bool = True) -> Work:
    """What `follow` does on `plans`, and `unedited` once."""
    spots = [asked_at(lab, p) if every else [len(p.facts)] for p in plans]
    said = (len(plans) + 1) * lab.settings.get("answers", 0)
    said += 8 * len(plans) * lab.settings.get("fluency", 0)
    perplexities = 1 + sum(map(len, spots)) if lab.sources.text else 0
    return Work(plans, sum(map(sum, spots)), said, perplexities)


def end_table(
    name: str,
    title: str,
    facts: int,
    before: tuple[Rows, Any],
    arms: Sequence[Followed],
    *,
    tokens: bool = False,
) -> StudyTable:
    """One row per arm behind the whole stream; `tokens`: by zsRE's measure."""
    base_rows, base_text = before
    ends = [arm.end for arm in arms]
    by_preference = _has_preference(ends) and not tokens
    kinds = [*PREFERENCE, *STRICT] if by_preference else [*TOKENS, "efficacy_strict"]
    measures = present([*kinds, "generation", "fluency"], *ends)
    columns = [Column("arm", "method"), *rate_columns(measures)]
    if base_text is not None:
        columns += text_columns()
    columns += [
        Column("update", "‖Δ‖/‖W‖", None, "%"),
        Column("seconds", "keys, solve", None, "s/fact", 2),
    ]
    first = {**rate_cells(base_rows, measures), **text_cells(base_text, base_text)}
    rows: list[dict[str, Any]] = [{"arm": "unedited", **first}]
    for arm in arms:
        at = arm.checkpoints[-1]
        row: dict[str, Any] = {"arm": arm.label, **rate_cells(arm.end, measures)}
        row |= text_cells(arm.text[at], base_text)
        row["update"] = arm.update_share(at)
        row["seconds"] = arm.own_seconds
        rows.append(row)
    caption = (
        f"Behind {facts} edits; efficacy and generalization of all of them. n counts facts, for "
        "perplexity and KL (from the unedited model) tokens. Seconds are wall time of keys and "
        "solve on a shared machine; values, which cost every method about the same, are not in "
        "them."
    )
    return StudyTable(name, title, caption, tuple(columns), tuple(rows))


def cohort_table(
    name: str, arms: Sequence[Followed], size: int, queue: Sequence[Fact]
) -> StudyTable:
    """Strict efficacy behind the whole stream, by when a fact was edited."""
    end = arms[0].checkpoints[-1]
    spans = [(i, min(i + size, end)) for i in range(0, end, size)]
    columns = [Column("arm", "method")]
    columns += [Column(f"c{a}", f"{a + 1}-{b}", "high", "%") for a, b in spans]
    rows: list[dict[str, Any]] = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.label}
        for a, b in spans:
            ids = [fact.id for fact in queue[a:b]]
            row[f"c{a}"] = Value.percent(rate(arm.end, "efficacy_strict", ids))
        rows.append(row)
    caption = "Strict efficacy behind the whole stream by the place of the fact in the queue."
    return StudyTable(
        name, "Does the first cohort still hold?", caption, tuple(columns), tuple(rows)
    )


def along_figures(
    prefix: str, before: tuple[Rows, Any], arms: Sequence[Followed]
) -> list[FigureSpec]:
    """Rates and perplexity along the stream."""
    base_text = before[1]
    ends = [arm.end for arm in arms]
    measures = (*PREFERENCE, "efficacy_strict") if _has_preference(ends) else TOKENS
    measures = tuple(present(measures, *ends))
    points: list[Point] = []
    for measure in measures:
        for arm in arms:
            values: list[Rate | float | None] = [
                rate(arm.rows[at], measure) for at in arm.checkpoints
            ]
            points += curve(arm.label, arm.checkpoints, values, find(measure).short)
    figures = [
        FigureSpec(
            f"{prefix}-rates",
            "All facts so far, at each checkpoint. Bars: one standard error over facts.",
            "lines",
            "edits",
            "mean over facts (%)",
            panel="measure",
            points=tuple(points),
        )
    ]
    if base_text is not None:
        points = []
        for arm in arms:
            grown = [growth(arm.text[at], base_text) for at in arm.checkpoints]
            points += curve(arm.label, [0, *arm.checkpoints], [0.0, *grown])
        figures.append(
            FigureSpec(
                f"{prefix}-perplexity",
                "Growth of perplexity on text that no edit touches.",
                "lines",
                "edits",
                "growth of perplexity (%)",
                points=tuple(points),
            )
        )
    return figures


def table1_plans(lab: Lab) -> dict[str, list[StreamPlan]]:
    """Data set -> its arms' streams."""
    plans = {}
    for source, count in (("facts", lab.settings["facts"]), ("zsre", lab.settings["zsre"])):
        if count and (source == "facts" or lab.sources.zsre):
            queue = lab.facts(count, source=source, skip=lab.settings["skip"])
            arms = chosen(lab.settings, "arms" if source == "facts" else "zsre_arms")
            plans[source] = [lab.plan(arm, queue) for arm in arms]
    return plans


def run_table1(lab: Lab) -> Outcome:
    """Methods × data sets behind a stream of edits."""
    outcome = Outcome("")
    told = []
    for source, plans in table1_plans(lab).items():
        title = "CounterFact" if source == "facts" else "zsRE"
        queue = plans[0].facts
        before = unedited(lab, queue)
        arms = [follow(lab, plan) for plan in plans]
        tokens = source == "zsre"  # as published
        table = end_table(source, title, len(queue), before, arms, tokens=tokens)
        outcome.tables.append(table)
        if len(arms[0].checkpoints) > 1:
            size = lab.settings["batch_size"]
            outcome.tables.append(cohort_table(f"{source}-cohorts", arms, size, queue))
            outcome.figures += along_figures(source, before, arms)
        for arm in arms:
            outcome.examples += examples(arm.label, queue, before[0], arm.end)
        told.append(f"{title}: " + _leaders(arms, before[1]))
    if lab.settings["zsre"] and not lab.sources.zsre:
        lab.notices.append("No --zsre was given, so the table has no zsRE.")
    outcome.shows = " ".join(told)
    return outcome


def run_projection(lab: Lab) -> Outcome:
    """Each method with and without the projection."""
    plans = projection_plans(lab)
    queue = plans[0][1].facts
    before = unedited(lab, queue)
    end = [len(queue)]
    arms = {plan.label: follow(lab, plan, end) for _, plan in plans}
    pairs = [
        (plan.label, arms[base].end, arms[plan.label].end)
        for base, plan in plans
        if base != plan.label
    ]
    outcome = Outcome("")
    outcome.tables.append(
        end_table("projection", "With and without", len(queue), before, list(arms.values()))
    )
    measures = [*PREFERENCE, "efficacy_strict"]
    outcome.figures.append(
        intervals(
            "projection",
            "The projected method minus the plain one, over the same facts; 95 % intervals of a "
            "paired bootstrap.",
            pairs,
            measures,
        )
    )
    told = []
    for label, plain, projected in pairs:
        parts = []
        for measure in ("specificity", "efficacy_strict"):
            moved = difference(plain, projected, measure)
            if moved:
                parts.append(
                    f"{find(measure).short} {moved[0]:+.1f} [{moved[1]:+.1f}, {moved[2]:+.1f}]"
                )
        both = (label.partition("+")[0], label)
        grown = [growth(arms[name].text[end[0]], before[1]) for name in both]
        if grown[0] is not None and grown[1] is not None:
            parts.append(f"perplexity growth {grown[0]:.1f} to {grown[1]:.1f} %")
        told.append(f"{label}: {', '.join(parts) or 'nothing measurable'}.")
    outcome.shows = "Projected minus plain, in points. " + " ".join(told)
    return outcome


def projection_plans(lab: Lab) -> list[tuple[str, StreamPlan]]:
    """(plain arm, plan) of each arm, plain and projected."""
    queue = lab.facts(lab.settings["facts"], skip=lab.settings["skip"])
    found = []
    for arm in chosen(lab.settings):
        for variant in ("", *(f"+{way}" for way in chosen(lab.settings, "projections"))):
            found.append((arm, lab.plan(arm + variant, queue)))
    return found


def _leaders(arms: Sequence[Followed], base: Any) -> str:
    parts = []
    for measure in ("efficacy_strict", "specificity"):
        found = {arm.label: 100 * r.mean for arm in arms if (r := rate(arm.end, measure))}
        if found:
            parts.append(f"{find(measure).short}: {extremes(found)}")
    grown = {arm.label: growth(arm.text[arm.checkpoints[-1]], base) for arm in arms}
    known = {name: value for name, value in grown.items() if value is not None}
    if known:
        parts.append(f"growth of perplexity: {extremes(known)}")
    return "; ".join(parts) + "."


def _has_preference(ends: Sequence[Rows]) -> bool:
    return any(rate(rows, "efficacy") for rows in ends)


def _spoken(row: Any) -> dict[str, Any]:
    return {key: row[key] for key in ("answer", "generation")} if row else {}


TABLE1 = StudySpec(
    name="table1",
    title="Methods behind a stream of edits",
    question="Which method writes facts, keeps the others, and leaves the model well, after a "
    "stream of edits in batches?",
    needs=("facts",),
    cannot_show="A model of this size knows few of the neighbours' answers, so specificity is "
    "mostly about what it would prefer, and a stream this short separates methods less than the "
    "papers' 2,000 edits do.",
    work=lambda lab: stream_work(lab, [p for plans in table1_plans(lab).values() for p in plans]),
    run=run_table1,
)
PROJECTION = StudySpec(
    name="projection",
    title="Locate-then-edit methods with and without the projection",
    question="Does projecting the update on the null space help each method, as AlphaEdit's "
    "paper says (+28 % on average)?",
    needs=("facts",),
    cannot_show="The paper's gains are behind 2,000 edits on models that the plain methods had "
    "broken by then; behind a short stream the plain methods are not broken yet.",
    work=lambda lab: stream_work(lab, [p for _, p in projection_plans(lab)], every=False),
    run=run_projection,
)
