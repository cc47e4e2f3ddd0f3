"""What `evaluate` shows beside facts: relations, skills, drift, the harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nulledit.data.facts import Fact
from nulledit.errors import ConfigError
from nulledit.evaluation.capability import TaskResult, compare
from nulledit.evaluation.drift import Drift
from nulledit.evaluation.groups import by_relation, rates_of_rows
from nulledit.evaluation.measures import find
from nulledit.evaluation.runner import Evaluation
from nulledit.io.untrusted import MAX_DOCUMENT, parse_json, read_text
from nulledit.report.document import Cell, Column, StudyTable, Value
from nulledit.runs.tables import interval

SEEN = ("efficacy_strict", "generalization", "specificity")


def read_references(file: str | None) -> dict[str, list[str]] | None:
    """Texts by fact id or "relation/target" from a JSON object; ConfigError for anything else."""
    if file is None:
        return None
    text = read_text(Path(file), most=MAX_DOCUMENT, error=ConfigError)
    found = parse_json(text, source=file, error=ConfigError)
    if not isinstance(found, dict) or not all(
        isinstance(v, list) and all(isinstance(text, str) for text in v) for v in found.values()
    ):
        raise ConfigError(f"{file}: expected an object of lists of texts, by id or relation/target")
    return found


def relations_table(facts: Sequence[Fact], evaluation: Evaluation) -> StudyTable:
    """Rates by relation, of groups of at least ten facts."""
    columns = [Column("relation", "relation")]
    columns += [Column(m, find(m).title, unit="%") for m in SEEN]
    rows = [
        {"relation": name, **{m: Value.percent(rates.get(m)) for m in SEEN}}
        for name, rates in rates_of_rows(evaluation.rows(), by_relation(facts)).items()
    ]
    return StudyTable("relations", "By relation, edited", "", tuple(columns), tuple(rows))


def capability_table(sides: Mapping[str, Mapping[str, TaskResult]]) -> StudyTable:
    """F1 beside chance, and how the right answer's probability moved."""
    (first, *_), last = sides.values(), list(sides.values())[-1]
    moved = compare(first, last) if len(sides) > 1 else {}
    columns = [Column("task", "task"), Column("chance", "chance F1")]
    columns += [Column(f"f1-{side}", f"F1, {side}") for side in sides]
    columns += [Column(f"p-{side}", f"p(right), {side}") for side in sides]
    rows: list[dict[str, Cell]] = []
    for task, result in last.items():
        row: dict[str, Cell] = {"task": task, "chance": 100 * result.chance_f1}
        for side, of in sides.items():
            row[f"f1-{side}"] = Value(100 * of[task].f1, 100 * of[task].f1_standard_error, result.n)
            row[f"p-{side}"] = Value.percent(of[task].probability)
        if change := moved.get(task):
            row["change"] = interval(100 * x for x in change)
        rows.append(row)
    if moved:
        columns.append(Column("change", "change, 95 %"))
    return StudyTable("tasks", "Six tasks (%)", "", tuple(columns), tuple(rows))


def drift_table(found: Drift) -> StudyTable:
    """One row a layer."""
    rows = tuple(
        {
            "layer": str(layer.layer),
            "distance": Value.percent(layer.distance),
            "cosine": layer.cosine.mean,
            "shift": layer.shift,
            "energy": layer.energy,
        }
        for layer in found.layers
    )
    columns = (
        Column("layer", "layer"),
        Column("distance", "‖h′ − h‖/‖h‖", unit="%"),
        Column("cosine", "cosine", digits=4),
        Column("shift", "shift", digits=4),
        Column("energy", "energy", digits=4),
    )
    return StudyTable("drift", "Drift of hidden states", "", columns, rows)


def harness_table(sides: Mapping[str, Mapping[str, Any]]) -> StudyTable:
    """One row a task and metric."""
    rows: list[dict[str, Cell]] = []
    for task, found in list(sides.values())[-1].items():
        for metric in found["metrics"]:
            row: dict[str, Cell] = {"task": task, "metric": metric}
            for side, of in sides.items():
                told = of[task]["metrics"][metric]
                row[side] = Value(told["value"], told["standard_error"])
            rows.append(row)
    columns = [Column("task", "task"), Column("metric", "metric")]
    columns += [Column(side, side, digits=4) for side in sides]
    return StudyTable("harness", "lm-evaluation-harness", "", tuple(columns), tuple(rows))
