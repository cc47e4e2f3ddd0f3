"""What a ledger records: the base, epochs, batches, columns and events.

The weights are a function of these and nothing else: W = round(W₀ + fold of the active columns).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.errors import LedgerError


@dataclass(frozen=True)
class Base:
    """The model before any edit."""

    model: str
    """Name, folder or Hub id that it was loaded from; empty for an object in memory."""
    hash: str
    """Hash of its weights."""
    dtype: str
    """Its dtype."""
    recipe: dict[str, Any]
    """The recipe that its first epoch is to have."""
    seed: int
    """The seed that its first epoch is to have."""
    quantized: str = ""
    """How its edited matrices were quantised: "4bit" or "8bit" as it was loaded, "own" in the
    checkpoint itself; empty where they are plain. A quantised base is kept by reference: the run
    holds the ledger and no model."""


@dataclass(frozen=True)
class Epoch:
    """A run of batches with one method, one filter and one set of statistics."""

    id: int
    """Counted from 1."""
    recipe: dict[str, Any]
    """The recipe as resolved."""
    seed: int
    """Seed of contexts and queues."""
    contexts: tuple[str, ...]
    """Prefix contexts of all its batches."""
    statistics: dict[str, Any]
    """Manifest of the statistics."""
    tensors: str
    """SHA-256 of the file with the spectrum of each layer, and W₀ of those edited first here."""


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
    active: bool
    """Whether it is part of the model now."""
    outcome: dict[str, Any]
    """How the value was reached: loss, steps, ‖δ‖/‖h‖, whether the model knew it already."""
    replaces: int = 0
    """The column that this one stands in for: an older answer to the same question, or the same
    fact's before it was optimised again; else 0. Undoing it brings an answer behind it back."""
    part: int = 0
    """Number of the chunk that a long target was cut into, from 0; one column holds each."""


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


@dataclass
class History:
    """Everything recorded, in memory. Tensors by the SHA-256 of the file that holds them."""

    base: Base
    """The model before any edit."""
    epochs: list[Epoch] = field(default_factory=list)
    """In order."""
    batches: list[Batch] = field(default_factory=list)
    """In order."""
    columns: list[Column] = field(default_factory=list)
    """In order."""
    events: list[Event] = field(default_factory=list)
    """In order."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """SHA-256 -> named tensors."""

    @property
    def active(self) -> list[Column]:
        """Columns that are part of the model now, in the order they were made."""
        return [c for c in self.columns if c.active]

    def active_as_of(self, event: int) -> list[Column]:
        """Columns that were part of the model behind event number `event`; 0: none."""
        on: set[int] = set()
        for entry in self.events[:event]:
            on = (on - set(entry.deactivated)) | set(entry.activated)
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
        return tuple(sorted({layer for e in self.epochs for layer in e.recipe["layers"]}))

    def at_layer(self, layer: int, columns: Sequence[Column]) -> list[Column]:
        """Those of `columns` that have a key at `layer`: their epoch edits it."""
        has = {e.id for e in self.epochs if layer in e.recipe["layers"]}
        return [c for c in columns if self.epoch_of(c) in has]

    def original(self, layer: int) -> Tensor:
        """W₀ [d_out, d_in] of `layer`, in the base's dtype."""
        for epoch in self.epochs:
            if layer in epoch.recipe["layers"]:
                return self.tensors[epoch.tensors][f"base.{layer}"]
        raise LedgerError(f"no epoch edits layer {layer}")

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
                recipe = json.dumps(epoch.recipe, sort_keys=True)
                digest.update(f"{epoch.tensors} {recipe}\n".encode())
            for column in mine:
                digest.update(f"{hashes[column.batch]} {column.row}\n".encode())
        return digest.hexdigest()

    def column_tensor(self, columns: Sequence[Column], name: str) -> Tensor:
        """Rows `name` (`keys.4`, `targets.4`, `z`) of `columns`, stacked [n, d]."""
        hashes = {b.id: b.tensors for b in self.batches}
        return torch.stack([self.tensors[hashes[c.batch]][name][c.row] for c in columns])
