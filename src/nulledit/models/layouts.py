"""Where each model family keeps its decoder blocks and the matrix that writes the MLP's output."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nulledit.config import Layout
from nulledit.errors import ModelError
from nulledit.models.dense import is_quantised
from nulledit.models.experts import is_experts, side_by_side, stacked, width_written
from nulledit.models.layout_tracing import probe

logger = logging.getLogger(__name__)


LAYOUTS = {
    "cohere": Layout("model.layers", "mlp.down_proj"),
    "deepseek_v2": Layout("model.layers", "mlp.experts"),
    "deepseek_v3": Layout("model.layers", "mlp.experts"),
    "falcon": Layout("transformer.h", "mlp.dense_4h_to_h"),
    "falcon_h1": Layout("model.layers", "feed_forward.down_proj"),
    "gemma": Layout("model.layers", "mlp.down_proj"),
    "gemma2": Layout("model.layers", "mlp.down_proj", "normed"),
    "gemma3_text": Layout("model.layers", "mlp.down_proj", "normed"),
    "glm4": Layout("model.layers", "mlp.down_proj", "normed"),
    "glm4_moe": Layout("model.layers", "mlp.experts"),
    "glm4_moe_lite": Layout("model.layers", "mlp.experts"),
    "gpt2": Layout("transformer.h", "mlp.c_proj"),
    "gpt_neo": Layout("transformer.h", "mlp.c_proj"),
    "gpt_neox": Layout("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "gpt_oss": Layout("model.layers", "mlp.experts"),
    "gptj": Layout("transformer.h", "mlp.fc_out"),
    "granite": Layout("model.layers", "mlp.down_proj", "scaled"),
    "lfm2": Layout("model.layers", "feed_forward.w2"),
    "llama": Layout("model.layers", "mlp.down_proj"),
    "llama4_text": Layout("model.layers", "feed_forward.experts"),
    "minimax": Layout("model.layers", "mlp.experts"),
    "minimax_m2": Layout("model.layers", "mlp.experts"),
    "ministral": Layout("model.layers", "mlp.down_proj"),
    "ministral3": Layout("model.layers", "mlp.down_proj"),
    "mistral": Layout("model.layers", "mlp.down_proj"),
    "mixtral": Layout("model.layers", "mlp.experts"),
    "olmo2": Layout("model.layers", "mlp.down_proj", "normed"),
    "olmo3": Layout("model.layers", "mlp.down_proj", "normed"),
    "opt": Layout("model.decoder.layers", "fc2"),
    "phi3": Layout("model.layers", "mlp.down_proj"),
    "qwen2": Layout("model.layers", "mlp.down_proj"),
    "qwen2_moe": Layout("model.layers", "mlp.experts"),
    "qwen3": Layout("model.layers", "mlp.down_proj"),
    "qwen3_5_moe_text": Layout("model.layers", "mlp.experts"),
    "qwen3_5_text": Layout("model.layers", "mlp.down_proj"),
    "qwen3_moe": Layout("model.layers", "mlp.experts"),
    "qwen3_next": Layout("model.layers", "mlp.experts"),
    "smollm3": Layout("model.layers", "mlp.down_proj"),
    "stablelm": Layout("model.layers", "mlp.down_proj"),
}
"""By `config.model_type`."""


def find_layout(model: PreTrainedModel) -> Layout:
    """The layout of the model's family, else what tracing finds, which the log reports.

    ModelError where there is no matrix that could be edited.
    """
    family = model.config.model_type
    if family in LAYOUTS:
        return LAYOUTS[family]
    found = probe(model)
    logger.warning(
        "model type %r is not in the table of architectures; tracing found its blocks at %s and "
        "the MLP's output matrix at %s, which enters the residual stream %s",
        family,
        found.blocks,
        found.mlp_out,
        found.output,
    )
    return found


def check_layout(model: PreTrainedModel, layout: Layout) -> Layout:
    """`layout`, if the model has such modules; else a ModelError says what is there.

    It is enough that some blocks have W: those that are edited must.
    """
    blocks = blocks_of(model, layout)
    if not _holding(blocks, layout):
        _inside(blocks, layout, 0)  # says what is there
    return layout


def is_family_matrix(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether `layout` reads the W that the table names for the model's family."""
    known = LAYOUTS.get(model.config.model_type)
    return known is not None and known.mlp_out == layout.mlp_out


def blocks_of(model: PreTrainedModel, layout: Layout) -> nn.ModuleList:
    """The decoder blocks; ModelError if there are none where `layout` has them."""
    try:
        found = model.get_submodule(layout.blocks)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList) or not len(found):
        lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise ModelError(
            f"layout.blocks: {type(model).__name__} has no list of blocks at {layout.blocks}; its "
            f"lists of modules: {', '.join(lists[:5]) or 'none'}"
        )
    return found


def holding(model: PreTrainedModel, layout: Layout) -> list[int]:
    """The layers whose blocks have the layout's W."""
    return _holding(blocks_of(model, layout), layout)


def _holding(blocks: nn.ModuleList, layout: Layout) -> list[int]:
    return [i for i, block in enumerate(blocks) if layout.mlp_out in dict(block.named_modules())]


def _inside(blocks: nn.ModuleList, layout: Layout, layer: int) -> nn.Module:
    try:
        return blocks[layer].get_submodule(layout.mlp_out)
    except AttributeError:
        others = _holding(blocks, layout)
        width = _width(blocks[others[0]].get_submodule(layout.mlp_out)) if others else None
        matrices = [
            name
            for name, module in blocks[layer].named_modules()
            if _is_matrix(module) and width in (None, _width(module))
        ]
        own = ", ".join(matrices) or "none"
        raise ModelError(
            f"layout.mlp_out: block {layer} has no module {layout.mlp_out}; "
            + (
                f"{listed(others)} have it: edit none but these, or give the recipe a layout with "
                f"a matrix that all edited blocks have (block {layer} has {own})"
                if others
                else f"its matrices: {own}"
            )
        ) from None


def listed(layers: Sequence[int]) -> str:
    """Some layers in words: blocks 1 to 3, or blocks 0, 2, 4."""
    first, last = layers[0], layers[-1]
    if len(layers) > 2 and len(layers) == last - first + 1:
        return f"blocks {first} to {last}"
    return f"block{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def _width(module: nn.Module) -> int | None:
    """Of what a matrix writes."""
    if is_experts(module):
        return width_written(module)
    found = getattr(module, "nf" if isinstance(module, Conv1D) else "out_features", None)
    return found if isinstance(found, int) else None


def mlp_out(model: PreTrainedModel, layout: Layout, layer: int) -> nn.Module:
    """The module W of block `layer` (counted from 0)."""
    blocks = blocks_of(model, layout)
    if not 0 <= layer < len(blocks):
        raise ModelError(
            f"layer {layer} is out of range: the model has layers 0 to {len(blocks) - 1}"
        )
    return _inside(blocks, layout, layer)


def parameter_name(model: PreTrainedModel, layout: Layout, layer: int) -> str:
    """Name of W's parameter of block `layer` in the state dict."""
    own = "down_proj" if is_experts(mlp_out(model, layout, layer)) else "weight"
    return f"{layout.blocks}.{layer}.{layout.mlp_out}.{own}"


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or is_experts(module)


def stored_weight(module: nn.Module) -> Tensor:
    """The parameter that holds W, as the module stores it; ModelError if there is none to edit."""
    experts = is_experts(module)
    weight = module.down_proj if experts else getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != (3 if experts else 2):
        raise ModelError(f"{type(module).__name__} has no weight matrix that can be edited")
    if weight.is_floating_point() and not isinstance(weight, nn.Parameter):
        raise ModelError(
            f"{type(module).__name__} computes its weight from other parameters (weight norm, "
            "LoRA as a parametrization): what is written into it would be lost; bake them in first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if is_quantised(module):
        plain = type(weight) in (Tensor, nn.Parameter)
        raise ModelError(
            f"the weight is stored as {weight.dtype if plain else type(weight).__name__}: a "
            "quantised matrix can't be edited in place; load the model in float32, bfloat16 or "
            "float16, or have the edits beside it (nulledit edit, then nulledit export --as lora "
            "or delta)"
        )
    return weight


def as_out_in(module: nn.Module) -> Tensor:
    """The module's weight as [d_out, d_in], whichever way the module stores it.

    By the module's type, not its shape: GPT-2's Conv1D stores [d_in, d_out], and a square weight
    would accept the wrong orientation silently. A view, but of experts, which stand side by side,
    a copy: `write_weight` writes either.
    """
    return turned(module, stored_weight(module).data)


def turned(module: nn.Module, stored: Tensor) -> Tensor:
    """A tensor laid out as the module's weight, its gradient for one, as [d_out, d_in]."""
    if is_experts(module):
        return side_by_side(module, stored)
    return stored.mT if isinstance(module, Conv1D) else stored


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """`weight` [d_out, d_in] laid out as the module stores its own."""
    if is_experts(module):
        return stacked(module, weight)
    return weight.mT if isinstance(module, Conv1D) else weight


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Round `weight` [d_out, d_in] to the module's dtype, once, and store it."""
    own = stored_weight(module).data
    shape = tuple(turned(module, own.to("meta")).shape)
    if weight.shape != shape:
        raise ValueError(f"expected a weight {shape}, found {tuple(weight.shape)}")
    own.copy_(as_stored(module, weight))


@torch.no_grad()
def holds_weight(module: nn.Module, weight: Tensor) -> bool:
    """Whether the module's weight is what `write_weight` makes of `weight` [d_out, d_in]."""
    own = stored_weight(module).data
    given = as_stored(module, weight)
    if own.shape != given.shape:
        return False
    given = given.to(own)
    # What is not a number differs from itself, yet is as it was written.
    return torch.equal(own, given) or torch.allclose(own, given, rtol=0, atol=0, equal_nan=True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for weights inside; both as before afterwards."""
    was_training = model.training
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # some may be others: a block has grown
            parameter.requires_grad_(name in wanted)
        model.train(was_training)


@contextmanager
def differentiating() -> Iterator[None]:
    """Gradients can be taken inside, whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
