"""What the edits leave in a layer, and how that gets into a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nulledit.errors import ModelError
from nulledit.linalg.neurons import Neurons
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, holds_weight, write_weight

AT_ONCE = 2**24  # entries of W₀ in float64


@dataclass(frozen=True)
class WeightUpdate:
    """An update of W. What is public here is what any form has to answer.

    W₀ stays in the dtype that the ledger has it in, and W is made when it is asked for: of a
    mixture of experts, or of a large block, one such matrix in float64 takes gigabytes.
    """

    base: Tensor
    """W₀ [d_out, d_in], before any edit."""
    delta: Tensor | None = None
    """Δ [d_out, d_in] of all edits, float64; None: no edit."""

    @property
    def weight(self) -> Tensor:
        """W = W₀ + Δ [d_out, d_in] with the edits, before rounding, float64."""
        base = self.base.double()
        return base if self.delta is None else base + self.delta

    def with_more(self, added: Tensor) -> WeightUpdate:
        """The same with `added` [d_out, d_in] besides."""
        return replace(self, delta=added if self.delta is None else self.delta + added)

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return self.delta is None or math.isfinite(self.delta.sum())  # a sum keeps what is not

    @property
    def change(self) -> Tensor:
        """Δ [d_out, d_in] on the CPU, whose norm tells states apart."""
        if self.delta is None:
            return torch.zeros(self.base.shape, dtype=torch.float64)
        return self.delta.cpu()

    @property
    def norm(self) -> float:
        """‖Δ‖ of all that was added to the layer."""
        return 0.0 if self.delta is None else float(self.delta.norm())

    def times(self, keys: Tensor) -> Tensor:
        """W K [d_out, n] of `keys` K [d_in, n], float64, where W lies."""
        given = keys.to(self.base.device).double()
        found = torch.cat([part.double() @ given for part in self.base.split(self._rows)])
        return found if self.delta is None else found + self.delta @ given

    @property
    def _rows(self) -> int:
        """How many rows are taken at once where no whole W in float64 is to stand in memory."""
        return max(1, AT_ONCE // self.base.shape[1])

    def answer(self, keys: Tensor) -> Tensor:
        """What the layer gives at `keys` [d_in, n]: [d_out, n], float64, on the CPU."""
        return self.times(keys).cpu()

    def added(self, keys: Tensor) -> Tensor:
        """What the edits add to that."""
        if self.delta is None:
            return torch.zeros(len(self.base), keys.shape[1], dtype=torch.float64)
        return (self.delta @ keys.to(self.delta)).cpu()

    def put(self, model: EditableModel, layer: int) -> None:
        """Write it into block `layer` of `model`, rounded once to the model's dtype."""
        write_weight(model.mlp_out(layer), self.weight)

    def take_out(self, model: EditableModel, layer: int) -> None:
        """Write what was there before any edit."""
        write_weight(model.mlp_out(layer), self.base)

    def parameters(self, model: EditableModel, layer: int) -> dict[str, bool]:
        """Name of each parameter that `put` writes -> whether it is still as it was written."""
        return {model.parameter_name(layer): holds_weight(model.mlp_out(layer), self.weight)}

    def rounding(self, model: EditableModel, layer: int) -> float:
        """‖stored − exact‖ of what `put` wrote."""
        deltas = None if self.delta is None else self.delta.split(self._rows)
        stored = as_out_in(model.mlp_out(layer)).split(self._rows)
        total = 0.0
        for i, (rows, base) in enumerate(zip(stored, self.base.split(self._rows), strict=True)):
            exact = base.double() if deltas is None else base.double() + deltas[i]
            total += float((rows.to(exact) - exact).square().sum())
        return math.sqrt(total)

    def stored(self, model: EditableModel, layer: int) -> bytes:
        """What the model has of it, to be hashed; empty where that is what was there before."""
        weight = as_out_in(model.mlp_out(layer)).cpu().contiguous()
        if torch.equal(weight.double(), self.base.cpu().double()):
            return b""
        return weight.view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class NeuronUpdate:
    """Neurons besides the block's own; its keys are the MLP's inputs."""

    base: Tensor
    """W₀ [d_out, d_in], which stays as it is."""
    neurons: Neurons | None
    """Before rounding, float64; None: no fact."""
    activation: str
    """Name of φ."""
    written: Tensor | None = None
    """What they add at the inputs of the last epoch's facts [d_out, n], in their order."""

    @property
    def size(self) -> int:
        """How many neurons."""
        return 0 if self.neurons is None else len(self.neurons.rows)

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        found = self.neurons
        return found is None or all(bool(torch.isfinite(t).all()) for t in _tensors(found))

    @property
    def change(self) -> Tensor:
        """Columns times rows of length 1 [d_out, d] on the CPU, whose norm tells states apart."""
        found = self.neurons
        if found is None:
            return torch.zeros(len(self.base), 1, dtype=torch.float64)
        return (found.columns @ torch.nn.functional.normalize(found.rows, dim=1)).cpu()

    @property
    def norm(self) -> float:
        """0: W stays as it is."""
        return 0.0

    def answer(self, keys: Tensor) -> Tensor:
        """What the neurons give at `keys` [d, n]: [d_out, n], float64, on the CPU."""
        return self.added(keys.double())

    def added(self, keys: Tensor) -> Tensor:
        """The same in the keys' dtype: float32 takes half the time, and no W is to be left over."""
        keys = keys.cpu()
        if self.neurons is None:
            return keys.new_zeros(len(self.base), keys.shape[1])
        given = self.neurons.units(keys, self.activation)
        return self.neurons.columns.to(keys) @ given

    def put(self, model: EditableModel, layer: int) -> None:
        """Give them to block `layer` of `model`, rounded once to the model's dtype."""
        model.form(layer).put(self.neurons)

    def take_out(self, model: EditableModel, layer: int) -> None:
        """Leave the block's own units alone."""
        model.form(layer).put(None)

    def parameters(self, model: EditableModel, layer: int) -> dict[str, bool]:
        """Name of each parameter that `put` writes -> whether it is still as it was written."""
        form = model.form(layer)
        same = form.holds(self.neurons)
        names = {id(p): name for name, p in model.model.named_parameters()}
        return {names[id(p)]: same for p in form.parameters()}

    def rounding(self, model: EditableModel, layer: int) -> float:
        """‖stored − exact‖ of the columns."""
        if self.neurons is None:
            return 0.0
        stored = model.form(layer).columns.to(self.neurons.columns)
        return float((stored - self.neurons.columns).norm())

    def stored(self, model: EditableModel, layer: int) -> bytes:
        """What the model has of it, to be hashed; empty without a fact."""
        if self.neurons is None:
            return b""
        held = (p.data.cpu().contiguous() for p in model.form(layer).parameters())
        return b"".join(t.view(torch.uint8).numpy().tobytes() for t in held)


def _tensors(neurons: Neurons) -> list[Tensor]:
    return [t for t in vars(neurons).values() if t is not None]


LayerEdit = WeightUpdate | NeuronUpdate
"""All that the edits of one layer come to."""


def update_of(edit: LayerEdit) -> WeightUpdate:
    """`edit`, if it is an update of W; ModelError where it is neurons."""
    if isinstance(edit, WeightUpdate):
        return edit
    raise ModelError(
        "gated edits are neurons of their own and leave W as it is, so there is no update of W to "
        "read (`nulledit export` writes the neurons)"
    )
