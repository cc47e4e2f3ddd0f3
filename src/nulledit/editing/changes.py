"""Changes of what is in a model: facts written, taken out, brought back, made anew, taken over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from nulledit.config import ValueSettings
from nulledit.data.facts import Fact
from nulledit.data.readers import FactFile
from nulledit.editing.batching import admitted, batches
from nulledit.editing.call_log import CallLog, Progress
from nulledit.editing.gates import crowded_notice, fact_gates
from nulledit.editing.merge import Decide, conflicts, decided, with_own_ids
from nulledit.editing.replay import replay
from nulledit.editing.reports import ChangeReport, EditReport, by_fact
from nulledit.editing.session import EditSession, check_in_model, some
from nulledit.editing.stronger import stronger
from nulledit.editing.undo import by_group, facts_of, last_undone, newest, plan_redo, plan_undo
from nulledit.errors import ConfigError, FactError, LedgerError
from nulledit.io.settings import check_whole
from nulledit.ledger.records import Column, History
from nulledit.methods import find_method
from nulledit.models.layouts import frozen

NEAR_KEY = 0.9  # cosine of keys above which an undo names an edit as near


def edit(
    session: EditSession,
    given: FactFile,
    batch_size: int | None,
    *,
    shuffle: bool,
    progress: Progress | None,
) -> EditReport:
    """Write facts in batches; see `Editor.edit`."""
    size = session.recipe.batch_size if batch_size is None else batch_size
    check_whole("batch_size", size, least=1)
    run = CallLog(progress)
    run.notices += given.notices
    queue, notices = admitted(session.history, given.facts)
    run.notices += notices
    session.agree(queue)
    if queue:
        with frozen(session.model.model), session.transaction():
            session.open_epoch()
            session.check_rows(queue, run)
            done = 0
            if session.method.one_by_one:
                size = 1
            seed = session.seed if shuffle else None
            alike = session.recipe.batching == "keys" and 1 < size < len(queue)
            keys = session.keys_alone(queue, run) if alike else None
            for batch in batches(queue, size, seed=seed, keys=keys):
                run.tell("batches", done, len(queue))
                kind = "forget" if all(f.forget for f in batch) else "edit"
                session.batch(batch, run, kind=kind)
                done += len(batch)
    return _written(session, queue, run)


def retry(
    session: EditSession,
    ids: Sequence[str],
    *,
    values: ValueSettings | None,
    progress: Progress | None,
) -> EditReport:
    """Write the facts `ids` again, with stronger values; see `Editor.retry`."""
    check_in_model(ids, session.history)
    facts = {fact.id: fact for fact in facts_of(session.history.active)}
    for id_ in ids:
        if facts[id_].forget:
            raise FactError(f"fact {id_!r} is to be forgotten: there is no answer to write")
    if not ids:
        raise LedgerError("no fact to write again was named")
    run = CallLog(progress)
    queue = [facts[id_] for id_ in dict.fromkeys(ids)]
    session.agree(queue)
    with frozen(session.model.model), session.current_epoch(), session.transaction():
        if session.method.by_gradient:
            raise ConfigError(f"{session.method.name} optimises no values: retry can't help")
        found = values or stronger(session.recipe.values)
        if session.method.rewinds:
            found = replace(found, rounds=1)  # its values are of the unedited model
        session.batch(queue, run, kind="retry", values=found)
    return _written(session, queue, run)


def _written(session: EditSession, facts: Sequence[Fact], run: CallLog) -> EditReport:
    """What a call that wrote `facts` did."""
    asked = {fact.id for fact in facts}
    columns = tuple(c for c in session.history.present if c.fact.id in asked)
    layers = session.weights.reports()
    crowded = crowded_notice(fact_gates(session.weights)) if facts else None
    notices = (*run.notices, *([crowded] if crowded else []))
    return EditReport(columns, layers, notices, run.seconds, run.optimised, tuple(run.displaced))


def undo(session: EditSession, ids: Sequence[str]) -> ChangeReport:
    """Take the facts `ids` out; see `Editor.undo`."""
    check_in_model(ids, session.history)
    if not ids:
        raise LedgerError("no fact to undo was named")
    gone = [c for c in session.history.active if c.fact.id in ids]
    with _watched(session, gone) as (report, run), session.transaction():
        plan = plan_undo(session.history, gone, session.near)
        session.carry_out(plan, "undo", run)
        whole = {c.batch for c in gone if _by_gradient(session.history, c)}
        if plan.remade and whole:
            names = some(f"batch {number}" for number in sorted(whole))
            run.notices.append(f"{names}: one update by gradient, undone as a whole")
        left = [f.id for f in facts_of(session.history.active) if f.id in ids]
        if left:
            run.notices.append(
                f"{some(left)}: an earlier answer or wording of this id is back in the model; "
                "undo again to take it out as well"
            )
    return report()


def redo(session: EditSession, ids: Sequence[str]) -> ChangeReport:
    """Bring the facts `ids` back, or all that the last undo took; see `Editor.redo`."""
    history = session.history
    with _watched(session, []) as (report, run), session.transaction():
        if not ids:
            event = last_undone(history)
            by_id = {c.id: c for c in history.columns}
            session.activate(
                "redo",
                on=[by_id[i] for i in event.deactivated],
                off=[by_id[i] for i in event.activated],
            )
            return report()
        wanted = [column for id_ in dict.fromkeys(ids) for column in newest(history, id_)]
        with session.transaction("redo") as trial:
            for group in by_group(wanted):
                session.carry_out(plan_redo(session.history, group, session.near), "redo", run)
            trial.keep()
    return report()


def restore(session: EditSession) -> ChangeReport:
    """Take everything out; see `Editor.restore`."""
    active = session.history.active
    if not active:
        raise LedgerError("no fact is in the model: it is the base already")
    with _watched(session, active) as (report, _), session.transaction():
        session.activate("restore", on=(), off=active)
    return report()


def rebuild(session: EditSession, *, values: bool, progress: Progress | None) -> ChangeReport:
    """Write the facts in the model anew; see `Editor.rebuild`."""
    columns = session.history.active
    if not columns:
        raise LedgerError("no fact is in the model: there is nothing to rebuild")
    together = session.transaction("rebuild")
    with _watched(session, [], progress) as (report, run), together as trial:
        session.journal.commit("rebuild", [], deactivated=columns)
        session.weights.refresh()
        replay(session, session.history, columns, run, values=values)
        trial.keep()
    return report()


def merge(
    session: EditSession, other: History, *, decide: Decide | None, progress: Progress | None
) -> ChangeReport:
    """Take over the facts of another ledger; see `Editor.merge`."""
    choice = decided(conflicts(session.history, other), decide)
    held = session.history.active
    mine = [c for c in held if choice.get(c.fact.key, "first") == "first"]
    here = {c.fact.key for c in held}
    theirs = [
        c
        for c in other.active
        if choice.get(c.fact.key, "first" if c.fact.key in here else "second") == "second"
    ]
    together = session.transaction("merge")
    with _watched(session, [], progress) as (report, run), together as trial:
        names = with_own_ids(session.history, facts_of(theirs))
        run.notices += [f"{a.id}: named {b.id}, the id is taken" for a, b in names.items()]
        session.journal.commit("merge", [], deactivated=held)
        session.weights.refresh()
        replay(session, session.history, mine, run)
        replay(session, other, theirs, run, renamed=names)
        trial.keep()
    return report()


@contextmanager
def _watched(
    session: EditSession, gone: Sequence[Column], progress: Progress | None = None
) -> Iterator[tuple[Callable[[], ChangeReport], CallLog]]:
    """Watch a change; the report is asked for when it is made."""
    history, weights, run = session.history, session.weights, CallLog(progress)
    before = {c.id: c for c in history.active}
    known = len(history.columns)
    written = weights.written()
    out = {c.id for c in gone}
    staying = [c for c in history.active if c.id not in out]
    near = weights.near(gone, staying, cosine=NEAR_KEY) if gone and staying else []

    def report() -> ChangeReport:
        now = {c.id: c for c in session.history.active}
        lost = facts_of(c for i, c in before.items() if i not in now)
        there = {c.fact.id for c in now.values()}
        fresh = facts_of(c for i, c in now.items() if i > known)
        back = facts_of(c for i, c in now.items() if i not in before and i <= known)
        return ChangeReport(
            removed=tuple(f.id for f in lost if f.id not in there),
            restored=tuple(f.id for f in back),
            rebuilt=tuple(f.id for f in fresh),
            near=by_fact(near),
            moved=by_fact(weights.moved(written)),
            notices=tuple(run.notices),
        )

    with frozen(session.model.model), session.current_epoch():
        yield report, run


def _by_gradient(history: History, column: Column) -> bool:
    epoch = history.epochs[history.epoch_of(column) - 1]
    return find_method(epoch.recipe.method.name).by_gradient
