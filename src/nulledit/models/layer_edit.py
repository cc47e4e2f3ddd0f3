"""What the edits leave in a layer, and how that gets into a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, holds_weight, write_weight


class LayerEdit(Protocol):
    """All that the edits of one layer come to, in one of its forms, before rounding.

    A solver makes it, `editing.weights` puts it into the model and asks it what is reported.
    """

    @property
    def base(self) -> Tensor:
        """W₀ [d_out, d_in], before any edit, float64."""
        ...

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in] with the edits, float64."""
        ...

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        ...

    @property
    def norm(self) -> float:
        """‖Δ‖ of all that was added to the layer."""
        ...

    def answer(self, keys: Tensor) -> Tensor:
        """What the layer gives at `keys` [d_in, n]: [d_out, n], float64, on the CPU."""
        ...

    def put(self, model: EditableModel, layer: int) -> None:
        """Write it into block `layer` of `model`, rounded once to the model's dtype."""
        ...

    def take_out(self, model: EditableModel, layer: int) -> None:
        """Write what was there before any edit."""
        ...

    def parameters(self, model: EditableModel, layer: int) -> dict[str, bool]:
        """Name of each parameter that `put` writes -> whether it is still as it was written."""
        ...

    def rounding(self, model: EditableModel, layer: int) -> float:
        """‖stored − exact‖ of what `put` wrote."""
        ...

    def stored(self, model: EditableModel, layer: int) -> bytes:
        """What the model has of it, to be hashed; empty where that is what was there before."""
        ...


@dataclass(frozen=True)
class WeightUpdate:
    """The form that is an update of W."""

    base: Tensor
    """W₀ [d_out, d_in], before any edit, float64."""
    weight: Tensor
    """W [d_out, d_in] with the edits, float64."""

    @property
    def finite(self) -> bool:
        """Whether all of W are numbers."""
        return bool(torch.isfinite(self.weight).all())

    @property
    def norm(self) -> float:
        """‖W − W₀‖."""
        return float((self.weight - self.base).norm())

    def answer(self, keys: Tensor) -> Tensor:
        """W K of `keys` [d_in, n]."""
        return self.weight.cpu() @ keys.double()

    def put(self, model: EditableModel, layer: int) -> None:
        """Write W."""
        write_weight(model.mlp_out(layer), self.weight)

    def take_out(self, model: EditableModel, layer: int) -> None:
        """Write W₀."""
        write_weight(model.mlp_out(layer), self.base)

    def parameters(self, model: EditableModel, layer: int) -> dict[str, bool]:
        """Of W alone."""
        return {model.parameter_name(layer): holds_weight(model.mlp_out(layer), self.weight)}

    def rounding(self, model: EditableModel, layer: int) -> float:
        """Of W."""
        stored = as_out_in(model.mlp_out(layer)).double()
        return float((stored.to(self.weight.device) - self.weight).norm())

    def stored(self, model: EditableModel, layer: int) -> bytes:
        """Of W as [d_out, d_in]."""
        weight = as_out_in(model.mlp_out(layer)).cpu().contiguous()
        if torch.equal(weight.double(), self.base.cpu()):
            return b""
        return weight.view(torch.uint8).numpy().tobytes()
