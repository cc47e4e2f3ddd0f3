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
PARTS = ("_apply_gate", "has_gate", "is_transposed")
"""What transformers gives every such module; one without is given its tokens expert by expert."""
MISSED = 0.01  # ‖y − Wk‖/‖y‖, beside what rounding in the experts' dtype leaves


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a layer as transformers fuses them."""
    weight, inner = (getattr(module, name, None) for name in ("down_proj", "gate_up_proj"))
    if not isinstance(weight, Tensor) or weight.ndim != 3:
        return False
    if all(hasattr(module, name) for name in PARTS):
        return True
    return isinstance(inner, Tensor) and inner.ndim == 3 and hasattr(module, "act_fn")


def is_transposed(module: nn.Module) -> bool:
    """Whether the experts' matrices are stored [d_in, d_out]."""
    weight: Any = module.down_proj
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    inner: Any = module.gate_up_proj  # two matrices beside each other
    return bool(inner.shape[2] == 2 * weight.shape[1])


def count_and_width(module: nn.Module) -> tuple[int, int]:
    """Number of experts, and width of one expert's keys."""
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1 if is_transposed(module) else 2]


def width_written(module: nn.Module) -> int:
    """d_out of the experts."""
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    return weight.shape[2 if is_transposed(module) else 1]


def comes_apart(module: nn.Module) -> bool:
    """Whether `module` holds experts that are given all tokens, each, and give them back so."""
    return is_experts(module) and not hasattr(module, "has_gate")


def joined(module: nn.Module, output: Tensor) -> Tensor:
    """What the experts give together, of a module's `output`; any other module's as it is."""
    if comes_apart(module):
        return output.unflatten(0, (count_and_width(module)[0], -1)).sum(0)
    return output


def side_by_side(module: nn.Module, stored: Tensor) -> Tensor:
    """[W_1 … W_E], a copy [d_out, E·d_in], of a tensor that is laid out as the experts' weight."""
    by_out = stored.permute(2, 0, 1) if is_transposed(module) else stored.permute(1, 0, 2)
    return by_out.reshape(len(by_out), -1)


def stacked(module: nn.Module, matrix: Tensor) -> Tensor:
    """What `side_by_side` makes `matrix` [d_out, E·d_in] of: it as the module stores it."""
    blocks = matrix.unflatten(1, count_and_width(module))  # [d_out, E, d_in]
    return blocks.permute(1, 2, 0) if is_transposed(module) else blocks.permute(1, 0, 2)


@torch.no_grad()
def keys_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """k [t, E·d_in] of each token that the module is given, in the dtype of p_e k_e."""
    count, width = count_and_width(module)
    found: Tensor | None = None
    for expert, token, weighted, _ in _routed(module, args, kwargs):
        if found is None:
            given = args[0] if args else kwargs[GIVEN[0]]
            tokens = len(token) if comes_apart(module) else len(given)
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

    It is not where experts have norms of their own, for one. Biases come besides W k.
    """
    try:
        wide = torch.promote_types(output.dtype, torch.float32)
        given = joined(module, output)
        expected = torch.zeros_like(given, dtype=wide)
        bias = module.down_proj_bias if getattr(module, "has_bias", False) else None
        for expert, token, weighted, shares in _routed(module, args, kwargs):
            weight = module.down_proj[expert].to(wide)  # type: ignore[index]
            product = weighted.to(wide) @ (weight if is_transposed(module) else weight.mT)
            if bias is not None:  # it comes besides W k, whatever W is
                product += shares.to(wide) * bias[expert].to(wide)  # type: ignore[index]
            expected.index_add_(0, token, product)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, RuntimeError, AttributeError, ValueError):
        return False  # experts that work in another way
    allowed = MISSED + 8 * torch.finfo(output.dtype).eps
    return float((given - expected).norm()) <= allowed * float(expected.norm())


def _routed(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Expert by expert: its number, its tokens' places [m], p_e k_e [m, d_in] and p_e [m, 1]."""
    named = [*args, *kwargs.values()]  # some families have other names for them
    if comes_apart(module):
        if len(named) != 1:
            raise TypeError("experts that get their tokens in another way")
        yield from _sorted(module, named[0])
        return
    states, index, weights = ((kwargs[n] if n in kwargs else named[i]) for i, n in enumerate(GIVEN))
    count, _ = count_and_width(module)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner: Any = getattr(module, name)
    bias: Any = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    act: Any = module._apply_gate if module.has_gate else module.act_fn
    for expert in index.unique().tolist():
        if not 0 <= expert < count:
            continue  # a place that another process serves
        token, slot = (index == expert).nonzero(as_tuple=True)
        matrix = inner[expert]
        made = states[token] @ (matrix if is_transposed(module) else matrix.mT)
        shares = weights[token, slot, None]
        yield expert, token, act(made if bias is None else made + bias[expert]) * shares, shares


def _sorted(module: nn.Module, states: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """The same where every expert is given all tokens, times p_e: 0 for those not routed to it."""
    count, _ = count_and_width(module)
    inner: Any = module.gate_up_proj
    act: Any = module.act_fn
    for expert, given in enumerate(states.unflatten(0, (count, -1))):
        matrix = inner[expert]
        gate, up = (given @ (matrix if is_transposed(module) else matrix.mT)).chunk(2, dim=-1)
        token = torch.arange(len(given), device=given.device)
        yield expert, token, up * act(gate), torch.ones_like(given[:, :1])
