"""Studies of what a stream of edits does to the rest: skills, hidden states, relations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor
from nulledit.evaluation.groups import OTHER, by_relation
from nulledit.evaluation.stats import paired_bootstrap
from nulledit.models.layouts import frozen
from nulledit.models.tokens import chunks_by_length
from nulledit.report.document import Column, FigureSpec, StudyTable, Value
from nulledit.report.points import Point
from nulledit.studies.context import Lab
from nulledit.studies.methods_table import asked_at
from nulledit.studies.results import (
    Outcome,
    Rows,
    StudySpec,
    Work,
    difference,
    extremes,
    rate,
)
from nulledit.studies.scale import chosen
from nulledit.studies.stream import Stream, StreamPlan


def plans_of(lab: Lab) -> list[StreamPlan]:
    """One stream per arm on one queue."""
    queue = lab.facts(lab.settings["facts"], skip=lab.settings["skip"])
    return [lab.plan(arm, queue) for arm in chosen(lab.settings)]


# -- capability --------------------------------------------------------------------------------


def run_capability(lab: Lab) -> Outcome:
    """The six tasks along the stream."""
    base = lab.capability(None, 0)
    plans = plans_of(lab)
    found: dict[str, dict[int, Any]] = {}
    for plan in plans:
        stream = lab.edited(plan)
        found[plan.label] = {at: lab.capability(stream, at) for at in asked_at(lab, plan)}
    end = len(plans[0].facts)
    ends = {label: along[end] for label, along in found.items()}
    tables = [
        _task_table("f1", "Weighted F1", base, ends),
        _task_table("probability", "Probability of the right answer", base, ends),
    ]
    points: list[Point] = []
    for task in base:
        for label, along in found.items():
            for at, result in {0: base, **along}.items():
                r = result[task]["probability"]
                points.append(
                    Point(
                        at, _percent(r["mean"]), _percent(r["standard_error"]), r["n"], label, task
                    )
                )
    figure = FigureSpec(
        "capability",
        "Probability of the right answer, normalised over the choices. Bars: one standard error.",
        "lines",
        "edits",
        "probability of the right answer (%)",
        panel="task",
        points=tuple(points),
    )
    moved = _moved_tasks(base, ends)
    change = FigureSpec(
        "capability-change",
        f"Change behind {end} edits against the unedited model, paired over items; 95 % intervals.",
        "intervals",
        "arm",
        "change of the right answer's probability (points of %)",
        panel="task",
        points=tuple(moved),
    )
    clear = [f"{p.series} on {p.panel} ({p.y:+.1f})" for p in moved if p.low * p.high > 0]  # type: ignore[operator]
    shows = (
        f"Behind {end} edits the right answer's probability moved by {_range(p.y for p in moved)} "
        f"points over tasks and arms; of {len(moved)} intervals, those without zero: "
        f"{', '.join(clear) or 'none'}."
    )
    return Outcome(shows, tables, [figure, change])


def _task_table(
    kind: str, title: str, base: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]
) -> StudyTable:
    tasks = list(base)
    better = "high" if kind == "probability" else None  # chance is no rival
    columns = [Column("arm", "model"), *(Column(t, t, better, "%") for t in tasks)]

    def cell(result: Mapping[str, Any]) -> Value:
        if kind == "f1":
            return Value(_percent(result["f1"]), _percent(result["f1_standard_error"]), result["n"])
        r = result["probability"]
        return Value(_percent(r["mean"]), _percent(r["standard_error"]), r["n"])

    rows: list[dict[str, Any]] = []
    if kind == "f1":
        rows.append({"arm": "chance", **{t: _percent(base[t]["chance_f1"]) for t in tasks}})
    rows.append({"arm": "unedited", **{t: cell(base[t]) for t in tasks}})
    rows += [{"arm": arm, **{t: cell(found[t]) for t in tasks}} for arm, found in arms.items()]
    caption = (
        "Weighted F1 over items; chance is a predictor that always says the commonest class."
        if kind == "f1"
        else "Normalised over the choices: it still moves where the answer itself is at chance."
    )
    return StudyTable(kind, title, caption, tuple(columns), tuple(rows))


def _moved_tasks(base: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    points = []
    for label, found in arms.items():
        for task in base:
            moved = _moved(base[task], found[task])
            if moved:
                mean, low, high = (100 * x for x in moved)
                n = len(base[task]["items"])
                points.append(Point(label, mean, n=n, series=label, panel=task, low=low, high=high))
    return points


def _moved(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[float, float, float] | None:
    """How the right answer's probability moved over items: mean and 95 % interval."""
    pairs = [
        (a["probability"], b["probability"])
        for a, b in zip(before["items"], after["items"], strict=True)
        if a["probability"] is not None and b["probability"] is not None
    ]
    return paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


# -- drift ---------------------------------------------------------------------------------------


def run_drift(lab: Lab) -> Outcome:
    """How far hidden states of other text move, with and without the projection."""
    plans = plans_of(lab)
    queue = plans[0].facts
    end = len(queue)
    found = {}
    for plan in plans:
        found[plan.label] = lab.drift(lab.edited(plan), end, queue)
    layers = [layer["layer"] for layer in next(iter(found.values()))["layers"]]
    columns = [Column("arm", "method")]
    for layer in layers:
        columns += [
            Column(f"d{layer}", f"distance, layer {layer}", "low", "%"),
            Column(f"s{layer}", f"shift, layer {layer}", "low", "", 3),
            Column(f"e{layer}", f"energy, layer {layer}", "low", "", 4),
        ]
    rows, points = [], []
    for label, drifted in found.items():
        row: dict[str, Any] = {"arm": label}
        for layer in drifted["layers"]:
            at = layer["layer"]
            row |= {f"d{at}": Value.percent(layer["distance"]), f"s{at}": layer["shift"]}
            row[f"e{at}"] = layer["energy"]
        rows.append(row)
        for p in drifted["points"]:
            if p["layer"] == layers[-1]:
                side = "before" if p["side"] == "base" else "after"
                points.append(Point(p["x"], p["y"], series=side, panel=label))
    caption = (
        f"Hidden states at the last token of {found[plans[0].label]['layers'][0]['distance']['n']} "
        f"prompts that no edit touches, behind {end} edits. Distance: mean ‖h′ − h‖/‖h‖; shift: of "
        "the mean against the spread; energy: 0 for one distribution, 1 for two far apart."
    )
    figure = FigureSpec(
        "drift",
        f"Behind block {layers[-1]}, on the two main axes of the unedited states.",
        "scatter",
        "first axis",
        "second axis",
        series="model",
        panel="method",
        points=tuple(points),
    )
    last = f"d{layers[-1]}"
    moved = {row["arm"]: row[last].mean for row in rows if row[last] and row[last].mean is not None}
    shows = "States of other text could not be compared."
    if moved:
        shows = f"At the last block, states of other text move {extremes(moved)}."
    return Outcome(
        shows, [StudyTable("drift", "Distances", caption, tuple(columns), tuple(rows))], [figure]
    )


# -- categories ----------------------------------------------------------------------------------


def run_categories(lab: Lab) -> Outcome:
    """Which relations suffer, and whether it is where the null space leaks."""
    (plan, *_) = plans_of(lab)
    queue = plan.facts
    before = lab.asked(None, 0, queue)
    stream = lab.edited(plan)
    end = len(queue)
    after = lab.asked(stream, end, queue)
    label = by_relation(queue, smallest=lab.settings["smallest"])
    groups: dict[str, list[Fact]] = {}
    for fact in queue:
        groups.setdefault(label[fact.id], []).append(fact)
    prompts = {
        name: [p.prompt for fact in members for p in fact.neighbours if p.answer]
        for name, members in groups.items()
    }
    items = lab.items()
    for item in items:
        prompts.setdefault(f"task {item.task.name}", []).append(item.task.render(item.record))
    leaks = _leaks(lab, stream, prompts)
    tasks_before, tasks_after = lab.capability(None, 0), lab.capability(stream, end)
    rows: list[dict[str, Any]] = []
    points: list[Point] = []
    for name in sorted(groups, key=lambda g: (g == OTHER, -len(groups[g]))):
        row = _relation_row(name, groups[name], before, after, leaks[name])
        rows.append(row)
        leak, n = leaks[name], len(groups[name])
        if row["change"] is not None and leak is not None and name != OTHER:
            points.append(Point(leak, row["change"], n=n, series="relation"))
    for task in tasks_before:
        found = _moved(tasks_before[task], tasks_after[task])
        if found is None:
            continue
        moved, leak = found, leaks[f"task {task}"]
        rows.append(
            {
                "group": f"task {task}",
                "n": len(tasks_before[task]["items"]),
                "leak": leak,
                "change": 100 * moved[0],
                "interval": f"{100 * moved[1]:+.1f} to {100 * moved[2]:+.1f}",
            }
        )
        if leak is not None:
            points.append(Point(leak, 100 * moved[0], series="task"))
    columns = (
        Column("group", "relation or task"),
        Column("n", "n", None, "", 0),
        Column("leak", "unprotected share", None, "%"),
        Column("efficacy", "efficacy, strict", None, "%"),
        Column("before", "specificity before", None, "%"),
        Column("after", "after", None, "%"),
        Column("change", "change", None, "%"),
        Column("interval", "95 % interval", None),
    )
    caption = (
        f"Behind {end} edits with {plan.label}. Unprotected share: mean ‖Pk‖²/‖k‖² over edited "
        "layers of the keys at the end of the group's neighbour prompts (or the task's prompts). "
        "Change: of specificity by preference, or of the right answer's probability for a task; "
        f"groups of fewer than {lab.settings['smallest']} facts stand together."
    )
    table = StudyTable("categories", "By relation and by task", caption, columns, tuple(rows))
    figure = FigureSpec(
        "leak",
        "Each group's change against how much of its keys the projection leaves open.",
        "scatter",
        "unprotected share of the group's keys (%)",
        "change (points of %)",
        series="group",
        points=tuple(points),
    )
    relations = [p for p in points if p.series == "relation"]
    shows = _correlation(relations) + _facts_against_skills(before, after, points)
    return Outcome(shows, [table], [figure])


def _relation_row(
    name: str, members: Sequence[Fact], before: Rows, after: Rows, leak: float | None
) -> dict[str, Any]:
    ids = [fact.id for fact in members]
    sides = [{i: side[i] for i in ids} for side in (before, after)]
    moved = difference(sides[0], sides[1], "specificity")
    return {
        "group": name,
        "n": len(members),
        "leak": leak,
        "efficacy": Value.percent(rate(sides[1], "efficacy_strict")),
        "before": Value.percent(rate(sides[0], "specificity")),
        "after": Value.percent(rate(sides[1], "specificity")),
        "change": moved[0] if moved else None,
        "interval": f"{moved[1]:+.1f} to {moved[2]:+.1f}" if moved else None,
    }


def _leaks(
    lab: Lab, stream: Stream, prompts: Mapping[str, Sequence[str]]
) -> dict[str, float | None]:
    """Group -> mean ‖Pk‖²/‖k‖² in % of the unedited keys at the ends of its prompts."""

    most = lab.settings["leak_prompts"]

    def ask(editor: Editor) -> Any:
        return {
            name: _free_share(editor, list(dict.fromkeys(texts))[:most]) if texts else None
            for name, texts in prompts.items()
        }

    settings = {"prompts": {k: list(v) for k, v in prompts.items()}, "most": most}
    found: dict[str, float | None] = stream.measure(0, "leak", settings, ask)
    return found


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
                shares.append(editor.weights.projector(layer).null_space_share(at_end).cpu())
    return 100 * float(torch.cat(shares).mean())


def _correlation(points: Sequence[Point]) -> str:
    if len(points) < 4:
        return f"Only {len(points)} relations are large enough to compare. "
    x, y = (_ranks([getattr(p, axis) for p in points]) for axis in ("x", "y"))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return f"All {len(points)} relations changed alike, so nothing can be said of leaks. "
    rho = float(np.corrcoef(x, y)[0, 1])
    rng = np.random.default_rng(0)
    drawn = [float(np.corrcoef(x, rng.permutation(y))[0, 1]) for _ in range(1999)]
    chance = (1 + sum(abs(value) >= abs(rho) - 1e-12 for value in drawn)) / 2000
    return (
        f"Over {len(points)} relations the rank correlation of a relation's unprotected share with "
        f"its change of specificity is {rho:+.2f} (permutation p = {chance:.3f}). "
    )


def _ranks(values: Sequence[Any]) -> np.ndarray:
    """Ranks, ties with their mean."""
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[place]


def _facts_against_skills(before: Rows, after: Rows, points: Sequence[Point]) -> str:
    moved = difference(before, after, "specificity")
    tasks = [p.y for p in points if p.series == "task" and p.y is not None]
    if not moved or not tasks:
        return ""
    return (
        f"Specificity of neighbouring facts changes by {moved[0]:+.1f} points "
        f"[{moved[1]:+.1f}, {moved[2]:+.1f}], while the right answer's probability on the tasks "
        f"moves by {np.mean(tasks):+.1f} points on average."
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _range(values: Any) -> str:
    held = [value for value in values if value is not None]
    return f"{min(held):+.1f} to {max(held):+.1f}" if held else "nothing measurable"


CAPABILITY = StudySpec(
    name="capability",
    title="General capability along a stream",
    question="What do edits cost on six tasks of general capability?",
    needs=("facts", "capability"),
    cannot_show="A model of this size answers most of these tasks at chance, so F1 can't fall; "
    "only the right answer's probability can move, and a fall from chance is not a loss of skill.",
    work=lambda lab: Work(
        plans_of(lab), capabilities=1 + sum(len(asked_at(lab, p)) for p in plans_of(lab))
    ),
    run=run_capability,
)
DRIFT = StudySpec(
    name="drift",
    title="Drift of hidden states",
    question="How far do edits move the hidden states of text that they do not touch, with and "
    "without the projection?",
    needs=("facts", "prompts"),
    cannot_show="States at the last token of short prompts are not all text, and a distance says "
    "nothing about what the model then says.",
    work=lambda lab: Work(plans_of(lab), drifts=len(plans_of(lab))),
    run=run_drift,
)
CATEGORIES = StudySpec(
    name="categories",
    title="Which relations suffer",
    question="Which relations lose specificity, is it where the null space leaks, and how do "
    "facts fare against skills?",
    needs=("facts", "capability"),
    cannot_show="Few relations have ten facts in a short queue, one neighbour each, so a "
    "relation's own figure is coarse; a correlation over so few groups finds only strong effects.",
    work=lambda lab: Work(
        plans_of(lab)[:1],
        asked=2 * lab.settings["facts"],
        capabilities=2,
    ),
    run=run_categories,
)
