"""One epoch of one layer: what is the same for every kind of method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nulledit.ledger.records import Column, Epoch, History, Ledger
from nulledit.ledger.tensors import recorded
from nulledit.methods import find_method
from nulledit.methods.problem import TargetLoss
from nulledit.models.layer_edit import LayerEdit


@dataclass(frozen=True)
class LayerState:
    """Where the solve of a layer is."""

    edit: LayerEdit
    """What the columns so far leave in the layer."""


State = TypeVar("State", bound=LayerState)


class EpochSolver(ABC, Generic[State]):
    """One epoch of one layer: its method on its batches."""

    width: int
    """Of what stands for a key [d_in]."""

    def __init__(self, ledger: Ledger, epoch: Epoch, layer: int, device: torch.device):
        """`epoch` of `ledger` at `layer`; solves run on `device`."""
        self.ledger, self.epoch, self.layer, self.device = ledger, epoch, layer, device
        self.recipe = epoch.recipe
        self.method = find_method(self.recipe.method.name)
        self.settings = self.method.read(self.recipe.method)

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @abstractmethod
    def fold(self, edit: LayerEdit, before: Sequence[Column], columns: Sequence[Column]) -> State:
        """`columns` of this epoch on the `edit` that epochs before left, with columns `before`."""

    @abstractmethod
    def null_space_shares(self, columns: Sequence[Column]) -> Tensor:
        """Share [n] of the keys of `columns` that edits may use, what text has of it left out."""

    @abstractmethod
    def leakage(self, columns: Sequence[Column]) -> float:
        """Share of what text has in the layer that the edits of `columns` may disturb, 0 to 1."""

    @abstractmethod
    def protected(self, d_in: int) -> int:
        """How many of the d_in directions edits may not use."""

    @abstractmethod
    def room(self, state: State, columns: Sequence[Column]) -> float:
        """Share of the usable directions that `columns`, which `state` holds, have not taken.

        nan where no direction is usable.
        """

    def add(
        self,
        state: State,
        columns: Sequence[Column],
        keys: Tensor,
        targets: Tensor,
        target_loss: TargetLoss | None = None,
    ) -> State:
        """Go on from `state`, which holds `columns`, to new `keys` [d_in, n] with absolute
        `targets` [d_out, n].
        """
        held = self.history.at_layer(self.layer, columns)
        own = [c for c in held if self.history.epoch_of(c) == self.epoch.id]
        before = [c for c in held if self.history.epoch_of(c) != self.epoch.id]
        return self._add(state, before, own, self._exact(keys), self._exact(targets), target_loss)

    def write(
        self,
        state: State,
        columns: Sequence[Column],
        keys: Tensor,
        residual: Tensor | None,
        target_loss: TargetLoss | None = None,
    ) -> tuple[State, dict[str, Tensor]]:
        """Go on from `state`, which holds `columns`, to `residual` [d_out, n] at new `keys`.

        Without a residual the method finds the update by `target_loss`. Also returns what is to be
        recorded: one row per key, in the dtype of `keys`, so that a reloaded ledger solves with
        the same numbers.
        """
        targets = self._targets(state, keys, residual).to(keys.dtype)
        after = self.add(state, columns, keys, targets, target_loss)
        return after, self._rows(keys, targets)

    @abstractmethod
    def _targets(self, state: State, keys: Tensor, residual: Tensor | None) -> Tensor:
        """What is recorded as the target [d_out, n] of new `keys`."""

    @abstractmethod
    def _add(
        self,
        state: State,
        before: Sequence[Column],
        own: Sequence[Column],
        K: Tensor,
        V: Tensor,
        target_loss: TargetLoss | None = None,
    ) -> State:
        """Go on from `state`, which holds the columns `before` this epoch and its `own`."""

    def _rows(self, keys: Tensor, targets: Tensor) -> dict[str, Tensor]:
        named = {"keys": keys, "targets": targets}
        return {f"{name}.{self.layer}": t.mT.contiguous() for name, t in named.items()}

    def _recorded(self, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
        if columns:
            keys, targets = recorded(self.history, columns, self.layer)
            return self._exact(keys), self._exact(targets)
        d_out = len(self.history.original(self.layer))
        return self._exact(torch.empty(self.width, 0)), self._exact(torch.empty(d_out, 0))

    def _exact(self, tensor: Tensor) -> Tensor:
        """In one memory layout, whatever it has: the same columns must give the same bits."""
        return tensor.to(self.device).double().contiguous()
