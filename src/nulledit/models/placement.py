"""Where a model's parts are: on one device, on several, or offloaded until they work.

accelerate moves what a module is given to the module's device, and brings offloaded weights in for
the time of a module's forward pass; outside of it they are on "meta", without data. What is found
here is found by its hooks, which `transformers` sets for a device map as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.hooks import (
    AlignDevicesHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from accelerate.utils import find_tied_parameters, set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from nulledit.config import SPREADS, Placement
from nulledit.errors import ConfigError, ModelError
from nulledit.parallel.accelerators import accelerators

Device: TypeAlias = str | torch.device | Placement | None
"""Where a model is to be: None and "auto" leave it to `chosen`."""


def chosen(device: Device, device_map: str | Mapping[str, str | int] | None) -> Device:
    """One placement from the two ways of asking for it; ConfigError for both at once.

    Asked for neither, or "auto": the first accelerator, and what it has no room for on the next
    ones and on the CPU. None, so the CPU, where there is none.
    """
    if device_map is not None:
        if device is not None:
            raise ConfigError("give device or device_map, not both")
        return Placement(device_map)
    if device in (None, "auto"):
        return Placement("sequential") if accelerators() else None
    return device


def loading_options(placement: Placement) -> dict[str, Any]:
    """A placement for transformers' `from_pretrained`; ConfigError where a device is none."""
    device_map, made = placement.device_map, placement.device_map in SPREADS
    if placement.max_memory and not made:
        raise ConfigError(f"max_memory is for a device map of {', '.join(SPREADS)}")
    if not isinstance(device_map, Mapping):
        if not made:
            _check_device(device_map, "device_map", *SPREADS)
    elif not device_map:
        raise ConfigError("device_map is empty; expected a device for each part")
    else:
        for part, device in device_map.items():
            if device != "disk":
                _check_device(device, f"device_map, {part!r}")
        device_map = dict(device_map)
    given: dict[str, Any] = {"device_map": device_map}
    if placement.max_memory:
        given["max_memory"] = dict(placement.max_memory)
    if placement.offload_folder:
        if Path(placement.offload_folder).is_file():
            raise ConfigError(f"offload_folder {placement.offload_folder}: is a file")
        given["offload_folder"] = placement.offload_folder
    return given


def _check_device(device: object, where: str, *others: str) -> None:
    try:
        if isinstance(device, bool) or not isinstance(device, str | int):
            raise ValueError
        if torch.device(device).type == "meta":
            raise ValueError
    except (RuntimeError, ValueError) as error:
        known = ", ".join((*others, "a device such as cpu or 0", *([] if others else ["disk"])))
        raise ConfigError(f"{where}: {device!r} is no device; expected {known}") from error


def input_device(model: PreTrainedModel) -> torch.device:
    """Where input ids go: to the embedding, or where that will be when it works."""
    embedding = model.get_input_embeddings()
    found = next(iter((*embedding.parameters(), *embedding.buffers())), None)
    if found is not None and found.device.type != "meta":
        return found.device
    for hook in _hooks(embedding):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return model.device if found is None else found.device


def devices_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the devices that hold parameters; "offloaded" for those that wait elsewhere."""
    found = {str(p.device) for p in model.parameters()}
    return tuple(sorted("offloaded" if name == "meta" else name for name in found))


def is_offloaded(module: nn.Module) -> bool:
    """Whether some parameter in `module` is elsewhere until it works."""
    return any(p.device.type == "meta" for p in module.parameters())


def declared_ties(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the one that transformers ties it to on loading, as the configuration says."""
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {str(name): str(other) for name, other in ties.items()}


def tied_by_hand(model: PreTrainedModel) -> dict[str, str]:
    """Name in the state dict -> an earlier one of the same tensor that nothing declares it tied to.

    A head that was tied after the model was made, for one; what is offloaded is not looked at.
    """
    ties, first = declared_ties(model), dict[tuple[int, torch.Size], str]()
    found: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta" or not tensor.data_ptr():
            continue
        other = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if ties.get(name, name) != ties.get(other, other):
            found[name] = other
    return found


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the one of the same weight that stands for both.

    Offloading takes tied parameters apart; transformers' list of them stays.
    """
    tied = declared_ties(model)
    for names in find_tied_parameters(model):
        first = tied.get(names[0], names[0])
        tied |= {name: first for name in names if name != first and name not in tied}
    return tied


def tensor_of(model: nn.Module, name: str, found: Tensor) -> Tensor:
    """The tensor `name` of the state dict, of which `found` is there: itself, or what is offloaded.

    ModelError for one without data anywhere.
    """
    if found.device.type != "meta":
        return found
    for path, module in _upwards(model, name.rpartition(".")[0]):
        inner = name.removeprefix(f"{path}.") if path else name
        for hook in _hooks(module):
            if hook.offload and hook.weights_map is not None:
                try:
                    held: Tensor = hook.weights_map[inner]
                except KeyError:
                    continue
                return held
    raise ModelError(f"{name}: has no data (it is on the device meta): load the model's weights")


def make_resident(model: nn.Module, path: str) -> None:
    """Bring the weights of the module at `path` to where it works, to stay there.

    Edits are written into them, and offloaded weights would be read anew before each pass. Where a
    module above brings them in together with others, all of those stay.
    """
    if not is_offloaded(model.get_submodule(path)):
        return
    for above, module in _upwards(model, path):
        hook = next((h for h in _hooks(module) if h.offload and _holds(h, above, path)), None)
        if hook is None:
            continue
        names = [n for n, _ in module.named_parameters(recurse=hook.place_submodules)]
        values = {n: hook.weights_map[n].clone() for n in names}
        device, skip_keys = hook.execution_device, hook.skip_keys
        wanted = {n: p.requires_grad for n, p in module.named_parameters()}
        remove_hook_from_module(module)
        for name, value in values.items():
            set_module_tensor_to_device(module, name, device, value=value)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(wanted[name])
        staying = AlignDevicesHook(
            execution_device=device, skip_keys=skip_keys, place_submodules=hook.place_submodules
        )
        add_hook_to_module(module, staying)
        return
    raise ModelError(f"{path}: has no data (it is on the device meta): load the model's weights")


def follow(new: nn.Module, old: nn.Module) -> None:
    """Have `new` be given its input on its device, where `old` was."""
    hook = next(iter(_hooks(old)), None)
    if hook is not None:
        moving = AlignDevicesHook(execution_device=hook.execution_device, skip_keys=hook.skip_keys)
        add_hook_to_module(new, moving)


def is_moved_to(module: nn.Module) -> bool:
    """Whether what `module` is given is brought to its device by a hook."""
    return any(hook.execution_device is not None for hook in _hooks(module))


@contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
    """The module's own offloaded weights there inside, as while it works."""
    hooks = [hook for hook in _hooks(module) if hook.offload] if is_offloaded(module) else []
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def _holds(hook: AlignDevicesHook, above: str, path: str) -> bool:
    return above == path or hook.place_submodules


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """accelerate's hooks of `module` that move tensors."""
    waiting, found = [vars(module).get("_hf_hook")], []
    while waiting:
        hook = waiting.pop(0)
        if isinstance(hook, SequentialHook):
            waiting += hook.hooks
        elif isinstance(hook, AlignDevicesHook):
            found.append(hook)
    return found


def _upwards(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The module at `path`, then those that contain it, up to the model."""
    while True:
        yield path, model.get_submodule(path)
        if not path:
            return
        path = path.rpartition(".")[0]
