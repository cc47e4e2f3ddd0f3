"""What the edits leave in a layer, and how that gets into a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, holds_weight, write_weight


@dataclass(frozen=True)
class WeightUpdate:
    """An update of W. What is public here is what any form has to answer."""

    base: Tensor
    """W₀ [d_out, d_in], before any edit, float64."""
    weight: Tensor
    """W [d_out, d_in] with the edits, before rounding, float64."""

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return bool(torch.isfinite(self.weight).all())

    @property
    def norm(self) -> float:
        """‖Δ‖ of all that was added to the layer."""
        return float((self.weight - self.base).norm())

    def answer(self, keys: Tensor) -> Tensor:
        """What the layer gives at `keys` [d_in, n]: [d_out, n], float64, on the CPU."""
        return self.weight.cpu() @ keys.double()

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
        stored = as_out_in(model.mlp_out(layer)).to(self.weight)
        return float((stored - self.weight).norm())

    def stored(self, model: EditableModel, layer: int) -> bytes:
        """What the model has of it, to be hashed; empty where that is what was there before."""
        weight = as_out_in(model.mlp_out(layer)).cpu().contiguous()
        if torch.equal(weight.double(), self.base.cpu()):
            return b""
        return weight.view(torch.uint8).numpy().tobytes()


LayerEdit = WeightUpdate
"""All that the edits of one layer come to. Further forms join here: `WeightUpdate | Other`."""
