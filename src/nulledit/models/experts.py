"""Fused experts as one matrix: W = [W_1 … W_E], and a key with one block for each expert.

A mixture of experts gives Σ_e p_e W_e k_e at a token, over the experts that it is routed to. That
is W k with k = [p_1 k_1; …; p_E k_E], zero where the token is not routed. Routing and k_e come from
what the layer is given and from other weights, so k does not depend on W, as anywhere else.

transformers keeps the experts of a layer as three-dimensional parameters of one module and runs
them by one of several kernels, so there is no module per expert whose input could be read: keys are
computed anew from what the module is given. `gives_w_times_key` tells whether they are the right
ones. Nothing here knows a family's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

GIVEN = ("hidden_states", "top_k_index", "top_k_weights")
"""Names and order of what transformers gives such a module: [t, d], [t, k] and [t, k]."""
PARTS = ("act_fn", "_apply_gate", "has_gate", "is_transposed")
MISSED = 0.01  # ‖y − Wk‖/‖y‖, beside what rounding in the experts' dtype leaves


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a layer as transformers fuses them."""
    weight = getattr(module, "down_proj", None)
    fused = isinstance(weight, Tensor) and weight.ndim == 3
    return fused and all(hasattr(module, name) for name in PARTS)


def count_and_width(module: nn.Module) -> tuple[int, int]:
    """Number of experts, and width of one expert's keys."""
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1 if module.is_transposed else 2]


def side_by_side(module: nn.Module, stored: Tensor) -> Tensor:
    """[W_1 … W_E], a copy [d_out, E·d_in], of a tensor that is laid out as the experts' weight."""
    by_out = stored.permute(2, 0, 1) if module.is_transposed else stored.permute(1, 0, 2)
    return by_out.reshape(len(by_out), -1)


def stacked(module: nn.Module, matrix: Tensor) -> Tensor:
    """What `side_by_side` makes `matrix` [d_out, E·d_in] of: it as the module stores it."""
    blocks = matrix.unflatten(1, count_and_width(module))  # [d_out, E, d_in]
    return blocks.permute(1, 2, 0) if module.is_transposed else blocks.permute(1, 0, 2)


@torch.no_grad()
def keys_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """k [t, E·d_in] of each token that the module is given, in the dtype of p_e k_e."""
    count, width = count_and_width(module)
    found: Tensor | None = None
    for expert, token, weighted in _routed(module, args, kwargs):
        if found is None:
            tokens = _given(args, kwargs)[0].shape[0]
            found = weighted.new_zeros(tokens, count, width)
        found[:, expert].index_add_(0, token, weighted)
    if found is None:
        raise ValueError("no token is routed to any expert")
    return found.flatten(1)


@torch.no_grad()
def gives_w_times_key(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> bool:
    """Whether the module's `output` is W k of the keys computed here.

    It is not where experts have biases, or norms of their own, or are given routed states.
    """
    try:
        wide = torch.promote_types(output.dtype, torch.float32)
        expected = torch.zeros_like(output, dtype=wide)
        for expert, token, weighted in _routed(module, args, kwargs):
            weight = module.down_proj[expert].to(wide)  # type: ignore[index]
            product = weighted.to(wide) @ (weight if module.is_transposed else weight.mT)
            expected.index_add_(0, token, product)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, RuntimeError, AttributeError):
        return False  # experts that work in another way
    allowed = MISSED + 8 * torch.finfo(output.dtype).eps
    return float((output - expected).norm()) <= allowed * float(expected.norm())


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    named = {**dict(zip(GIVEN, args, strict=False)), **kwargs}
    states, index, weights = (named[name] for name in GIVEN)
    return states, index, weights


def _routed(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Expert by expert: its number, its tokens' places [m], and p_e k_e [m, d_in] of each."""
    states, index, weights = _given(args, kwargs)
    count, _ = count_and_width(module)
    inner = module.gate_up_proj if module.has_gate else module.up_proj
    act: Any = module._apply_gate if module.has_gate else module.act_fn
    for expert in index.unique().tolist():
        if not 0 <= expert < count:
            continue  # a place that another process serves
        token, slot = (index == expert).nonzero(as_tuple=True)
        matrix = inner[expert]  # type: ignore[index]
        activated = act(states[token] @ (matrix if module.is_transposed else matrix.mT))
        yield expert, token, activated * weights[token, slot, None]
