"""Which columns a change takes out, brings back as they were, or has to make anew.

Facts on one key share a value, so they stand or fall together: a group that loses or gains a member
becomes the stored group of exactly the facts that it has then, or is optimised again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nulledit.data.facts import Fact
from nulledit.errors import LedgerError
from nulledit.ledger.records import Column, Event, History

Near = Callable[[Sequence[Column], Sequence[Column]], Sequence[Column]]
"""Those of the second on the same first-layer key as one of the first."""


@dataclass(frozen=True)
class Plan:
    """A change of which columns are active."""

    dropped: tuple[Column, ...] = ()
    """Active columns that leave."""
    restored: tuple[Column, ...] = ()
    """Older columns that come back as they were."""
    remade: tuple[Column, ...] = ()
    """Columns whose facts are to be optimised again together; the new ones stand in for them."""


def plan_undo(history: History, gone: Sequence[Column], near: Near) -> Plan:
    """Without the active columns `gone`: what they replaced comes back, their mates stay."""
    dropped = with_groups(gone, history.active)
    out = {c.id for c in gone}
    staying = _without(history.active, dropped)
    restored: list[Column] = []
    remade: list[Column] = []
    for group in by_group(dropped):
        back = [c for c in group if c.id not in out]
        replaced = answers_replaced(history, [c for c in group if c.id in out])
        back += replaced
        version = stored_version(history, facts_of(back), replaced) if back else []
        if version is None or near(version, staying + restored):
            remade += back
        else:
            restored += version
    return Plan(tuple(dropped), tuple(restored), tuple(remade))


def plan_redo(history: History, wanted: Sequence[Column], near: Near) -> Plan:
    """With the inactive columns `wanted`, one group: another answer to the same question leaves."""
    asked = {c.fact.key for c in wanted}
    active = history.active
    leaving = with_groups([c for c in active if c.fact.key in asked], active)
    leaving = [*leaving, *with_groups(near(wanted, _without(active, leaving)), active)]
    mates = [c for c in _once(leaving) if c.fact.key not in asked]
    version = stored_version(history, facts_of([*wanted, *mates]))
    if version is None or near(version, _without(active, leaving)):
        return Plan(tuple(_once(leaving)), (), (*wanted, *mates))
    return Plan(tuple(_once(leaving)), tuple(version))


def last_undone(history: History) -> Event:
    """The newest event that took columns out and whose outcome is what is active now.

    LedgerError if there is none: nothing was undone, or something else happened since.
    """
    now = [c.id for c in history.active]
    for event in reversed(history.events):
        if event.kind in ("undo", "restore"):
            if [c.id for c in history.active_as_of(event.id)] == now:
                return event
        elif event.kind != "redo":
            break
    raise LedgerError(
        "nothing to redo: the last change is no undo; name the facts that are to come back"
    )


def check_id(id_: object) -> None:
    """LedgerError for what is no fact's id, such as the fact itself."""
    if not isinstance(id_, str):
        raise LedgerError(f"expected the ids of facts, as text (found a {type(id_).__name__})")


def newest(history: History, id_: str) -> list[Column]:
    """The latest columns of the fact `id_`; LedgerError if it is unknown or in the model."""
    check_id(id_)
    columns = [c for c in history.columns if c.fact.id == id_]
    if not columns:
        raise LedgerError(f"no fact {id_!r} in the ledger")
    if any(map(history.is_active, columns)):
        raise LedgerError(f"fact {id_!r} is in the model")
    last = columns[-1]
    return [c for c in columns if (c.batch, c.fact) == (last.batch, last.fact)]


def with_groups(columns: Sequence[Column], among: Sequence[Column]) -> list[Column]:
    """All of `among` that share a group with one of `columns`."""
    hit = {(c.batch, c.group) for c in columns}
    return [c for c in among if (c.batch, c.group) in hit]


def by_group(columns: Iterable[Column]) -> list[list[Column]]:
    """Columns that stand or fall together."""
    groups: dict[tuple[int, int], list[Column]] = {}
    for column in columns:
        groups.setdefault((column.batch, column.group), []).append(column)
    return list(groups.values())


def facts_of(columns: Iterable[Column]) -> list[Fact]:
    """Their facts, each once."""
    return list(dict.fromkeys(column.fact for column in columns))


def stored_version(
    history: History, facts: Sequence[Fact], replaced: Sequence[Column] = ()
) -> list[Column] | None:
    """Inactive columns made together for exactly `facts`, newest first.

    `replaced`: answers that are to be these very columns or re-makings of them. The same answer
    given once more later stands in for another one, and undoing it would lead in a circle.
    """
    by_id = {c.id: c for c in history.columns}
    wanted = {(c.fact, _origin(c, by_id)) for c in replaced}
    for columns in reversed(by_group(history.columns)):
        if {c.fact for c in columns} != set(facts) or any(map(history.is_active, columns)):
            continue
        if wanted <= {(c.fact, _origin(c, by_id)) for c in columns}:
            return columns
    return None


def answers_replaced(history: History, columns: Sequence[Column]) -> list[Column]:
    """The older answers that `columns` stand in for, through all their re-makings."""
    by_id = {c.id: c for c in history.columns}
    found = []
    for column in columns:
        older = by_id.get(column.replaces)
        while older is not None and older.fact == column.fact:
            older = by_id.get(older.replaces)
        if older is not None:
            found.append(older)
    return found


def _origin(column: Column, by_id: Mapping[int, Column]) -> int:
    """Id of the column that `column` is a re-making of, through all of them; its own if of none."""
    older = by_id.get(column.replaces)
    while older is not None and older.fact == column.fact:
        column, older = older, by_id.get(older.replaces)
    return column.id


def _once(columns: Iterable[Column]) -> list[Column]:
    return list({c.id: c for c in columns}.values())


def _without(columns: Sequence[Column], gone: Sequence[Column]) -> list[Column]:
    out = {c.id for c in gone}
    return [c for c in columns if c.id not in out]
