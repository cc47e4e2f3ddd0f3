"""Study of relations: which suffer from edits, and whether it is where the null space leaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.groups import OTHER, by_relation
from nulledit.evaluation.stats import rank_correlation
from nulledit.models.batches import chunks_by_length
from nulledit.models.layouts import frozen
from nulledit.report.points import Point
from nulledit.studies.build import head, scatter
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Part, StudySpec, Table, named
from nulledit.studies.questions import FACTS, TASKS, Asked, Facts, Question
from nulledit.studies.results import Results, Rows, difference, rate
from nulledit.studies.side_effects import items, tasks_of
from nulledit.studies.stream import StreamPlan


def _groups(lab: Lab, facts: Facts) -> dict[str, list[Fact]]:
    """Relation -> its facts, largest first; small ones together at the end."""
    label = by_relation(facts, smallest=lab.settings["smallest"])
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(label[fact.id], []).append(fact)
    return {g: groups[g] for g in sorted(groups, key=lambda g: (g == OTHER, -len(groups[g])))}


def _leaks(lab: Lab, plan: StreamPlan, facts: Facts) -> Asked:
    """Group or task -> mean ‖Pk‖²/‖k‖² in % of the unedited keys at the ends of its prompts."""
    most = lab.settings["leak_prompts"]
    prompts = {
        name: [p.prompt for fact in members for p in fact.neighbours if p.answer]
        for name, members in _groups(lab, facts).items()
    }
    for item in lab.items():
        prompts.setdefault(f"task {item.task.name}", []).append(item.task.render(item.record))

    def leaks(editor: EditEngine) -> Any:
        if editor.weights.grown:
            return dict.fromkeys(prompts)  # gated edits have no null space
        with editor.base_weights():
            return {
                name: _free_share(editor, list(dict.fromkeys(texts))[:most]) if texts else None
                for name, texts in prompts.items()
            }

    return {"prompts": prompts, "most": most}, leaks


def _free_share(editor: EditEngine, texts: Sequence[str]) -> float:
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


LEAKS = Question("leak", _leaks, of_base=False, last=True)
"""How much of each group's keys the projection leaves open."""


def _change(name: str, before: Rows, after: Rows, measure: str) -> dict[str, Any]:
    """How a measure moved, over rows that both have."""
    row: dict[str, Any] = {"group": name, "n": len(after)}
    if found := difference(before, after, measure):
        mean, low, high = found[0]
        row |= {"change": mean, "interval": f"{low:+.1f} to {high:+.1f}"}
    return row


def _by_group(results: Results) -> Iterator[Mapping[str, Any]]:
    """A row for each relation and each task."""
    end, base = results.ends[0], results.base
    for name, members in _groups(results.lab, results.queue).items():
        before, after = ({f.id: spot.rows[f.id] for f in members} for spot in (base, end))
        yield {
            **_change(name, before, after, "specificity"),
            "leak": end.found["leak"][name],
            "efficacy": rate(after, "efficacy_strict"),
            "before": rate(before, "specificity"),
            "after": rate(after, "specificity"),
        }
    for task in tasks_of(results):
        row = _change(f"task {task}", items(base, task), items(end, task), "probability")
        if "change" in row:
            yield {**row, "leak": end.found["leak"][f"task {task}"]}


def _changes(results: Results) -> list[Point]:
    """Each group's change by its leak."""
    points = []
    for row in _by_group(results):
        kind, n = ("relation", row["n"]) if "efficacy" in row else ("task", None)
        if row["leak"] is not None and "change" in row and row["group"] != OTHER:
            points.append(Point(row["leak"], row["change"], n=n, series=kind))
    return points


def _shows(results: Results) -> str:
    points = _changes(results)
    relations = [p for p in points if p.series == "relation"]
    tasks = [p.y for p in points if p.series == "task" and p.y is not None]
    told = _correlation(relations)
    found = difference(results.base.rows, results.ends[0].rows, "specificity")
    if found and tasks:
        mean, low, high = found[0]
        told += (
            f"Specificity of neighbouring facts changes by {mean:+.1f} points [{low:+.1f}, "
            f"{high:+.1f}], while the right answer's probability on the tasks moves by "
            f"{fmean(tasks):+.1f} points on average."
        )
    return told


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
                        head("group", "relation or task", ""),
                        head("n", "n", "", 0),
                        head("leak", "unprotected share"),
                        head("efficacy", "efficacy, strict"),
                        head("before", "specificity before"),
                        head("after", "after"),
                        head("change", "change"),
                        head("interval", "95 % interval", ""),
                    ),
                    rows=_by_group,
                ),
            ),
            figures=(
                scatter(
                    "leak",
                    "Each group's change against how much of its keys the projection leaves open.",
                    "unprotected share of the group's keys (%)",
                    "change (points of %)",
                    _changes,
                    series="group",
                ),
            ),
            shows=_shows,
        ),
    ),
)
