"""Recorded facts written anew: keys and residuals as they are now, values as they were or again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nulledit.data.facts import Fact
from nulledit.editing.call_log import CallLog
from nulledit.editing.descent import Value
from nulledit.editing.session import EditSession
from nulledit.editing.undo import facts_of
from nulledit.ledger.records import Column, History
from nulledit.ledger.tensors import by_batch
from nulledit.methods import find_method


def replay(
    changes: EditSession,
    source: History,
    columns: Sequence[Column],
    run: CallLog,
    *,
    values: bool = False,
    renamed: dict[Fact, Fact] | None = None,
) -> None:
    """Write `columns` of `source` batch by batch on what is in the model now, in their epochs.

    With their stored z; with `values`, z is optimised again. A fact that meets an older one on its
    key is always optimised again, together with it. `renamed`: facts that take another's place.
    Call it inside `EditSession.transaction`; the columns of the same history must have left before.
    """
    done, now = 0, {c.id for c in columns}
    broken = {(c.batch, c.group) for c in source.active if c.id not in now}  # a mate is left out
    batches = by_batch(columns)
    order = sorted(batches, key=lambda number: (source.batches[number - 1].epoch, number))
    replaces = {c.fact.key: c for c in columns} if source is changes.history else {}
    for number in order:
        mine = batches[number]
        run.tell("facts", done, len(columns))
        epoch = source.epochs[source.batches[number - 1].epoch - 1]
        changes.take_up(epoch, source)
        kept = [] if values else [c for c in mine if (c.batch, c.group) not in broken]
        if find_method(changes.recipe.method.name).by_gradient:
            kept = []  # nothing but the descent itself can be repeated
        kept = _clear(changes, kept, run, renamed or {})
        for part, has_values in ((kept, True), (_without(mine, kept), False)):
            if part:
                facts = [(renamed or {}).get(f, f) for f in facts_of(part)]
                changes.batch(
                    facts,
                    run,
                    given=_Stored(source, part) if has_values else None,
                    replaced={f.key: replaces[f.key] for f in facts if f.key in replaces},
                )
        done += len(mine)


class _Stored:
    """The values of recorded columns, in their order."""

    def __init__(self, source: History, columns: Sequence[Column]):
        self.source, self.columns = source, columns
        self.held = source.tensors[source.batches[columns[0].batch - 1].tensors]

    def __call__(self, layer: int) -> list[Value]:
        name = f"z.{layer}" if f"z.{layer}" in self.held else "z"
        rows: torch.Tensor = self.source.column_tensor(self.columns, name)
        return [Value(z, c.outcome) for z, c in zip(rows, self.columns, strict=True)]


def _clear(
    changes: EditSession, columns: Sequence[Column], run: CallLog, renamed: dict[Fact, Fact]
) -> list[Column]:
    """Those of `columns` whose keys no fact in the model has."""
    facts = facts_of(columns)
    active = changes.history.active
    if not facts or not active:
        return list(columns)
    writer = changes.writer([renamed.get(f, f) for f in facts], run)
    met = {
        facts[request.owner]
        for i, request in enumerate(writer.requests)
        if changes.on_key(writer.first_keys[:, i : i + 1], active)
    }
    groups = {c.group for c in columns if c.fact in met}
    return [c for c in columns if c.group not in groups]


def _without(columns: Sequence[Column], gone: Sequence[Column]) -> list[Column]:
    out = {c.id for c in gone}
    return [c for c in columns if c.id not in out]
