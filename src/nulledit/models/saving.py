"""A model's weights as files that transformers reads back, looked at after they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nulledit.errors import ModelError
from nulledit.io.untrusted import one_line
from nulledit.models.accepted import refuse_adapters
from nulledit.models.placement import declared_ties, is_offloaded, tensor_of, tied_by_hand


def save_weights(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """`save_pretrained`, offloaded weights too, whoever offloaded them.

    Weights that are tied by hand are written under each of their names: transformers would write
    one, and make up the others on loading. ModelError unless the files then hold the model.
    """
    refuse_adapters(model)
    by_hand = tied_by_hand(model)
    if by_hand:
        state = model.state_dict()
        options["state_dict"] = state | {name: state[name].clone() for name in by_hand}
    unlisted = is_offloaded(model) and not hasattr(model, "hf_device_map")
    if unlisted:  # accelerate's cpu_offload; transformers looks into the hooks only with a map
        vars(model)["hf_device_map"] = {"": "cpu"}
    try:
        model.save_pretrained(folder, **options)
    except SafetensorError as error:  # it names no file
        raise ModelError(f"{folder}: can't be written: {one_line(error)}") from error
    finally:
        if unlisted:
            del vars(model)["hf_device_map"]
    if getattr(model, "hf_quantizer", None) is None:  # else the library decides what is written
        check_written(model, folder)


@torch.no_grad()
def check_written(model: PreTrainedModel, folder: Path) -> None:
    """ModelError unless the files in `folder` hold every weight of `model`, bit for bit."""
    wrong = f"what was written is not the model in memory, and was not kept: {folder.name} lacks"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{wrong} config.json")
    left = _expected(model)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys() & left.keys():
                tensor = left.pop(name)
                if tensor is not None and not _same_bits(opened.get_tensor(name), tensor):
                    raise ModelError(f"{wrong} the values of {name}")
    if left:
        raise ModelError(f"{wrong} {len(left)} of its weights ({min(left)} for one)")


def _expected(model: PreTrainedModel) -> dict[str, Tensor | None]:
    """Every weight by its name in the files; None for one that is offloaded and stored otherwise.

    A name that the configuration ties to another of the same tensor is made anew on loading.
    """
    left_out, ties = set(model._keys_to_ignore_on_save or ()), declared_ties(model)
    state = {n: t for n, t in model.state_dict().items() if n not in left_out}
    own = {n: t for n, t in state.items() if not _same_tensor(t, state.get(ties.get(n, "")))}
    if not any(tensor.device.type == "meta" for tensor in own.values()):
        return dict(revert_weight_conversion(model, own))
    names = revert_weight_conversion(model, {n: t.to("meta") for n, t in own.items()})
    return {n: tensor_of(model, n, own[n]) if n in own else None for n in names}


def _same_tensor(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.data_ptr() == other.data_ptr()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
