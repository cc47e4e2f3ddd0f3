"""Where each model family keeps its decoder blocks and the matrix that writes the MLP's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nulledit.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """Paths of one family, by `config.model_type`."""

    blocks: str
    """Path from the causal language model to the list of decoder blocks."""
    mlp_out: str
    """Path from a block to the module W that writes the MLP's output into the residual stream."""


LAYOUTS = {
    "llama": Layout("model.layers", "mlp.down_proj"),
    "gpt2": Layout("transformer.h", "mlp.c_proj"),
    "gptj": Layout("transformer.h", "mlp.fc_out"),
}


def find_layout(model: PreTrainedModel) -> Layout:
    """The layout of `model`, or a ModelError that lists the known families."""
    family = model.config.model_type
    if family not in LAYOUTS:
        raise ModelError(
            f"model type {family!r} has no layout; known: {', '.join(sorted(LAYOUTS))}. "
            "To add one, see docs/add-an-architecture.md"
        )
    return LAYOUTS[family]


def mlp_out(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module W of block `layer` (counted from 0)."""
    layout = find_layout(model)
    blocks = model.get_submodule(layout.blocks)
    assert isinstance(blocks, nn.ModuleList)
    if not 0 <= layer < len(blocks):
        raise ModelError(
            f"layer {layer} is out of range: the model has layers 0 to {len(blocks) - 1}"
        )
    return blocks[layer].get_submodule(layout.mlp_out)


def parameter_name(model: PreTrainedModel, layer: int) -> str:
    """Name of W's parameter of block `layer` in the state dict."""
    layout = find_layout(model)
    return f"{layout.blocks}.{layer}.{layout.mlp_out}.weight"


def as_out_in(module: nn.Module) -> Tensor:
    """The module's weight as a view [d_out, d_in], whichever way the module stores it.

    By the module's type, not its shape: GPT-2's Conv1D stores [d_in, d_out], and a square weight
    would accept the wrong orientation silently.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"{type(module).__name__} has no weight matrix that can be edited")
    if not weight.is_floating_point():
        raise ModelError(
            f"the weight is stored as {weight.dtype}: a quantised matrix can't be edited in place; "
            "load the model in float32, bfloat16 or float16"
        )
    return weight.data.mT if isinstance(module, Conv1D) else weight.data


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Round `weight` [d_out, d_in] to the module's dtype, once, and store it."""
    view = as_out_in(module)
    if weight.shape != view.shape:
        raise ValueError(f"expected a weight {tuple(view.shape)}, found {tuple(weight.shape)}")
    view.copy_(weight)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for weights inside; both as before afterwards."""
    was_training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(was_training)
