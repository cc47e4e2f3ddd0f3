"""The few matrices that edits are written into, made ready for it; nothing else is touched."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nulledit.config import Layout
from nulledit.errors import ModelError
from nulledit.models.dense import Dense, dense_of, is_quantised
from nulledit.models.experts import is_experts
from nulledit.models.layouts import frozen, mlp_out, parameter_name
from nulledit.models.placement import follow, input_device, make_resident

logger = logging.getLogger(__name__)

TOKENS = 16  # that a quantised matrix and what is read from it are compared on


def make_editable(
    model: PreTrainedModel, layout: Layout, layers: Sequence[int], base_hash: str
) -> None:
    """Make W of `layers` matrices that can be written: resident, and dense.

    An offloaded one is brought to where it works and stays. A quantised one is replaced in `model`
    by a dense one, read from how it acts; `base_hash` is the model's hash before. ModelError where
    one does not act as a matrix.
    """
    paths = {layer: parameter_name(model, layout, layer).rpartition(".")[0] for layer in layers}
    modules = {layer: mlp_out(model, layout, layer) for layer in layers}
    packed = [
        i for i, m in modules.items() if is_quantised(m) and _is_leaf(m) and not is_experts(m)
    ]
    for layer in modules.keys() - set(packed):
        make_resident(model, paths[layer])
    if not packed:
        return
    made = (m.base_hash for m in model.modules() if isinstance(m, Dense))
    base_hash = next(made, base_hash)
    examples = _inputs(model, {i: modules[i] for i in packed})
    for layer in packed:
        if layer not in examples:
            raise ModelError(f"layer {layer}: its matrix is not run by the model")
        path, old = paths[layer], modules[layer]
        new, missed = dense_of(old, examples.pop(layer), base_hash, path)
        follow(new, old)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
        logger.info(
            "%s is quantised (%s): made dense in %s to be edited; it acts otherwise by %.2g of "
            "its output",
            path,
            type(old).__name__,
            str(new.weight.dtype).removeprefix("torch."),
            missed,
        )


def has_dense(model: nn.Module) -> bool:
    """Whether a quantised matrix of `model` was made dense."""
    return any(isinstance(module, Dense) for module in model.modules())


def refuse_dense(model: nn.Module, what: str) -> None:
    """ModelError if `model` is a quantised base with matrices made dense: it can't be `what`."""
    if has_dense(model):
        raise ModelError(
            f"the base is quantised, so it can't be {what}: the edits lie beside it; give them on "
            "by `nulledit export RUN --as lora` or `--as delta`"
        )


def _is_leaf(module: nn.Module) -> bool:
    """Whether `module` keeps numbers itself, as a matrix does, and is no part made of others."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(own) and not any(True for _ in module.children())


@torch.no_grad()
def _inputs(model: PreTrainedModel, modules: dict[int, nn.Module]) -> dict[int, Tensor]:
    """What each of `modules` is given for a few tokens [rows, d_in]."""
    found: dict[int, Tensor] = {}
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(min(TOKENS, vocabulary), device=input_device(model))[None]
    with frozen(model), ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_pre_hook(_keep(found, layer))
            stack.callback(handle.remove)
        model(input_ids=ids, use_cache=False)
    return found


def _keep(found: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found[layer] = args[0].detach().reshape(-1, args[0].shape[-1])

    return hook
