"""The folder of a run after a change: what is evaluated, kept and written there."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulledit._version import __version__
from nulledit.config import Recipe
from nulledit.editing.engine import EditEngine
from nulledit.editing.reports import EditReport
from nulledit.editing.session import some
from nulledit.errors import LedgerError
from nulledit.evaluation.diagnosis import Diagnosis, diagnose
from nulledit.evaluation.forms import form_name, other_system
from nulledit.evaluation.old_answers import disagreements
from nulledit.evaluation.preservation import Preservation
from nulledit.evaluation.queries import Query
from nulledit.evaluation.runner import Evaluation
from nulledit.io.text import count
from nulledit.ledger.records import Column
from nulledit.ledger.store import Store
from nulledit.runs import folder as folder_of
from nulledit.runs.history import answer_of
from nulledit.runs.measure import Text, evaluate_both, in_chat_as_well, in_other_forms
from nulledit.runs.talk import Talk
from nulledit.runs.warnings import warnings_of


@dataclass(frozen=True, repr=False)
class Result:
    """What one run did."""

    folder: Path
    summary: dict[str, Any]
    """The content of `summary.json`."""
    lines: list[dict[str, Any]]
    """This run's lines of `results.jsonl`."""

    def __repr__(self) -> str:
        return f"<Result in {self.folder}: {count(len(self.lines), 'fact')}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {"run_folder": str(self.folder), **self.summary, "results": self.lines}


def check_fresh(folder: Path) -> None:
    """Raise LedgerError unless a run may begin in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise LedgerError(f"{folder}: is a file; choose another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    store = Store(folder / "ledger")
    alone = {p.name for p in folder.iterdir()} == {"ledger"}
    if alone and store.unfinished:
        return  # killed while it was made
    if not store.exists:
        raise LedgerError(f"{folder}: is not empty; choose another folder")
    if alone and not store.load().events:
        return  # killed before its first batch was finished
    raise LedgerError(
        f"{folder}: holds a run already; go on by --continue {folder}, or choose another --out"
    )


def check_pages(folder: Path) -> None:
    """Raise ReportError for pages of a run that could not be gone on with after an edit."""
    folder_of.read_lines(folder)
    folder_of.read_json(folder, "summary.json", None)
    folder_of.read_json(folder, "environment.json", [])


def finish(
    editor: EditEngine,
    folder: Path,
    report: EditReport,
    text: Text | None,
    seconds: dict[str, float],
    talk: Talk,
) -> Result:
    """Evaluate what has no line in `results.jsonl` yet, and write the folder."""
    present = {c.id for c in editor.history.active}
    earlier = [
        line | {"active": line["column"] in present} for line in folder_of.read_lines(folder)
    ]
    told = {line["column"] for line in earlier}
    columns = [c for c in editor.history.present if c.id not in told]
    runs = folder_of.read_json(folder, "summary.json", {"runs": []})["runs"]
    number = len(runs) + 1
    before = after = None
    moved: list[tuple[Query, bool]] = []
    kept: dict[int, Preservation] = {}
    others: dict[str, dict[str, Any]] = {}
    if text and columns:
        facts = count(len(columns), "fact")
        talk.say(f"Evaluating {facts} on the base and the edited model")
        with timed(seconds, "evaluation"):
            both = evaluate_both(editor, [c.fact for c in columns], text, talk)
            before, after, moved = both.before, both.after, both.moved()
            kept = {p.layer: p for p in both.preservation}
            other = other_system(editor.editable.encoder)
            asked = {form_name(other): editor.editable.asked(other)} if other else {}
            others = in_chat_as_well(editor, both)
            others |= in_other_forms(editor, [c.fact for c in columns], asked, talk)
    warnings = warnings_of(report.layers)
    for warning in warnings:
        talk.say(f"Warning: {warning}")
    if answers := _replaced(editor, columns):
        talk.say(f"Note: {answers}")
    notices = disagreements([c.fact for c in columns], before) if before else []
    for notice in notices:
        talk.say(f"Note: {notice}")
    found = diagnose(editor, [c.fact for c in columns], after, before=before) if after else ()
    lines = _lines(columns, number, before, after, found, moved)
    batches = sorted({c.batch for c in columns})
    layers = [r.to_dict() | _error(kept.get(r.layer)) for r in report.layers]
    runs.append(
        {
            "run": number,
            "time": folder_of.now(),
            "facts": len(columns),
            "known": _known(columns),
            "batches": [batches[0], batches[-1]] if batches else [],
            "before": before.summary() if before else None,
            "after": after.summary() if after else None,
            "text": text.name if text and after else None,
            **({"asked": form_name(editor.editable.encoder), "others": others} if others else {}),
            "layers": layers,
            "displaced": [displaced.to_dict() for displaced in report.displaced],
            "state": editor.history.state_id,
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "notices": [*report.notices, *notices, *warnings],
        }
    )
    summary = {**_state(editor), "runs": runs}
    environments = folder_of.read_json(folder, "environment.json", [])
    folder_of.write_run(
        folder,
        recipe=_recipe(editor).to_yaml(),
        environments=[*environments, {"run": number, **folder_of.environment(editor)}],
        lines=[*earlier, *lines],
        summary=summary,
    )
    return Result(folder, summary, lines)


def is_current(editor: EditEngine, folder: Path) -> bool:
    """Whether the pages of a run are of its ledger's state, as an interruption may prevent."""
    summary = folder_of.read_json(folder, "summary.json", None)
    return bool(summary) and summary["state"] == editor.history.state_id


def write_derived(editor: EditEngine, folder: Path) -> None:
    """Bring the model and the pages of a run to its ledger, after a change that edits nothing."""
    editor.keep_model(folder)
    summary = folder_of.read_json(folder, "summary.json", None)
    if summary is None:
        return
    present = {c.id for c in editor.history.active}
    lines = folder_of.read_lines(folder)
    folder_of.write_run(
        folder,
        recipe=_recipe(editor).to_yaml(),
        environments=folder_of.read_json(folder, "environment.json", []),
        lines=[line | {"active": line["column"] in present} for line in lines],
        summary=summary | _state(editor),
    )


def _replaced(editor: EditEngine, columns: Sequence[Column]) -> str:
    """One line on the answers of earlier edits that `columns` took the place of; empty for none."""
    by_id = {c.id: c.fact for c in editor.history.columns}
    answers = {
        (new.id, answer_of(old), answer_of(new))
        for old, new in ((by_id.get(c.replaces), c.fact) for c in columns)
        if old is not None and old.demand != new.demand
    }
    if not answers:
        return ""
    told = some((f"{i}: {old!r} -> {new!r}" for i, old, new in sorted(answers)), most=3)
    return f"{count(len(answers), 'earlier answer')} replaced ({told})"


def _state(editor: EditEngine) -> dict[str, Any]:
    return {
        "version": __version__,
        "state": editor.history.state_id,
        "base": editor.history.base.to_dict(),
        "facts": len(editor.facts),
        "batches": len(editor.history.batches),
    }


def _recipe(editor: EditEngine) -> Recipe:
    """Of the current epoch, whatever is to come next; before the first, of the one to open."""
    epochs = editor.history.epochs
    return epochs[-1].recipe if epochs else editor.recipe


def _known(columns: Sequence[Column]) -> int | None:
    """How many facts the model said before; None where the method never asked it."""
    told = [c.outcome.known for c in columns]
    return None if None in told else told.count(True)


def _error(kept: Preservation | None) -> dict[str, Any]:
    if kept is None:
        return {"error": None, "error_standard_error": None, "windows": None}
    return {
        "error": kept.error,
        "error_standard_error": kept.standard_error,
        "windows": kept.n,
    }


def _lines(
    columns: Sequence[Column],
    number: int,
    before: Evaluation | None,
    after: Evaluation | None,
    found: Sequence[Diagnosis],
    moved: Sequence[tuple[Query, bool]],
) -> list[dict[str, Any]]:
    if before is None or after is None:
        return [folder_of.fact_line(c, number, None, None, says_target=None) for c in columns]
    then, now = before.rows(), after.rows()
    of_fact: dict[str, list[tuple[Query, bool]]] = defaultdict(list)
    for query, right in moved:
        of_fact[query.fact_id].append((query, right))
    why = {diagnosis.fact_id: diagnosis.to_dict() for diagnosis in found}
    return [
        folder_of.fact_line(
            column,
            number,
            then[column.fact.id],
            now[column.fact.id],
            says_target=after.says_target.get(column.fact.id),
            diagnosis=why.get(column.fact.id),
            moved=of_fact[column.fact.id],
        )
        for column in columns
    ]


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the wall seconds inside to `seconds[stage]`, also where it ends in an error."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
