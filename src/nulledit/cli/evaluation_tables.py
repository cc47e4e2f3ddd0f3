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
from nulledit.evaluation.runner import Evaluation
from nulledit.io.untrusted import MAX_DOCUMENT, parse_json, read_text
from nulledit.report.tables import Table, as_text, number, percent

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


def relations_table(facts: Sequence[Fact], evaluation: Evaluation) -> Table:
    """Rates by relation, of groups of at least ten facts."""
    found = rates_of_rows(evaluation.rows(), by_relation(facts))
    rows: list[Sequence[str]] = [
        [name, *(percent(_plain(rates.get(m))) for m in SEEN)] for name, rates in found.items()
    ]
    return ["relation", *(f"{m.replace('_', ', ')} (%)" for m in SEEN)], rows


def capability_table(sides: Mapping[str, Mapping[str, TaskResult]]) -> Table:
    """F1 beside chance, and how the right answer's probability moved."""
    (first, *_), last = sides.values(), list(sides.values())[-1]
    moved = compare(first, last) if len(sides) > 1 else {}
    rows: list[Sequence[str]] = []
    for task, result in last.items():
        f1 = [_percent_of(s[task].f1, s[task].f1_standard_error) for s in sides.values()]
        p = [percent(_plain(s[task].probability)) for s in sides.values()]
        change = moved.get(task)
        said = (
            ""
            if change is None
            else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in change))
        )
        rows.append([task, f"{100 * result.chance_f1:.1f}", *f1, *p, said, str(result.n)])
    names = list(sides)
    head = ["task", "chance F1", *(f"F1, {n}" for n in names)]
    return [*head, *(f"p(right), {n}" for n in names), "change, 95 %", "n"], rows


def drift_table(found: Drift) -> Table:
    """One row a layer."""
    rows: list[Sequence[str]] = [
        [
            str(layer.layer),
            percent(_plain(layer.distance)),
            f"{layer.cosine.mean:.4f}",
            number(layer.shift),
            number(layer.energy),
            str(layer.distance.n),
        ]
        for layer in found.layers
    ]
    return ["layer", "‖h′ − h‖/‖h‖ (%)", "cosine", "shift", "energy", "n"], rows


def harness_table(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a task and metric."""
    last = list(sides.values())[-1]
    rows: list[Sequence[str]] = [
        [task, metric, *(_harness_cell(s[task]["metrics"][metric]) for s in sides.values())]
        for task, found in last.items()
        for metric in found["metrics"]
    ]
    return ["task", "metric", *sides], rows


def _harness_cell(found: Mapping[str, Any]) -> str:
    error = found["standard_error"]
    return number(found["value"]) + ("" if error is None else f" ± {number(error)}")


def as_sections(titled: Mapping[str, Table]) -> str:
    """Tables under their titles."""
    return "\n\n".join(f"{title}\n{as_text(table)}" for title, table in titled.items())


def _plain(rate: Any) -> dict[str, Any] | None:
    return None if rate is None else dict(vars(rate))


def _percent_of(value: float, error: float) -> str:
    return percent({"mean": value, "standard_error": error, "n": 1})
