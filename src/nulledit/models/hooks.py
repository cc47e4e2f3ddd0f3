"""Ways into a module at work: hooks that read and replace what it is given and gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nulledit.models.experts import is_experts, joined, keys_of
from nulledit.models.placement import brought_in, is_moved_to


def states_of(output: Any) -> Any:
    """The states in what a block gives: by itself, or first of several."""
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def hooked(module: nn.Module, hook: Any, *, before: bool = False) -> Iterator[None]:
    """`hook` is called after `module`, or `before` it with its keyword arguments, inside."""
    handle = (
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if before
        else module.register_forward_hook(hook)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """`module` works by `forward` inside; as before afterwards."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            vars(module)["forward"] = before


def passing(as_tuple: bool) -> Any:
    """A block's forward that gives back what it was given."""

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, None) if as_tuple else hidden_states

    return forward


def again(forward: Any) -> Any:
    """`forward`, run once more for the gradient: its graph would keep all weights brought in."""

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


def inject(states: Tensor) -> Any:
    """A hook before a block that hands it `states` in the place of what it was given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        own = states if is_moved_to(module) else states.to(given.device)
        if args:
            return (own, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": own}

    return hook


def read_key(found: dict[int, Tensor], layer: int, states: list[Tensor]) -> Any:
    """A hook before W that puts its keys [rows, length, d_in] into `found`.

    `states`: what the block was given last; some join its rows before they come to W.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_experts(module):
            with brought_in(module):
                keys = keys_of(module, args, kwargs)
        else:
            keys = args[0].detach()
        found[layer] = keys.view(*states[-1].shape[:2], -1)
        states.clear()

    return hook


def collect(found: list[Tensor]) -> Any:
    """A hook after a block that adds the states that it gave to `found`."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(states_of(output))

    return hook


def collect_copy(found: list[Tensor]) -> Any:
    """The same of a module whose output is a tensor, which is copied; of experts, their sum."""

    def hook(module: nn.Module, _args: Any, output: Tensor) -> None:
        found.append(joined(module, output).clone())  # some models add to it in place

    return hook


def collect_input(found: list[Tensor]) -> Any:
    """A hook before a block that adds the states that it is given to `found`."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    return hook
