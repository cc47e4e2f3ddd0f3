"""PEFT's adapters on a model: which linear maps get one, putting it on and taking it off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nulledit.errors import ConfigError, ModelError
from nulledit.models.partial import PartialModel

Target = Literal["attention", "mlp", "mlp_out"]


class Adapter:
    """A fresh LoRA on a model; `remove` leaves the model as it was, to the bit.

    Made with PEFT's LoraModel rather than its PeftModel, which also sets a field of the model's
    config and may leave a hook on the embeddings behind.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], *, rank: int, alpha: float):
        """Wrap the linear maps `names`: A is drawn from the global random state, B is 0."""
        peft = import_peft()
        self._wanted = [(p, p.requires_grad) for p in model.parameters()]
        self._modes = [(m, m.training) for m in model.modules()]
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=list(names),
            fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        )
        self._model = model
        self._tuner: Any = peft.LoraModel(model, config, "default")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.parameters:  # Adam's small steps would be lost in half precision
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(wide)
        model.eval()  # no dropout: what a batch is trained on doesn't hang on chance

    def remove(self) -> None:
        """Take it off: modules, gradients wanted and modes are as before."""
        self._tuner.unload()
        for parameter, wanted in self._wanted:
            parameter.requires_grad_(wanted)
        for module, mode in self._modes:
            module.training = mode
        if "peft_config" in vars(self._model):  # left behind by older versions
            del self._model.peft_config
        self.parameters = []


def linear_modules(
    model: PartialModel, targets: Sequence[Target], layers: Sequence[int] | None
) -> list[str]:
    """Full names of the linear maps of `layers` (None: all) that `targets` asks for.

    The MLP is what stands beside or below the module W that writes its output; every other linear
    map of a block counts as attention's.
    """
    layout, blocks = model.layout, model.blocks
    chosen = range(len(blocks)) if layers is None else layers
    names = []
    for layer in chosen:
        if not 0 <= layer < len(blocks):
            raise ModelError(
                f"layer {layer} is out of range: the model has layers 0 to {len(blocks) - 1}"
            )
        for name, module in blocks[layer].named_modules():
            if isinstance(module, nn.Linear | Conv1D) and is_wanted(name, layout.mlp_out, targets):
                names.append(f"{layout.blocks}.{layer}.{name}")
    if not names:
        raise ModelError(f"found no linear maps of {', '.join(targets)} in the model's blocks")
    return names


def is_wanted(name: str, mlp_out: str, targets: Sequence[Target]) -> bool:
    """Whether `targets` asks for the block's module `name`."""
    if name == mlp_out:
        return "mlp_out" in targets or "mlp" in targets
    parent = mlp_out.rpartition(".")[0]
    in_mlp = name.startswith(parent + ".") if parent else "." not in name
    return ("mlp" if in_mlp else "attention") in targets


def refuse_adapted(model: PreTrainedModel) -> None:
    """ModelError if `model` carries an adapter of PEFT's already."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError("the model has an adapter already; close or unload that one first")


def import_peft() -> Any:
    """PEFT, or a ConfigError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("the LoRA baseline needs PEFT: pip install nulledit[lora]") from error
    return peft
