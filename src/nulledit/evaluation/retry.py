"""Facts that do not hold, written again with stronger settings until they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nulledit.changes import some
from nulledit.data.facts import Fact
from nulledit.editing.stronger import differences, stronger
from nulledit.editor import Editor, EditReport
from nulledit.evaluation.diagnosis import holds
from nulledit.evaluation.runner import Progress, evaluate


def retry_failing(
    editor: Editor, facts: Sequence[Fact], times: int = 1, *, progress: Progress | None = None
) -> EditReport:
    """Ask `facts` of the editor's model, and write those again that do not hold.

    At most `times` rounds, each with settings stronger than the one before; facts to forget are
    left out. Each round is one event of the ledger and has a notice that says what was changed. The
    report has no columns where every fact holds.
    """
    report = EditReport((), (), (), {})
    left = [
        replace(fact, paraphrases=(), neighbours=(), portability=())
        for fact in facts
        if not fact.forget
    ]
    for number in range(1, times + 1):
        rows = evaluate(editor, left, progress=progress).rows() if left else {}
        left = [fact for fact in left if not holds(rows[fact.id])]
        if not left:
            break
        values = stronger(editor.recipe.values, number)
        changed = differences(editor.recipe.values, values)
        words = ", ".join(f"{name} {value:g}" for name, value in changed.items())
        notice = f"{some(fact.id for fact in left)}: written again with {words}"
        again = editor.retry(*(fact.id for fact in left), values=values, progress=progress)
        report = joined(report, replace(again, notices=(notice, *again.notices)))
    return report


def joined(first: EditReport, then: EditReport) -> EditReport:
    """Two reports as one; the state is that of the later one, if it changed anything."""
    columns = {c.fact.id: c for c in (*first.columns, *then.columns)}
    stages = {**first.seconds, **then.seconds}
    return EditReport(
        columns=tuple(columns.values()),
        layers=then.layers or first.layers,
        notices=(*first.notices, *then.notices),
        seconds={s: first.seconds.get(s, 0.0) + then.seconds.get(s, 0.0) for s in stages},
        optimised=first.optimised + then.optimised,
    )
