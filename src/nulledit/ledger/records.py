"""What a ledger records: the base, epochs, batches, columns and events.

The weights are a function of these and nothing else: W = round(W₀ + fold of the active columns).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.errors import LedgerError

if TYPE_CHECKING:
    from torch import Tensor  # reading what was recorded needs no torch


@dataclass(frozen=True, repr=False)
class Base:
    """The model before any edit."""

    model: str
    """Name, folder or Hub id that it was loaded from; empty for an object in memory."""
    hash: str
    """Hash of its weights."""
    dtype: str
    """Its dtype."""
    stored: dict[str, Any]
    """The recipe that its first epoch is to have, as it was stored."""
    seed: int
    """The seed that its first epoch is to have."""
    quantized: str = ""
    """How its edited matrices were quantised: "4bit" or "8bit" as it was loaded, "own" in the
    checkpoint itself; empty where they are plain. A quantised base is kept by reference: the run
    holds the ledger and no model."""
    revision: str = ""
    """Branch, tag or commit on the Hub that was asked for; empty: none was."""
    file_sha256: str = ""
    """Hash of the GGUF file that it was converted from; empty: it came otherwise."""

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that its first epoch is to have."""
        return Recipe.recorded(self.stored)

    def __repr__(self) -> str:
        return f"<Base {self.model or 'in memory'}, {self.dtype}: {self.hash[:12]}>"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From what `to_dict` gives."""
        return cls(**{"stored" if k == "recipe" else k: v for k, v in data.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {"recipe" if k == "stored" else k: v for k, v in asdict(self).items()}
        for name in ("revision", "file_sha256"):  # as in ledgers that are older than these fields
            if not plain[name]:
                del plain[name]
        return plain


@dataclass(frozen=True, repr=False)
class Epoch:
    """A run of batches with one method, one filter and one set of statistics."""

    id: int
    """Counted from 1."""
    stored: dict[str, Any]
    """The recipe as resolved, as it was stored: the state's id is made of it."""
    seed: int
    """Seed of contexts and queues."""
    contexts: tuple[str, ...]
    """Prefix contexts of all its batches."""
    statistics: dict[str, Any]
    """Manifest of the statistics."""
    tensors: str
    """SHA-256 of the file with the spectrum of each layer, and W₀ of those edited first here."""

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe as resolved."""
        return Recipe.recorded(self.stored)

    def __repr__(self) -> str:
        return f"<Epoch {self.id}: {self.recipe!r}>"

    @property
    def method(self) -> str:
        """The name of its method, as stored: who only reads the story needs no whole recipe."""
        return self.stored["method"]["name"]

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that it edits, as stored."""
        return tuple(self.stored["layers"])


@dataclass(frozen=True)
class Batch:
    """Columns that were made together."""

    id: int
    """Counted from 1."""
    epoch: int
    """Its epoch."""
    tensors: str
    """SHA-256 of the file with keys, targets and z, one row per column in order."""


@dataclass(frozen=True)
class ValueOutcome:
    """How the value of a fact was reached. None: a method by gradient optimises none."""

    loss: float
    """Last loss seen: NLL + KL + decay; by gradient the targets' loss."""
    nll: float | None = None
    """Mean negative log-likelihood of the target per token over the rewriting rows, nats; of a fact
    to forget, the distance from what it should say (`unlearning.unlearned`)."""
    steps: int | None = None
    """Updates of δ made."""
    delta_share: float | None = None
    """‖δ‖/‖h‖; of several rounds, their sum."""
    known: bool | None = None
    """Whether the model already said the target by strict argmax before any step; None: not
    asked."""
    ended: str = ""
    """Why the descent ended: `done`, `likeliest` (ENCORE's early stop), `patience`, or `steps`,
    which were used up. Empty in ledgers that are older than this field."""
    lead: float | None = None
    """Nats by which the target's weakest token leads its strongest rival, over all rows; below 0:
    somewhere a rival is in its place. None for a fact to forget."""
    clamped: bool = False
    """Whether δ is as long as the clamp lets it be."""
    shared: int = 1
    """Facts on the same key that this δ must say together."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of values that were not the recipe's, in a retry."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From what a ledger holds; names that it does not know are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: held for name, held in data.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        if self.steps is None:
            return {"loss": self.loss, "known": self.known}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return plain | ({"settings": dict(self.settings)} if self.settings else {})


@dataclass(frozen=True, repr=False)
class Column:
    """One fact's key and target value in every edited layer, as one batch made them."""

    id: int
    """Counted from 1 over the whole ledger."""
    batch: int
    """The batch that made it."""
    row: int
    """Its row in the batch's tensors."""
    group: int
    """Columns of one batch that stand or fall together (facts on one key, chunks of one target)
    have one group, the id of its first column."""
    fact: Fact
    """The request."""
    outcome: ValueOutcome
    """How the value was reached."""
    replaces: int = 0
    """The column that this one stands in for: an older answer to the same question, or the same
    fact's before it was optimised again; else 0. Undoing it brings an older answer back."""
    part: int = 0
    """Number of the chunk that a long target was cut into, from 0; one column holds each."""

    def __repr__(self) -> str:
        return f"<Column {self.id}, batch {self.batch}: {self.fact!r}>"


@dataclass(frozen=True)
class Event:
    """One change of which columns are active."""

    id: int
    """Counted from 1."""
    kind: str
    """edit, retry, forget, undo, redo, restore, rebuild or merge."""
    time: str
    """UTC, ISO 8601."""
    activated: tuple[int, ...]
    """Columns that became active."""
    deactivated: tuple[int, ...]
    """Columns that no longer are."""


@dataclass(frozen=True, repr=False)
class History:
    """Everything recorded, in memory; a change makes another one.

    Tensors are named by the SHA-256 of the file that holds them, and are never changed.
    """

    base: Base
    """The model before any edit."""
    epochs: tuple[Epoch, ...] = ()
    """In order."""
    batches: tuple[Batch, ...] = ()
    """In order."""
    columns: tuple[Column, ...] = ()
    """In order."""
    events: tuple[Event, ...] = ()
    """In order."""
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """SHA-256 -> named tensors."""

    def __repr__(self) -> str:
        counts = f"{len(self.events)} events, {len(self.active)} active columns"
        return f"<History of {self.base!r}: {counts}>"

    def with_epoch(self, epoch: Epoch, tensors: Mapping[str, Tensor]) -> History:
        """This history with another epoch, which has no batch yet."""
        named = {**self.tensors, epoch.tensors: tensors}
        return replace(self, epochs=(*self.epochs, epoch), tensors=named)

    def without_empty_epochs(self) -> History:
        """This history without epochs at its end that got no batch."""
        used = max((batch.epoch for batch in self.batches), default=0)
        return replace(self, epochs=self.epochs[:used])

    def after(
        self,
        kind: str,
        made: Sequence[Column] = (),
        *,
        on: Sequence[Column] = (),
        off: Sequence[Column] = (),
        digest: str = "",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> History:
        """This history and one event: columns `made` and `on` become active, `off` inactive.

        With `tensors`, whose file has the hash `digest`, those made are a batch of the last epoch.
        """
        changed = replace(self, columns=(*self.columns, *made))
        if tensors is not None:
            batch = Batch(len(self.batches) + 1, len(self.epochs), digest)
            named = {**self.tensors, digest: tensors}
            changed = replace(changed, batches=(*self.batches, batch), tensors=named)
        active = {c.id for c in (*on, *made)}
        return changed._with_event(kind, active, {c.id for c in off}, self.active_ids)

    def as_one_event(self, kind: str, before: History) -> History:
        """This history, with all events since `before` as one; none if nothing changed."""
        joined = replace(self, events=before.events)
        now, then = self.active_ids, before.active_ids
        return joined if now == then else joined._with_event(kind, now - then, then - now, then)

    def _with_event(
        self, kind: str, on: Set[int], off: Set[int], before: frozenset[int]
    ) -> History:
        """`before`: ids of the columns that are active without the event."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        made = Event(len(self.events) + 1, kind, time, tuple(sorted(on)), tuple(sorted(off)))
        changed = replace(self, events=(*self.events, made))
        # What folding all events again would give; a stream of n facts would fold n²/2 of them.
        vars(changed)["active_ids"] = (before - off) | on
        return changed

    @cached_property
    def active_ids(self) -> frozenset[int]:
        """Ids of the columns that are part of the model now: what the events leave."""
        return self._active_after(len(self.events))

    def _active_after(self, event: int) -> frozenset[int]:
        on: set[int] = set()
        for entry in self.events[:event]:
            on.difference_update(entry.deactivated)
            on.update(entry.activated)
        return frozenset(on)

    @cached_property
    def active(self) -> list[Column]:
        """Columns that are part of the model now, in the order they were made."""
        return [c for c in self.columns if c.id in self.active_ids]

    def is_active(self, column: Column) -> bool:
        """Whether `column` is part of the model now."""
        return column.id in self.active_ids

    def active_as_of(self, event: int) -> list[Column]:
        """Columns that were part of the model after event number `event`; 0: none."""
        on = self._active_after(event)
        return [c for c in self.columns if c.id in on]

    @property
    def present(self) -> list[Column]:
        """One active column per fact in the model, in order."""
        return [c for c in self.active if c.part == 0]

    @property
    def epoch(self) -> Epoch:
        """The epoch that batches belong to now; LedgerError if there is none."""
        if not self.epochs:
            raise LedgerError("nothing was edited yet: the ledger has no epoch")
        return self.epochs[-1]

    def epoch_of(self, column: Column) -> int:
        """Id of the epoch that made `column`."""
        return self.batches[column.batch - 1].epoch

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that some epoch edits, in order."""
        return tuple(sorted({layer for e in self.epochs for layer in e.layers}))

    def at_layer(self, layer: int, columns: Sequence[Column]) -> list[Column]:
        """Those of `columns` that have a key at `layer`: their epoch edits it."""
        has = {e.id for e in self.epochs if layer in e.layers}
        return [c for c in columns if self.epoch_of(c) in has]

    def original(self, layer: int) -> Tensor:
        """W₀ [d_out, d_in] of `layer`, in the base's dtype."""
        for epoch in self.epochs:
            if layer in epoch.layers:
                return self.tensors[epoch.tensors][f"base.{layer}"]
        raise LedgerError(f"no epoch edits layer {layer}")

    def lacks(self, facts: Sequence[Fact]) -> list[Fact]:
        """Those of `facts` that are not in the model yet."""
        held = {column.fact.key: column.fact for column in self.active}

        def there(fact: Fact) -> bool:
            known = held.get(fact.key)
            if known is None or known.demand != fact.demand:
                return False
            return set(fact.prompts) <= set(known.prompts)

        return [fact for fact in facts if not there(fact)]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Numbers of epochs, batches, columns and events."""
        return len(self.epochs), len(self.batches), len(self.columns), len(self.events)

    @property
    def state_id(self) -> str:
        """Identifies the weights: base, and active columns with their epochs, in hex."""
        digest = hashlib.sha256(self.base.hash.encode())
        hashes = {b.id: b.tensors for b in self.batches}
        for epoch in self.epochs:
            mine = [c for c in self.active if self.epoch_of(c) == epoch.id]
            if mine:  # an epoch without an active column leaves no trace in the weights
                recipe = json.dumps(epoch.stored, sort_keys=True)
                digest.update(f"{epoch.tensors} {recipe}\n".encode())
            for column in mine:
                digest.update(f"{hashes[column.batch]} {column.row}\n".encode())
        return digest.hexdigest()

    def column_tensor(self, columns: Sequence[Column], name: str) -> Tensor:
        """Rows `name` (`keys.4`, `targets.4`, `z`) of `columns`, stacked [n, d]."""
        import torch

        hashes = {b.id: b.tensors for b in self.batches}
        return torch.stack([self.tensors[hashes[c.batch]][name][c.row] for c in columns])


class Ledger(Protocol):
    """Whatever has the history as it is now."""

    @property
    def history(self) -> History:
        """Everything recorded so far."""
