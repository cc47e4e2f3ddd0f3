"""Studies of streams: the methods' table, and what the projection does for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import PREFERENCE
from nulledit.report.document import FigureSpec
from nulledit.studies.build import (
    OF_TOKENS,
    along,
    head,
    lines,
    paired,
    rates_along,
    usual,
)
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Cells, Figure, Part, StudySpec, Table, named
from nulledit.studies.results import (
    OF_TEXT,
    Arm,
    Quantity,
    Results,
    difference,
    extremes,
    growth,
    numbers,
    quantity,
    rate,
    short,
    update_share,
)
from nulledit.studies.scale import chosen

SPOKEN = ("generation", "fluency")
UPDATE = Cells(head("update", "‖Δ‖/‖W‖"), update_share)
SECONDS = Cells(head("seconds", "keys, solve", "s/fact", 2), lambda spot: spot.extra.get("own"))


def end_table(name: str, title: str = "{data}", *, tokens: bool = False) -> Table:
    """One row per arm after the whole stream; `tokens`: by zsRE's measure."""
    measures = (*OF_TOKENS, *SPOKEN) if tokens else (usual(*SPOKEN),)
    return Table(
        name,
        title,
        "After {edits} edits; efficacy and generalization of all of them. n counts facts, for "
        "perplexity and KL (from the unedited model) tokens. Seconds are wall time of keys and "
        "solve on a shared machine; values, which cost every method about the same, are not in "
        "them.",
        (*measures, *OF_TEXT, UPDATE, SECONDS),
    )


def cohort_table(name: str) -> Table:
    """Strict efficacy after the whole stream, by when a fact was edited, a batch a column."""

    def columns(results: Results) -> Iterable[Cells]:
        queue, size = results.queue, results.settings["batch_size"]
        for a in range(0, len(queue), size) if _several(results) else ():
            b = min(a + size, len(queue))
            yield Cells(head(f"c{a}", f"{a + 1}-{b}", better="high"), _strict_of(queue[a:b]))

    return Table(
        name,
        "Does the first cohort still hold?",
        "Strict efficacy after the whole stream by the place of the fact in the queue.",
        (columns,),
        rows=lambda results: results.ends,
    )


def _strict_of(facts: Sequence[Fact]) -> Quantity:
    return lambda spot: rate(spot.rows, "efficacy_strict", [fact.id for fact in facts])


def _several(results: Results) -> bool:
    """Whether there is anything along the streams."""
    return len(results.arms[0].spots) > 1


def along_figures(prefix: str) -> tuple[Figure, ...]:
    """Rates and perplexity along the stream, where it was asked more than once."""
    perplexity = along({"": growth}, start=0.0)
    return (
        lines(
            f"{prefix}-rates",
            "All facts so far, at each checkpoint. Bars: one standard error over facts.",
            "mean over facts (%)",
            lambda results: rates_along(results) if _several(results) else (),
            panel="measure",
        ),
        lines(
            f"{prefix}-perplexity",
            "Growth of perplexity on text that no edit touches.",
            "growth of perplexity (%)",
            lambda results: perplexity(results) if _several(results) else (),
        ),
    )


def _leaders(results: Results) -> str:
    parts = []
    for measure in ("efficacy_strict", "specificity"):
        if found := numbers(results.ends, quantity(measure)):
            parts.append(f"{short(measure)}: {extremes(found)}")
    if known := numbers(results.ends, growth):
        parts.append(f"growth of perplexity: {extremes(known)}")
    return f"{results.title}: {'; '.join(parts)}."


def _part(source: str, arms: str, *, tokens: bool = False, missing: str = "") -> Part:
    return Part(
        named(arms),
        tables=(end_table(source, tokens=tokens), cohort_table(f"{source}-cohorts")),
        figures=along_figures(source),
        shows=_leaders,
        source=source,
        missing=missing,
        along=True,
    )


TABLE1 = StudySpec(
    name="table1",
    title="Methods after a stream of edits",
    question="Which method writes facts, keeps the others, and leaves the model well, after a "
    "stream of edits in batches?",
    needs=("facts",),
    cannot_show="A model of this size knows few of the neighbours' answers, so specificity is "
    "mostly about what it would prefer, and a stream this short separates methods less than the "
    "papers' 2,000 edits do.",
    parts=(
        _part("facts", "arms"),
        _part(
            "zsre",
            "zsre_arms",
            tokens=True,  # as published
            missing="No --zsre was given, so the table has no zsRE.",
        ),
    ),
)


def _projected(lab: Lab) -> Iterable[Arm]:
    """Each arm, plain and with each projection."""
    for arm in chosen(lab.settings):
        yield Arm(arm, arm)
        for way in chosen(lab.settings, "projections"):
            yield Arm(f"{arm}+{way}", f"{arm}+{way}", against=arm)


def _gains(results: Results) -> str:
    told = []
    for label, plain, projected in results.pairs():
        parts = []
        for measure in ("specificity", "efficacy_strict"):
            if moved := difference(plain.rows, projected.rows, measure):
                mean, low, high = moved[0]
                parts.append(f"{short(measure)} {mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        grown = [growth(spot) for spot in (plain, projected)]
        if None not in grown:
            parts.append(f"perplexity growth {grown[0]:.1f} to {grown[1]:.1f} %")
        told.append(f"{label}: {', '.join(parts) or 'nothing measurable'}.")
    return "Projected minus plain, in points. " + " ".join(told)


PROJECTION = StudySpec(
    name="projection",
    title="Locate-then-edit methods with and without the projection",
    question="Does projecting the update on the null space help each method, as AlphaEdit's "
    "paper says (+28 % on average)?",
    needs=("facts",),
    cannot_show="The paper's gains are after 2,000 edits on models that the plain methods had "
    "broken by then; after a short stream the plain methods are not broken yet.",
    parts=(
        Part(
            _projected,
            tables=(end_table("projection", "With and without"),),
            figures=(
                Figure(
                    FigureSpec(
                        "projection",
                        "The projected method minus the plain one, over the same facts; 95 % "
                        "intervals of a paired bootstrap.",
                        "intervals",
                        "arm",
                        "difference (points of %)",
                        panel="measure",
                    ),
                    paired(*PREFERENCE, "efficacy_strict"),
                ),
            ),
            shows=_gains,
        ),
    ),
)
