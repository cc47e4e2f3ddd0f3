"""Studies of what a stream of edits does to the rest: skills, hidden states, relations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor
from nulledit.evaluation.groups import OTHER, by_relation
from nulledit.evaluation.stats import rank_correlation
from nulledit.models.layouts import frozen
from nulledit.models.tokens import chunks_by_length
from nulledit.report.document import FigureSpec, Value
from nulledit.report.points import Point
from nulledit.studies.build import head, lines, moved, point
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Cells, Figure, Part, StudySpec, Table, named
from nulledit.studies.questions import DRIFT as DRIFT_OF_STATES
from nulledit.studies.questions import FACTS, TASKS, Facts, Question
from nulledit.studies.results import Results, Rows, Spot, difference, extremes, number, rate
from nulledit.studies.stream import StreamPlan

# -- capability ----------------------------------------------------------------------------------


def _tasks_of(results: Results) -> Mapping[str, Any]:
    """The unedited model's tasks."""
    assert results.base
    found: Mapping[str, Any] = results.base.found["capability"]
    return found


def _percent(mean: float | None, error: float | None, n: int | None) -> Value:
    mean, error = (None if value is None else 100 * value for value in (mean, error))
    return Value(mean, error, n)


def _f1(result: Mapping[str, Any]) -> Value | float:
    if "f1" not in result:  # of a predictor that always says the commonest class
        return 100 * float(result["chance"])
    return _percent(result["f1"], result["f1_standard_error"], result["n"])


def _probability(result: Mapping[str, Any]) -> Value:
    rate = result["probability"]
    return _percent(rate["mean"], rate["standard_error"], rate["n"])


def _of_task(task: str, cell: Any) -> Any:
    return lambda spot: cell(spot.found["capability"][task])


def _task_table(name: str, title: str, caption: str, cell: Any, better: str | None) -> Table:
    def columns(results: Results) -> Iterator[Cells]:
        for task in _tasks_of(results):
            yield Cells(head(task, task, better=better), _of_task(task, cell))

    def rows(results: Results) -> Iterable[Spot]:
        chance = {task: {"chance": r["chance_f1"]} for task, r in _tasks_of(results).items()}
        first = [Spot("chance", found={"capability": chance})] if name == "f1" else []
        return [*first, *results.rows]

    return Table(name, title, caption, (columns,), names="model", rows=rows)


def _probabilities(results: Results) -> Iterator[Point]:
    for task, base in _tasks_of(results).items():
        for arm in results.arms:
            yield point(0, _probability(base), arm.label, task)
            for spot in arm.spots:
                yield point(spot.at, _probability(spot.found["capability"][task]), arm.label, task)


def _items(spot: Spot | None, task: str) -> Rows:
    """A task's items by place."""
    held = spot.found["capability"][task]["items"] if spot else []
    return {str(place): item for place, item in enumerate(held)}


def _moved_tasks(results: Results) -> list[Point]:
    return [
        change
        for spot in results.ends
        for task in _tasks_of(results)
        for change in moved(
            spot.label, task, _items(results.base, task), _items(spot, task), "probability"
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
                _task_table(
                    "f1",
                    "Weighted F1",
                    "Weighted F1 over items; chance is a predictor that always says the commonest "
                    "class.",
                    _f1,
                    None,  # chance is no rival
                ),
                _task_table(
                    "probability",
                    "Probability of the right answer",
                    "Normalised over the choices: it still moves where the answer itself is at "
                    "chance.",
                    _probability,
                    "high",
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
                Figure(
                    FigureSpec(
                        "capability-change",
                        "Change after {edits} edits against the unedited model, paired over "
                        "items; 95 % intervals.",
                        "intervals",
                        "arm",
                        "change of the right answer's probability (points of %)",
                        panel="task",
                    ),
                    _moved_tasks,
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


def _at(spot: Spot, layer: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(
        at for at in spot.found["drift"]["layers"] if at["layer"] == layer
    )
    return found


def _drift_columns(results: Results) -> Iterator[Cells]:
    for n in _layers(results):
        for name, unit, digits in (("distance", "%", 1), ("shift", "", 3), ("energy", "", 4)):
            of = head(f"{name[0]}{n}", f"{name}, layer {n}", unit, digits, "low")
            yield Cells(of, partial(_drifted, layer=n, name=name))


def _drifted(spot: Spot, layer: int, name: str) -> Any:
    found = _at(spot, layer)[name]
    return Value.percent(found) if name == "distance" else found


def _clouds(results: Results) -> Iterator[Point]:
    for spot in results.ends:
        for p in spot.found["drift"]["points"]:
            if p["layer"] == _layers(results)[-1]:
                side = "before" if p["side"] == "base" else "after"
                yield Point(p["x"], p["y"], series=side, panel=spot.label)


def _farthest(results: Results) -> str:
    last = _layers(results)[-1]
    found = {spot.label: number(_drifted(spot, last, "distance")) for spot in results.ends}
    known = {label: value for label, value in found.items() if value is not None}
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
                    lambda results: (
                        "Hidden states at the last token of "
                        f"{_at(results.ends[0], _layers(results)[0])['distance']['n']} prompts "
                        f"that no edit touches, after {len(results.queue)} edits. Distance: mean "
                        "‖h′ − h‖/‖h‖; shift: of the mean against the spread; energy: 0 for one "
                        "distribution, 1 for two far apart."
                    ),
                    (_drift_columns,),
                    rows=lambda results: results.ends,
                ),
            ),
            figures=(
                Figure(
                    FigureSpec(
                        "drift",
                        "",
                        "scatter",
                        "first axis",
                        "second axis",
                        series="model",
                        panel="method",
                    ),
                    _clouds,
                    lambda results: (
                        f"After block {_layers(results)[-1]}, on the two main axes of the "
                        "unedited states."
                    ),
                ),
            ),
            shows=_farthest,
        ),
    ),
)

# -- categories ----------------------------------------------------------------------------------


def _groups(lab: Lab, facts: Facts) -> dict[str, list[Fact]]:
    """Relation -> its facts, largest first; small ones together at the end."""
    label = by_relation(facts, smallest=lab.settings["smallest"])
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(label[fact.id], []).append(fact)
    return {g: groups[g] for g in sorted(groups, key=lambda g: (g == OTHER, -len(groups[g])))}


def _prompts(lab: Lab, plan: StreamPlan, facts: Facts) -> dict[str, Any]:
    """Group or task -> prompts at whose ends keys are read, and how many of them."""
    prompts = {
        name: [p.prompt for fact in members for p in fact.neighbours if p.answer]
        for name, members in _groups(lab, facts).items()
    }
    for item in lab.items():
        prompts.setdefault(f"task {item.task.name}", []).append(item.task.render(item.record))
    return {"prompts": prompts, "most": lab.settings["leak_prompts"]}


def _leaks(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
    """Group -> mean ‖Pk‖²/‖k‖² in % of the unedited keys at the ends of its prompts."""
    most = lab.settings["leak_prompts"]
    return {
        name: _free_share(editor, list(dict.fromkeys(texts))[:most]) if texts else None
        for name, texts in _prompts(lab, plan, facts)["prompts"].items()
    }


def _free_share(editor: Editor, texts: Sequence[str]) -> float:
    layers = editor.recipe.layers
    rows = [editor.editable.encoder.encode(text).ids for text in texts]
    shares = []
    with frozen(editor.model), torch.no_grad():
        for chunk in chunks_by_length([len(row) for row in rows], 2048):
            batch = editor.editable.collate([rows[i] for i in chunk])
            with editor.editable.reading_keys(layers) as found:
                editor.editable.run(batch, last=layers[-1])
            last = batch.mask.sum(1) - 1
            for layer in layers:
                keys = found[layer]
                at_end = keys[torch.arange(len(chunk)), last.to(keys.device)].double().mT
                shares.append(editor.weights.projector(layer).free_share(at_end).cpu())
    return 100 * float(torch.cat(shares).mean())


LEAKS = Question("leak", _prompts, _leaks, of_base=False, before=True)
"""How much of each group's keys the projection leaves open."""


def _change(name: str, before: Rows, after: Rows, measure: str) -> dict[str, Any]:
    """How a measure moved, over rows that both have."""
    if not (found := difference(before, after, measure)):
        return {"group": name, "n": len(after)}
    mean, low, high = found[0]
    return {
        "group": name,
        "n": len(after),
        "change": mean,
        "interval": f"{low:+.1f} to {high:+.1f}",
    }


def _by_group(results: Results) -> Iterator[dict[str, Any]]:
    """A row for each relation and each task."""
    end, base = results.ends[0], results.base
    leak = end.found["leak"]
    assert base
    for name, members in _groups(results.lab, results.queue).items():
        before, after = ({f.id: spot.rows[f.id] for f in members} for spot in (base, end))
        yield {
            **_change(name, before, after, "specificity"),
            "leak": leak[name],
            "efficacy": rate(after, "efficacy_strict"),
            "before": rate(before, "specificity"),
            "after": rate(after, "specificity"),
        }
    for task in _tasks_of(results):
        label = f"task {task}"
        row = _change(label, _items(base, task), _items(end, task), "probability")
        if "change" in row:
            yield {**row, "leak": leak[label]}


def _changes(results: Results) -> list[Point]:
    """Each group's change by its leak."""
    points = []
    for row in _by_group(results):
        task = row["group"].startswith("task ")
        known = row["leak"] is not None and row.get("change") is not None
        if known and row["group"] != OTHER:
            kind, n = ("task", None) if task else ("relation", row["n"])
            points.append(Point(row["leak"], row["change"], n=n, series=kind))
    return points


def _told(results: Results) -> str:
    points = _changes(results)
    relations = [p for p in points if p.series == "relation"]
    return _correlation(relations) + _facts_against_skills(results, points)


def _correlation(points: Sequence[Point]) -> str:
    if len(points) < 4:
        return f"Only {len(points)} relations are large enough to compare. "
    found = rank_correlation([float(p.x) for p in points], [p.y or 0.0 for p in points])
    if found is None:
        return f"All {len(points)} relations changed alike, so nothing can be said of leaks. "
    return (
        f"Over {len(points)} relations the rank correlation of a relation's unprotected share with "
        f"its change of specificity is {found.rho:+.2f} (permutation p = {found.p:.3f}). "
    )


def _facts_against_skills(results: Results, points: Sequence[Point]) -> str:
    assert results.base
    found = difference(results.base.rows, results.ends[0].rows, "specificity")
    tasks = [p.y for p in points if p.series == "task" and p.y is not None]
    if not found or not tasks:
        return ""
    mean, low, high = found[0]
    return (
        f"Specificity of neighbouring facts changes by {mean:+.1f} points [{low:+.1f}, "
        f"{high:+.1f}], while the right answer's probability on the tasks moves by "
        f"{fmean(tasks):+.1f} points on average."
    )


CATEGORIES = StudySpec(
    name="categories",
    title="Which relations suffer",
    question="Which relations lose specificity, is it where the null space leaks, and how do "
    "facts fare against skills?",
    needs=("facts", "capability"),
    cannot_show="Few relations have ten facts in a short queue, one neighbour each, so a "
    "relation's own figure is coarse; a correlation over so few groups finds only strong effects.",
    parts=(
        Part(
            named(only=1),
            asked=(FACTS, TASKS, LEAKS),
            tables=(
                Table(
                    "categories",
                    "By relation and by task",
                    "After {edits} edits with {arm}. Unprotected share: mean ‖Pk‖²/‖k‖² over "
                    "edited layers of the keys at the end of the group's neighbour prompts (or "
                    "the task's prompts). Change: of specificity by preference, or of the right "
                    "answer's probability for a task; groups of fewer than {smallest} facts are "
                    "shown together.",
                    (
                        head("n", "n", "", 0),
                        head("leak", "unprotected share"),
                        head("efficacy", "efficacy, strict"),
                        head("before", "specificity before"),
                        head("after", "after"),
                        head("change", "change"),
                        head("interval", "95 % interval", ""),
                    ),
                    names=head("group", "relation or task", ""),
                    rows=_by_group,
                ),
            ),
            figures=(
                Figure(
                    FigureSpec(
                        "leak",
                        "Each group's change against how much of its keys the projection leaves "
                        "open.",
                        "scatter",
                        "unprotected share of the group's keys (%)",
                        "change (points of %)",
                        series="group",
                    ),
                    _changes,
                ),
            ),
            shows=_told,
        ),
    ),
)
