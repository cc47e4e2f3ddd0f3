"""Studies of streams: the methods' table, and what the projection does for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import PREFERENCE
from nulledit.studies.build import (
    OF_TOKENS,
    along,
    head,
    intervals,
    labels,
    lines,
    paired,
    rates_along,
    several,
    usual,
)
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Cells, Columns, Figure, Part, StudySpec, Table, named
from nulledit.studies.results import (
    OF_TEXT,
    Quantity,
    Results,
    best_and_worst,
    changes,
    growth,
    rate,
    update_share,
)
from nulledit.studies.scale import chosen
from nulledit.studies.stream import StreamPlan

SPOKEN = ("generation", "fluency")
UPDATE = Cells(head("update", "‖Δ‖/‖W‖"), update_share)
SECONDS = Cells(head("seconds", "keys, solve", "s/fact", 2), lambda spot: spot.extra.get("own"))


def end_table(
    name: str,
    title: str,
    *more: Columns,
    measures: Sequence[Columns] = (usual,),
    names: str = "method",
) -> Table:
    """The unedited model and each arm after the whole stream, with `more` columns at the end."""
    return Table(
        name,
        title,
        "After {edits} edits; efficacy and generalization of all of them. n counts facts, for "
        "perplexity and KL (from the unedited model) tokens. Seconds are wall time of keys and "
        "solve on a shared machine; values, which cost every method about the same, are not in "
        "them.",
        (labels(names), *measures, *SPOKEN, *OF_TEXT, UPDATE, SECONDS, *more),
    )


def cohort_table(name: str) -> Table:
    """Strict efficacy after the whole stream, by when a fact was edited, a batch a column."""

    def columns(results: Results) -> Iterable[Cells]:
        queue, size = results.queue, results.lab.settings["batch_size"]
        for a in range(0, len(queue), size) if len(results.arms[0]) > 1 else ():
            b = min(a + size, len(queue))
            yield Cells(head(f"c{a}", f"{a + 1}-{b}", better="high"), _strict_of(queue[a:b]))

    title = "Does the first cohort still hold?"
    caption = "Strict efficacy after the whole stream by the place of the fact in the queue."
    return Table(
        name, title, caption, (labels("method"), columns), rows=lambda results: results.ends
    )


def _strict_of(facts: Sequence[Fact]) -> Quantity:
    return lambda spot: rate(spot.rows, "efficacy_strict", [fact.id for fact in facts])


def along_figures(prefix: str) -> tuple[Figure, ...]:
    """Rates and perplexity along the stream, where it was asked more than once."""
    return (
        lines(
            f"{prefix}-rates",
            "All facts so far, at each checkpoint. Bars: one standard error over facts.",
            "mean over facts (%)",
            several(rates_along),
            panel="measure",
        ),
        lines(
            f"{prefix}-perplexity",
            "Growth of perplexity on text that no edit touches.",
            "growth of perplexity (%)",
            several(along({"": growth}, start=0.0)),
        ),
    )


def _part(source: str, arms: str, *measures: Columns) -> Part:
    return Part(
        named(arms),
        tables=(end_table(source, "{data}", measures=measures), cohort_table(f"{source}-cohorts")),
        figures=along_figures(source),
        shows=best_and_worst("efficacy_strict", "specificity", "growth"),
        source=source,
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
    parts=(_part("facts", "arms", usual), _part("zsre", "zsre_arms", *OF_TOKENS)),
)


def _projected(lab: Lab, queue: list[Fact]) -> Iterable[StreamPlan]:
    """Each arm, plain and with each projection."""
    for arm in chosen(lab.settings):
        yield lab.plan(arm, queue)
        for way in chosen(lab.settings, "projections"):
            yield lab.plan(f"{arm}+{way}", queue, against=arm)


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
                intervals(
                    "projection",
                    "The projected method minus the plain one, over the same facts; 95 % "
                    "intervals of a paired bootstrap.",
                    paired(*PREFERENCE, "efficacy_strict"),
                ),
            ),
            shows=changes(
                "specificity", "efficacy_strict", first="Projected minus plain, in points"
            ),
        ),
    ),
)
