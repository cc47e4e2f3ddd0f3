"""The edits in a model: always what the active columns come to, rounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from nulledit.errors import LedgerError, ModelError
from nulledit.io.text import count
from nulledit.ledger.epoch_solver import LayerState
from nulledit.ledger.records import Column, History, Ledger
from nulledit.ledger.solver import LayerSolver
from nulledit.ledger.tensors import recorded
from nulledit.ledger.update_solver import UpdateSolver
from nulledit.linalg.angles import unit_columns
from nulledit.linalg.preconditioner import Preconditioner
from nulledit.methods.problem import TargetLoss
from nulledit.models.accepted import refuse_adapters
from nulledit.models.editable_model import EditableModel
from nulledit.models.layer_edit import LayerEdit, NeuronUpdate, update_of
from nulledit.models.layouts import as_out_in
from nulledit.models.unchanged import bit_sums
from nulledit.models.widths import one_width


@dataclass(frozen=True, eq=False, repr=False)
class Written:
    """What edits write at the keys of columns."""

    layer: int | None
    """None: nothing is edited."""
    columns: Sequence[Column]
    added: Tensor
    """By column [d_out, n], on the CPU."""


@dataclass(frozen=True, repr=False)
class LayerReport:
    """What the edits do to one layer."""

    layer: int
    """Block number."""
    protected: int
    """Directions that edits may not use, of d_in."""
    d_in: int
    """Width of the keys."""
    free_share: float
    """Mean ‖Pk‖²/‖k‖² of the edit keys: the share that edits may use; nan without edits."""
    free_share_error: float
    """Its standard error over the edited facts; nan for fewer than two."""
    n: int
    """Edited facts."""
    update_share: float
    """‖Δ‖/‖W₀‖ of all edits so far."""
    rounding_share: float
    """‖rounding‖/‖Δ‖: what storing in the model's dtype costs."""
    room: float
    """1 − tr(KᵀGK (I + KᵀGK)⁻¹) / rank G: the share of the usable directions that no edit has
    taken yet; 1 without edits, nan where no direction is usable."""
    neurons: int | None = None
    """Those of gated edits, beside the block's own d_in; None for other methods."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; neurons are left out where there are none to be."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __repr__(self) -> str:
        moved = f"‖Δ‖/‖W₀‖ {self.update_share:.3g}, room left {self.room:.3g}"
        return f"<LayerReport of layer {self.layer}, {count(self.n, 'fact')}: {moved}>"


class EditedWeights:
    """Keeps the edits in a model in step with a history."""

    def __init__(self, model: EditableModel, ledger: Ledger):
        """`ledger` may have no epoch yet; then nothing is edited."""
        self.model, self.ledger = model, ledger
        self._solvers: dict[int, LayerSolver] = {}
        self._states: dict[int, LayerState] = {}
        self._sums = bit_sums(model.model)
        try:
            self.refresh()
        except BaseException:
            self.return_to({})  # nobody has this object, who could
            raise

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @property
    def first(self) -> int:
        """The first block that the current epoch edits."""
        return self.history.epoch.recipe.layers[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """Edited blocks."""
        return self.history.layers

    def edit(self, layer: int) -> LayerEdit:
        """What the edits leave in `layer`, before rounding."""
        return self._states[layer].edit

    def exact(self, layer: int) -> Tensor:
        """The weight [d_out, d_in] of `layer` before rounding, float64; ModelError if it is not
        W that the edits change."""
        return update_of(self.edit(layer)).weight

    def base(self, layer: int) -> Tensor:
        """W₀ [d_out, d_in] of `layer`, float64, on the CPU."""
        return self._solver(layer).base.cpu().double()

    def projector(self, layer: int) -> Preconditioner:
        """P of `layer`, on the null space of its preserved keys; ModelError for gated edits."""
        solver = self._solver(layer).latest
        if not isinstance(solver, UpdateSolver):
            raise ModelError(
                f"{solver.method.name} has no null space: its gates are closed on text"
            )
        return solver.preconditioners.projector

    def leakage(self, layer: int) -> float:
        """Share of the preserved keys' energy that edits of `layer` may disturb, 0 to 1."""
        columns = self.history.at_layer(layer, self.history.active)
        return self._solver(layer).latest.leakage(columns)

    def digest(self) -> str:
        """Hash of the model as it is: the base's, and what differs from it.

        Values of W's own output are of one W, which a recipe may name.
        """
        digest = sha256(self.history.base.hash.encode())
        if self.model.values_at_output:
            digest.update(self.model.layout.mlp_out.encode())
        for layer in self.layers:
            if stored := self.edit(layer).stored(self.model, layer):
                digest.update(f"{layer}".encode() + stored)
        return digest.hexdigest()

    def refresh(self, columns: Sequence[Column] | None = None) -> None:
        """Set every edited layer to the fold of `columns` (the active ones by default)."""
        chosen = self.history.active if columns is None else columns
        for layer in self.layers:
            self._set(layer, self._solver(layer).fold(chosen))
        self._forget(set(self._states) - set(self.layers))

    def _forget(self, layers: set[int]) -> None:
        """Take the edits out of layers that no epoch edits any more."""
        for layer in layers:
            self._states.pop(layer).edit.take_out(self.model, layer)
            del self._solvers[layer]

    def check_unchanged(self) -> None:
        """LedgerError if something else wrote to the model: an edit would undo or misjudge that."""
        model, edited = self.model.model, set()
        refuse_adapters(model)
        for layer in self._states:
            for name, as_written in self.edit(layer).parameters(self.model, layer).items():
                edited.add(name)
                if not as_written:
                    raise LedgerError(
                        f"{name}: was changed by something else since it was last written, and "
                        "would be overwritten; to keep the change, make a new Editor of the model "
                        "as it is (what was edited becomes part of its base); to drop it, call "
                        "editor.weights.refresh()"
                    )
        sums = bit_sums(model)
        others = (self._sums.keys() | sums.keys()) - edited
        changed = sorted(n for n in others if sums.get(n) != self._sums.get(n))
        if changed:
            raise LedgerError(
                f"{len(changed)} of the parameters that no edit writes were changed by something "
                f"else since the editor took the model ({changed[0]} for one), so it is no longer "
                "the base of its ledger: make a new Editor of the model as it is (what was edited "
                "becomes part of its base), or load it again"
            )

    @contextmanager
    def as_saved(self) -> Iterator[dict[str, int]]:
        """The model as its files have it inside; each edited parameter's layer by its name."""
        names = {n: i for i in self.layers for n in self.edit(i).parameters(self.model, i)}
        with one_width(self.model.model, self.model.forms()) if self.grown else nullcontext():
            yield names

    @property
    def grown(self) -> bool:
        """Whether edits change the model's shape."""
        return any(isinstance(state.edit, NeuronUpdate) for state in self._states.values())

    @contextmanager
    def holding(self, columns: Sequence[Column]) -> Iterator[None]:
        """Only `columns` in the weights inside; afterwards the very states of before."""
        self.check_unchanged()
        states = self.states()
        try:
            self.refresh(columns)
            yield
        finally:
            self.return_to(states)

    def states(self) -> dict[int, LayerState]:
        """Where each layer stands, for `return_to`."""
        return dict(self._states)

    def return_to(self, states: dict[int, LayerState]) -> None:
        """Set every edited layer as it was when `states` were taken; others to W₀."""
        for layer, state in states.items():
            self._set(layer, state)
        self._forget(set(self._states) - set(states))

    def write(
        self,
        layer: int,
        columns: Sequence[Column],
        keys: Tensor,
        residual: Tensor | None,
        *,
        target_loss: TargetLoss | None = None,
    ) -> dict[str, Tensor]:
        """Edit `layer`, which holds `columns`: `residual` [d_out, n] at new `keys` [d_in, n].

        Without a residual the method finds the update by `target_loss`. Returns what is to be
        recorded, in the dtype that it is stored in.
        """
        before, keys = self._states[layer], keys.to(self.record_dtype)
        solver = self._solver(layer).latest
        state, rows = solver.write(before, columns, keys, residual, target_loss)
        if not state.edit.finite:
            raise LedgerError(
                f"the update of layer {layer} is not finite and was not kept: load the model in "
                "float32 or bfloat16, or protect more (a larger method.l2 or method.moment_weight)"
            )
        self._set(layer, state)
        return rows

    def batches(self, layer: int) -> Iterator[tuple[list[Column], LayerState, LayerState]]:
        """Each batch in the model in turn, with the states of `layer` before and after it."""
        return self._solver(layer).batches(self.history.active)

    def recorded(self, columns: Sequence[Column], layer: int) -> tuple[Tensor, Tensor]:
        """Keys [d_in, n] and absolute targets [d_out, n] of those of `columns` that have them."""
        return recorded(self.history, self.history.at_layer(layer, columns), layer)

    def _solver(self, layer: int) -> LayerSolver:
        if layer not in self._solvers:
            self._solvers[layer] = LayerSolver(self.ledger, layer, self._solve_device(layer))
        return self._solvers[layer]

    @property
    def record_dtype(self) -> torch.dtype:
        """What keys and targets are kept in: float32, or float64 for a float64 model."""
        return torch.float64 if self.model.model.dtype == torch.float64 else torch.float32

    def reports(self) -> tuple[LayerReport, ...]:
        """The state of each layer."""
        return tuple(self._report(layer) for layer in self.layers)

    def near(
        self, columns: Sequence[Column], others: Sequence[Column], *, cosine: float
    ) -> list[tuple[Column, float]]:
        """Those of `others` whose first-layer key is within `cosine` of one of `columns`'."""
        if not columns or not others:
            return []
        mine, _ = self.recorded(columns, self.first)
        return self.near_keys(mine, others, cosine=cosine)

    def near_keys(
        self, keys: Tensor, others: Sequence[Column], *, cosine: float
    ) -> list[tuple[Column, float]]:
        """Those of `others` whose first-layer key is within `cosine` of one of `keys` [d_in, n].

        A column of an epoch that does not edit the current first layer has no key to compare.
        """
        others = self.history.at_layer(self.first, others)
        if not others or not keys.shape[1]:
            return []
        theirs, _ = self.recorded(others, self.first)
        best = (unit_columns(theirs).mT @ unit_columns(keys)).max(1).values.tolist()
        found = [(c, value) for c, value in zip(others, best, strict=True) if value > cosine]
        return sorted(found, key=lambda pair: -pair[1])

    def written(self) -> Written:
        """What the edits have written in the last layer at the keys of the active columns."""
        if not self.layers:
            return Written(None, [], torch.empty(0, 0))
        layer = self.layers[-1]
        edit, columns = self.edit(layer), self.history.at_layer(layer, self.history.active)
        known = edit.written if isinstance(edit, NeuronUpdate) else None
        epoch = self._solver(layer).latest.epoch.id if known is not None else None
        own = [c for c in columns if self.history.epoch_of(c) == epoch]
        others = [c for c in columns if self.history.epoch_of(c) != epoch]
        parts = [edit.added(self.recorded(others, layer)[0])] if others else []
        if known is not None:
            parts.append(known.cpu().to(self.record_dtype))
        added = torch.cat(parts, dim=1) if parts else torch.empty(len(edit.base), 0)
        return Written(layer, others + own, added)

    def moved(self, before: Written) -> list[tuple[Column, float]]:
        """How columns moved that were active `before` and still are, in the last layer.

        ‖change at the key‖ over ‖what the edits had written there‖, largest first.
        """
        now = self.written()
        if now.layer != before.layer:
            return []
        places = {column.id: i for i, column in enumerate(before.columns)}
        both = [i for i, column in enumerate(now.columns) if column.id in places]
        columns = [now.columns[i] for i in both]
        written = before.added[:, [places[column.id] for column in columns]]
        change = now.added[:, both] - written
        shares = (change.norm(dim=0) / written.norm(dim=0).clamp_min(1e-12)).tolist()
        return sorted(zip(columns, shares, strict=True), key=lambda pair: -pair[1])

    def _set(self, layer: int, state: LayerState) -> None:
        self._states[layer] = state
        state.edit.put(self.model, layer)

    def _solve_device(self, layer: int) -> torch.device:
        """Where the layer's weights are, unless float64 is missing there."""
        device = as_out_in(self.model.mlp_out(layer)).device
        return torch.device("cpu") if device.type == "mps" else device

    def _report(self, layer: int) -> LayerReport:
        solver, edit = self._solver(layer).latest, self.edit(layer)
        columns = self.history.at_layer(layer, self.history.active)
        shares = solver.null_space_shares(columns)
        n = len({c.fact for c in columns})
        norm, d_in = edit.norm, edit.base.shape[1]
        return LayerReport(
            layer=layer,
            protected=solver.protected(d_in),
            d_in=d_in,
            free_share=float(shares.mean()) if n else math.nan,
            free_share_error=float(shares.std()) / n**0.5 if n > 1 else math.nan,
            n=n,
            update_share=norm / float(torch.linalg.vector_norm(edit.base, dtype=torch.float64)),
            rounding_share=edit.rounding(self.model, layer) / norm if norm else 0.0,
            room=solver.room(self._states[layer], columns),
            neurons=edit.size if isinstance(edit, NeuronUpdate) else None,
        )
