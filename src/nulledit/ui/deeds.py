"""The jobs that pages ask for: each calls `Run` as the command of its name does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nulledit.api.editor import Editor
from nulledit.api.run import Run
from nulledit.data.readers import FactFile
from nulledit.editing.call_log import Progress
from nulledit.editing.reports import ChangeReport, EditReport
from nulledit.errors import LedgerError
from nulledit.evaluation.asking import parting
from nulledit.evaluation.generation import fact_answers
from nulledit.evaluation.outlook import outlook
from nulledit.io.text import count
from nulledit.methods import change_recipe
from nulledit.report.document import Items, Part, StudyTable, Text
from nulledit.runs.change import change_lines
from nulledit.runs.diff import difference_page
from nulledit.runs.document import RunFolder, call_parts
from nulledit.runs.folder import fact_line
from nulledit.runs.gate_report import gate_table
from nulledit.runs.history import answer_of
from nulledit.runs.limits import Limits, load_limits
from nulledit.runs.pages import Result
from nulledit.runs.preview import preview_page
from nulledit.runs.tables import answers_table, outlook_table, rates_tables
from nulledit.ui.work import Follow, Job, Outcome

CHANGES = {
    "undo": ("Undo", "undoing"),
    "redo": ("Redo", "redoing"),
    "restore": ("Restore the base", "restoring the base"),
    "rebuild": ("Rebuild", "rebuilding"),
}
"""What changes the facts in the model without writing new ones -> its button, and its noun."""
MOST_SEEN = 50  # facts of a file that are shown
MOST_SAID = 3  # whose answers are shown before the evaluation


@dataclass(frozen=True)
class Edit:
    """Facts to write, and how."""

    facts: FactFile
    retry: int = 0
    limits: Limits | None = None
    """Keep it only inside these."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted fields of the recipe that are otherwise from here on: another epoch."""
    statistics: str | None = None
    """For that epoch; None: those found."""
    evaluate: bool = True
    old_answers: bool = False

    @property
    def title(self) -> str:
        """What it is of."""
        found = self.facts.facts
        one = found[0]
        return f"{one.subject}: {answer_of(one)}" if len(found) == 1 else count(len(found), "fact")


def ask(prompt: str, target: str, run: Run, job: Job) -> Outcome:
    """One prompt on both models, told as they speak."""
    answer = run.ask(prompt, target or None, heard=job.hear)
    return Outcome(data=(answer, parting(run.editor.editable, answer)))


def look(edit: Edit, run: Run, job: Job) -> Outcome:
    """What is in the facts, and what the model makes of them before it is edited."""
    found = edit.facts
    with job.progress() as tell:
        seen = outlook(run.editor.editable, found.facts, progress=_stage(tell, "answers"))
    counts = [[name.replace("_", " "), str(n)] for name, n in found.counts.items() if n]
    parts: list[Part | str] = [
        StudyTable.of("file", "What is in it", ["", ""], counts),
        outlook_table(seen[:MOST_SEEN]),
        _notices(found.notices),
    ]
    return Outcome(parts, _ways(job, "preview", "write"))


def preview(edit: Edit, run: Run, job: Job) -> Outcome:
    """What the edit would change, written nowhere."""
    other = _is_other(edit, run)
    with run.editor.trial(writing=False) if other else nullcontext():
        if other:
            _begin_epoch(edit, run)
        found = run.preview(edit.facts)
    return Outcome([*preview_page(found), _notices(found.notices)], _ways(job, "write"))


def write(edit: Edit, run: Run, job: Job) -> Outcome:
    """The edit itself. What the model says by then is shown before minutes of evaluation."""
    if not run.new(edit.facts.facts):
        return Outcome([Text("Every fact is in the model already; nothing was written.", "strong")])
    job.upon = partial(_say_now, run, job)
    if _is_other(edit, run):
        job.unsettles = True
        _begin_epoch(edit, run)
    result = run.edit(
        edit.facts,
        retry=edit.retry,
        old_answers=edit.old_answers,
        evaluate=edit.evaluate,
        limits=edit.limits,
    )
    if result is None:
        return Outcome()  # of ranks that keep no run; there is one process here
    asked = {fact.key for fact in edit.facts.facts}
    ids = [c.fact.id for c in run.history.present if c.fact.key in asked]
    written = {line["id"] for line in result.lines}  # with those that were written again for them
    return Outcome(_result(result), _undo([id_ for id_ in ids if id_ in written]))


def retry(times: int, limits: Limits | None, run: Run, _job: Job) -> Outcome:
    """What does not hold, written again."""
    _check_facts(run)
    result = run.retry(times, limits=limits)
    return Outcome([result] if isinstance(result, str) else _result(result))


def foresee(kind: str, ids: Sequence[str], run: Run, job: Job) -> Outcome:
    """What a change would move."""
    with job.progress() as tell:
        report = run.foresee(partial(_change, kind, ids, tell))
    lines = change_lines(report) or ["nothing would change"]
    fields = (("kind", kind), *(("id", id_) for id_ in ids))
    return Outcome(
        [
            Items(tuple(lines), title="What would change"),
            _notices(report.notices),
            Text("Nothing was changed yet.", "quiet"),
        ],
        (Follow(f"{CHANGES[kind][0]} now", "/change", fields),),
    )


def change(kind: str, ids: Sequence[str], run: Run, _job: Job) -> Outcome:
    """A change, and the folder with it."""
    calls = {
        "undo": lambda: run.undo(*ids),
        "redo": lambda: run.redo(*ids),
        "restore": run.restore,
        "rebuild": run.rebuild,
    }
    report: ChangeReport = calls[kind]()
    there = count(len(run.editor.facts), "fact")
    ends = f"Event {len(run.history.events)}; {there} in the model."
    return Outcome(
        [Items(tuple(change_lines(report))), _notices(report.notices), Text(ends, "strong")],
        _redo() if kind in ("undo", "restore") else (),
    )


def gates(run: Run, _job: Job) -> Outcome:
    """The default limits on the model as it is."""
    _check_facts(run)
    report = run.check(load_limits("default"))
    failed = f"{len(report.failed)} of {count(len(report.rows), 'limit')} failed."
    return Outcome(
        [Text("All limits hold." if report.passed else failed, "strong"), gate_table(report)]
    )


def evaluate(run: Run, _job: Job) -> Outcome:
    """Base and edited model on all facts in the model, as they are now."""
    _check_facts(run)
    found = run.evaluate()
    now = found.after.rows()
    then = found.before.rows() if found.before else {}
    lines = [
        fact_line(c, 0, then.get(i), now[i], says_target=found.after.says_target.get(i))
        for c in run.history.present
        if (i := c.fact.id) in now
    ]
    sides = found.summary()
    parts = [answers_table(lines), *rates_tables(sides, text=found.text)]
    return Outcome(parts, data={line["column"]: line for line in lines})


def diff(first: int, second: int, run: Run, _job: Job) -> Outcome:
    """Two points of the ledger."""
    found = run.editor.diff(second, at=first)
    return Outcome(
        difference_page(found, *(f"event {n}" if n else "base" for n in (first, second)))
    )


def _check_facts(run: Run) -> None:
    if not run.editor.facts:
        raise LedgerError("no fact is in the model: write one first")


def _say_now(run: Run, job: Job, report: EditReport) -> None:
    facts = [c.fact for c in report.columns[:MOST_SAID] if not c.fact.forget]
    for fact, said in zip(facts, fact_answers(run.editor.editable, facts), strict=True):
        job.say(f"Written. {fact.render(fact.prompt)} … {said}")


def _change(kind: str, ids: Sequence[str], tell: Progress | None, editor: Editor) -> ChangeReport:
    if kind == "rebuild":
        return editor.rebuild(progress=tell)
    if kind == "restore":
        return editor.restore()
    return editor.undo(*ids) if kind == "undo" else editor.redo(*ids)


def _result(result: Result) -> list[Part | str]:
    run = RunFolder("", result.summary, result.lines, {}, [])
    return list(call_parts(run, result.summary["runs"][-1], folder=str(result.folder)))


def _is_other(edit: Edit, run: Run) -> bool:
    """Whether it asks for another recipe than the run has."""
    recipe = run.editor.recipe
    return bool(edit.changes) and change_recipe(recipe, edit.changes) != recipe


def _begin_epoch(edit: Edit, run: Run) -> None:
    recipe = change_recipe(run.editor.recipe, edit.changes)
    run.editor.next_epoch(recipe, statistics=edit.statistics)


def _notices(notices: Sequence[str]) -> Items:
    return Items(tuple(notices), title="Notices", tone="note", most=MOST_SEEN)


def _ways(job: Job, *ways: str) -> tuple[Follow, ...]:
    names = {"preview": "Preview it", "write": "Write it"}
    given = ("job", str(job.number))
    return tuple(Follow(names[way], "/edit/again", (given, ("do", way))) for way in ways)


def _undo(ids: Sequence[str]) -> tuple[Follow, ...]:
    fields = (("kind", "undo"), *(("id", id_) for id_ in ids))
    return (Follow("See what undoing it would move", "/foresee", fields),) if ids else ()


def _redo() -> tuple[Follow, ...]:
    return (Follow("Take it back", "/change", (("kind", "redo"),)),)


def _stage(tell: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return partial(tell, name) if tell else None
