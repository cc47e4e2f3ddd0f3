"""What a ledger tells without its model: its events, and the story of one fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nulledit.data.facts import Fact, suggest
from nulledit.editing.undo import facts_of
from nulledit.errors import LedgerError
from nulledit.ledger.records import Column, Event, History
from nulledit.report.document import StudyTable

NEAR = 0.9  # cosine of keys above which another edit is named as near
SHOWN = 3  # facts named on a line of the log


def events_of(history: History) -> list[dict[str, Any]]:
    """One entry per event: what went in and out, by which method, and how much was there then."""
    by_id = {c.id: c for c in history.columns}
    told = []
    present: set[int] = set()
    for event in history.events:
        on = [by_id[i] for i in event.activated]
        off = [by_id[i] for i in event.deactivated]
        before = {by_id[i].fact.id for i in present}
        present = (present - set(event.deactivated)) | set(event.activated)
        after = {by_id[i].fact.id for i in present}
        epochs = sorted({history.epoch_of(c) for c in (on or off)})
        told.append(
            {
                "event": event.id,
                "time": event.time,
                "kind": event.kind,
                "methods": [history.epochs[e - 1].method for e in epochs],
                "batches": sorted({c.batch for c in on}),
                "in": [f.id for f in facts_of(on) if f.id not in before],
                "out": [f.id for f in facts_of(off) if f.id not in after],
                "again": [f.id for f in facts_of(on) if f.id in before],
                "facts": len(after),
            }
        )
    return told


def log_table(events: Sequence[dict[str, Any]]) -> StudyTable:
    """`events_of` as a table."""
    rows: list[Sequence[str]] = []
    for event in events:
        change = [
            f"{sign}{_few(event[name])}"
            for sign, name in (("+ ", "in"), ("− ", "out"), ("again ", "again"))
            if event[name]
        ]
        rows.append(
            [
                str(event["event"]),
                event["time"].removesuffix("+00:00").replace("T", " "),
                event["kind"],
                ", ".join(dict.fromkeys(event["methods"])),
                "; ".join(change),
                str(event["facts"]),
            ]
        )
    head = ["event", "time (UTC)", "what", "method", "facts", "in the model"]
    return StudyTable.of("log", "", head, rows)


def facts_table(history: History) -> StudyTable:
    """The facts in the model."""
    rows: list[Sequence[str]] = [
        [c.fact.id, c.fact.render(c.fact.prompt), answer_of(c.fact), str(c.batch)]
        for c in history.present
    ]
    return StudyTable.of("facts", "", ["id", "prompt", "answer", "batch"], rows)


def facts_in(history: History) -> list[dict[str, Any]]:
    """The records of the facts in the model, each with its batch."""
    return [{**c.fact.to_dict(), "batch": c.batch} for c in history.present]


def story_of(history: History, id_: str) -> dict[str, Any]:
    """All that the ledger knows of the fact `id_`; LedgerError if it knows none of that id."""
    mine = [c for c in history.columns if c.fact.id == id_]
    if not mine:
        known = [c.fact.id for c in history.columns]
        raise LedgerError(f"no fact {id_!r} in the ledger{suggest(id_, known)}")
    by_id = {c.id: c for c in history.columns}
    last = next((c for c in reversed(mine) if history.is_active(c)), mine[-1])
    gate = _gate_of(history, id_)
    return {
        "id": id_,
        "in_the_model": any(map(history.is_active, mine)),
        "fact": last.fact.to_dict(),
        "versions": [_version(history, c, by_id) for c in mine],
        "events": [
            {"event": e.id, "time": e.time, "kind": e.kind, "change": _change(e, mine)}
            for e in history.events
            if {c.id for c in mine} & {*e.activated, *e.deactivated}
        ],
        "near": [{"id": name, "cosine": cosine} for name, cosine in near_of(history, last)],
        **({"gate": gate} if gate else {}),
    }


def _gate_of(history: History, id_: str) -> dict[str, Any] | None:
    """Its nearest rival and what the neurons miss of it; None where no gate of it is there."""
    from nulledit.editing.gates import recorded_gates  # with torch

    found = next((gate for gate in recorded_gates(history) if gate.fact_id == id_), None)
    return vars(found) if found else None


def near_of(history: History, column: Column) -> list[tuple[str, float]]:
    """Other facts in the model on nearly the same first-layer key: (id, cosine), nearest first."""
    from nulledit.linalg.angles import unit_columns  # with torch

    layer = history.epochs[history.epoch_of(column) - 1].layers[0]
    others = [c for c in history.at_layer(layer, history.active) if c.fact.id != column.fact.id]
    if not others:
        return []
    name = f"keys.{layer}"
    key = unit_columns(history.column_tensor([column], name).mT.double())
    cosines = unit_columns(history.column_tensor(others, name).mT.double()).mT @ key
    best: dict[str, float] = {}
    for other, cosine in zip(others, cosines.squeeze(1).tolist(), strict=True):
        if cosine > NEAR:
            best[other.fact.id] = max(cosine, best.get(other.fact.id, 0.0))
    return sorted(best.items(), key=lambda pair: -pair[1])


def story_text(story: dict[str, Any]) -> str:
    """`story_of` for a terminal."""
    fact = Fact.from_dict(story["fact"])
    place = "in the model" if story["in_the_model"] else "taken out"
    lines = [
        f"{fact.id}: {place}",
        f"prompt   {fact.render(fact.prompt)}",
        f"answer   {answer_of(fact)}",
    ]
    for name, value in (("before", fact.old_answer), ("relation", fact.relation)):
        if value is not None:
            lines.append(f"{name:8} {value}")
    for version in story["versions"]:
        lines.append(
            f"column {version['column']}: batch {version['batch']}, {version['method']}, layers "
            f"{', '.join(map(str, version['layers']))}{'' if version['active'] else ', not active'}"
        )
        lines += [f"    {line}" for line in _details(version)]
    for event in story["events"]:
        lines.append(f"event {event['event']}, {event['time']}: {event['kind']}, {event['change']}")
    if gate := story.get("gate"):
        beside = f", nearest rival {gate['rival']} (share {gate['share']:.2g})" * bool(
            gate["rival"]
        )
        lines.append(f"gate: {100 * gate['missed']:.0f} % of its value missed{beside}")
    for other in story["near"]:
        lines.append(f"near: {other['id']} (cosine of keys {other['cosine']:.3f})")
    return "\n".join(lines)


def answer_of(fact: Fact) -> str:
    """What the edit has the model say."""
    return f"not {fact.target}" if fact.forget else fact.target


def _version(history: History, column: Column, by_id: dict[int, Column]) -> dict[str, Any]:
    epoch = history.epochs[history.epoch_of(column) - 1]
    mates = [
        c.fact.id
        for c in history.columns
        if (c.batch, c.group) == (column.batch, column.group) and c.fact.id != column.fact.id
    ]
    older = by_id.get(column.replaces)
    newer = [c for c in history.columns if c.replaces == column.id]
    return {
        "column": column.id,
        "batch": column.batch,
        "epoch": epoch.id,
        "method": epoch.method,
        "layers": list(epoch.layers),
        "active": history.is_active(column),
        "answer": answer_of(column.fact),
        "replaces": None if older is None else {"id": older.fact.id, "column": older.id},
        "replaced_by": [
            {"id": c.fact.id, "column": c.id, "answer": answer_of(c.fact)} for c in newer
        ],
        "with": list(dict.fromkeys(mates)),
        "outcome": column.outcome.to_dict(),
    }


def _details(version: dict[str, Any]) -> list[str]:
    found, lines = version["outcome"], []
    measures = [
        f"{label} {found[name]:.3g}"
        for name, label in (("loss", "loss"), ("steps", "steps"), ("delta_share", "‖δ‖/‖h‖"))
        if isinstance(found.get(name), int | float)
    ]
    if measures:
        lines.append(", ".join(measures))
    if version["replaces"]:
        lines.append(
            f"in place of {version['replaces']['id']} (column {version['replaces']['column']})"
        )
    for newer in version["replaced_by"]:
        lines.append(f"replaced by {newer['id']} (column {newer['column']}): {newer['answer']}")
    if version["with"]:
        lines.append(f"one value with {_few(version['with'])}")
    return lines


def _change(event: Event, columns: Sequence[Column]) -> str:
    mine = {c.id for c in columns}
    on, off = mine & set(event.activated), mine & set(event.deactivated)
    return "made anew" if on and off else "came in" if on else "left"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
