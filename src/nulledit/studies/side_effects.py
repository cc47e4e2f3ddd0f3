"""Studies of what a stream of edits does to the rest: skills and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nulledit.report.points import Point
from nulledit.studies.build import head, intervals, labels, lines, moved, point, scatter
from nulledit.studies.declaration import Cells, Part, StudySpec, Table, named
from nulledit.studies.questions import DRIFT as DRIFT_OF_STATES
from nulledit.studies.questions import TASKS
from nulledit.studies.results import Quantity, Results, Rows, Spot, extremes, numbers

# -- capability ----------------------------------------------------------------------------------


def tasks_of(results: Results) -> Mapping[str, Any]:
    """Task -> the unedited model's result."""
    found: Mapping[str, Any] = results.base.found["capability"]
    return found


def items(spot: Spot, task: str) -> Rows:
    """A task's items by place."""
    return dict(enumerate(spot.found["capability"][task]["items"]))  # type: ignore[arg-type]


def _result(task: str, what: str) -> Quantity:
    """`f1` or the right answer's `probability` of a task."""

    def value(spot: Spot) -> Mapping[str, Any]:
        found: dict[str, Any] = spot.found["capability"][task]
        f1 = {"mean": "f1", "standard_error": "f1_standard_error", "n": "n"}
        return {k: found[name] for k, name in f1.items()} if what == "f1" else found["probability"]

    return value


def _columns(what: str, better: str | None) -> Callable[[Results], Iterable[Cells]]:
    return lambda results: [
        Cells(head(task, task, better=better), _result(task, what)) for task in tasks_of(results)
    ]


def _with_chance(results: Results) -> list[Spot]:
    """A row for a predictor that always says the commonest class, too."""
    chance = {
        task: {"f1": result["chance_f1"], "f1_standard_error": None, "n": None}
        for task, result in tasks_of(results).items()
    }
    return [Spot("chance", found={"capability": chance}), *results.rows]


def _probabilities(results: Results) -> Iterator[Point]:
    for task in tasks_of(results):
        value = _result(task, "probability")
        for along in results.arms:
            for spot in (results.base, *along):
                yield point(spot.at, value(spot), along[0].label, task)


def _moved_tasks(results: Results) -> list[Point]:
    return [
        change
        for end in results.ends
        for task in tasks_of(results)
        for change in moved(
            end.label, task, items(results.base, task), items(end, task), "probability"
        )
    ]


def _moved_told(results: Results) -> str:
    changes = _moved_tasks(results)
    held = [p.y for p in changes if p.y is not None]
    span = f"{min(held):+.1f} to {max(held):+.1f}" if held else "nothing measurable"
    clear = [f"{p.series} on {p.panel} ({p.y:+.1f})" for p in changes if p.low * p.high > 0]  # type: ignore[operator]
    return (
        f"After {len(results.queue)} edits the right answer's probability moved by {span} points "
        f"over tasks and arms; of {len(changes)} intervals, those without zero: "
        f"{', '.join(clear) or 'none'}."
    )


CAPABILITY = StudySpec(
    name="capability",
    title="General capability along a stream",
    question="What do edits cost on six tasks of general capability?",
    needs=("facts", "capability"),
    cannot_show="A model of this size answers most of these tasks at chance, so F1 can't fall; "
    "only the right answer's probability can move, and a fall from chance is not a loss of skill.",
    parts=(
        Part(
            named(),
            asked=(TASKS,),
            tables=(
                Table(
                    "f1",
                    "Weighted F1",
                    "Weighted F1 over items; chance is a predictor that always says the commonest "
                    "class.",
                    (labels("model"), _columns("f1", None)),
                    rows=_with_chance,
                ),
                Table(
                    "probability",
                    "Probability of the right answer",
                    "Normalised over the choices: it still moves where the answer itself is at "
                    "chance.",
                    (labels("model"), _columns("probability", "high")),
                ),
            ),
            figures=(
                lines(
                    "capability",
                    "Probability of the right answer, normalised over the choices. Bars: one "
                    "standard error.",
                    "probability of the right answer (%)",
                    _probabilities,
                    panel="task",
                ),
                intervals(
                    "capability-change",
                    "Change after {edits} edits against the unedited model, paired over items; "
                    "95 % intervals.",
                    _moved_tasks,
                    panel="task",
                    y="change of the right answer's probability (points of %)",
                ),
            ),
            shows=_moved_told,
            along=True,
        ),
    ),
)

# -- drift ---------------------------------------------------------------------------------------


def _layers(results: Results) -> list[int]:
    return [layer["layer"] for layer in results.ends[0].found["drift"]["layers"]]


def _drifted(layer: int, name: str) -> Quantity:
    """`distance`, `shift` or `energy` after a block."""

    def value(spot: Spot) -> Any:
        return next(at[name] for at in spot.found["drift"]["layers"] if at["layer"] == layer)

    return value


def _drift_columns(results: Results) -> Iterator[Cells]:
    for n in _layers(results):
        for name, unit, digits in (("distance", "%", 1), ("shift", "", 3), ("energy", "", 4)):
            of = head(f"{name[0]}{n}", f"{name}, layer {n}", unit, digits, "low")
            yield Cells(of, _drifted(n, name))


def _clouds(results: Results) -> Iterator[Point]:
    for spot in results.ends:
        for p in spot.found["drift"]["points"]:
            if p["layer"] == _layers(results)[-1]:
                side = "before" if p["side"] == "base" else "after"
                yield Point(p["x"], p["y"], series=side, panel=spot.label)


def _farthest(results: Results) -> str:
    known = numbers(results.ends, _drifted(_layers(results)[-1], "distance"))
    if not known:
        return "States of other text could not be compared."
    return f"At the last block, states of other text move {extremes(known)}."


DRIFT = StudySpec(
    name="drift",
    title="Drift of hidden states",
    question="How far do edits move the hidden states of text that they do not touch, with and "
    "without the projection?",
    needs=("facts", "prompts"),
    cannot_show="States at the last token of short prompts are not all text, and a distance says "
    "nothing about what the model then says.",
    parts=(
        Part(
            named(),
            asked=(DRIFT_OF_STATES,),
            tables=(
                Table(
                    "drift",
                    "Distances",
                    "Hidden states at the last token of n prompts that no edit touches, after "
                    "{edits} edits. Distance: mean ‖h′ − h‖/‖h‖; shift: of the mean against the "
                    "spread; energy: 0 for one distribution, 1 for two far apart.",
                    (labels("method"), _drift_columns),
                    rows=lambda results: results.ends,
                ),
            ),
            figures=(
                scatter(
                    "drift",
                    "After the last block, on the two main axes of the unedited states.",
                    "first axis",
                    "second axis",
                    _clouds,
                    series="model",
                    panel="method",
                ),
            ),
            shows=_farthest,
        ),
    ),
)
