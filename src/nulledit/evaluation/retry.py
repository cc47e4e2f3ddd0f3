"""Facts that do not hold, written again with stronger settings until they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.editing.reports import EditReport
from nulledit.editing.session import some
from nulledit.editing.stronger import differences, stronger
from nulledit.errors import ConfigError
from nulledit.evaluation.runner import evaluate, holds
from nulledit.methods import find_method
from nulledit.parallel.ranks import Ranks


def retry_failing(
    editor: EditEngine, facts: Sequence[Fact], times: int = 1, *, progress: Progress | None = None
) -> EditReport:
    """Ask `facts` of the editor's model, and write those again that do not hold.

    At most `times` rounds, each with settings stronger than the one before; facts to forget are
    left out. A round after which no more of `facts` hold is taken back. Each that stays is one
    event of the ledger, with a notice that says what was changed. The report has no
    columns where every fact holds.
    """
    report = EditReport((), editor.weights.reports(), (), {})
    asked = [fact.bare for fact in facts if not fact.forget]
    left = failing_facts(editor, asked, progress)
    for number in range(1, times + 1):
        if not left:
            break
        values = stronger(editor.recipe.values, number)
        if find_method(editor.recipe.method.name).rewinds:  # values of the unedited model
            values = replace(values, rounds=1)
        changed = differences(editor.recipe.values, values)
        words = ", ".join(f"{name} {value:g}" for name, value in changed.items())
        names = some(fact.id for fact in left)
        with editor.trial() as trial:
            again = editor.retry(*(fact.id for fact in left), values=values, progress=progress)
            found = failing_facts(editor, asked, progress)
            if len(found) < len(left):
                trial.keep()
        if trial.kept:
            notices = (f"{names}: written again with {words}", *again.notices)
            report, left = joined(report, replace(again, notices=notices)), found
        else:
            notices = (f"{names}: written again with {words}; no more facts held, so taken back",)
            lost = EditReport((), (), notices, again.seconds, again.optimised)
            report = joined(report, lost)
    return report


def failing_facts(
    editor: EditEngine, facts: Sequence[Fact], progress: Progress | None
) -> list[Fact]:
    """Those of `facts` that do not hold in the editor's model."""
    if not facts:
        return []
    rows = evaluate(editor.editable, facts, progress=progress).rows()
    return [fact for fact in facts if not holds(rows[fact.id])]


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
        displaced=(*first.displaced, *then.displaced),
    )


def check_retry(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what can't be written again, before anything is edited."""
    if not ranks.alone:
        raise ConfigError(
            "--retry works in one process: leave it out here, then call `nulledit retry RUN`"
        )
    check_values(recipe)


def check_values(recipe: Recipe) -> None:
    """ConfigError for a method that optimises no values, which could be made stronger."""
    method = find_method(recipe.method.name)
    if method.by_gradient:
        raise ConfigError(f"a retry makes values stronger, and {method.name} optimises none")
