"""An adapter's tensors for fused experts: in one parameter, as PEFT has them, or each by its name.

transformers holds the experts of a layer in one parameter. Files of most families, and servers,
have a matrix for each: `model.layers.3.mlp.experts.17.down_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nulledit.errors import ConfigError
from nulledit.export.updates import StoredLayer
from nulledit.models.experts import count_and_width


def in_one(stored: StoredLayer, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Factors B [E, d_out, r] and A [E, r, d_in] as PEFT's `target_parameters` lays them out.

    Its A has one expert's rows after another's, its B the experts' columns in turn.
    """
    name = stored.module.rpartition(".")[0]
    return {
        f"{name}.lora_A.weight": right.flatten(0, 1).contiguous(),
        f"{name}.lora_B.weight": left.permute(1, 2, 0).flatten(1).contiguous(),
    }


def by_name(
    model: PreTrainedModel, stored: StoredLayer, left: Tensor, right: Tensor
) -> dict[str, Tensor]:
    """The same as a pair for each expert, under its name in files of the family.

    vLLM reads a pair for every matrix of every expert or none, so the others' are zeros.
    ConfigError where the family's files have no names for single experts.
    """
    found: dict[str, Tensor] = {}
    for name, expert in _owners(model, stored.module).items():
        found[f"{name}.lora_A.weight"] = right[expert].contiguous()
        found[f"{name}.lora_B.weight"] = left[expert].contiguous()
    for name, (d_out, d_in) in _others(model, stored.module):
        found[f"{name}.lora_A.weight"] = right.new_zeros(right.shape[1], d_in)
        found[f"{name}.lora_B.weight"] = left.new_zeros(d_out, left.shape[2])
    return found


def _owners(model: PreTrainedModel, parameter: str) -> dict[str, int]:
    """Each expert's name in the files -> its number, for a parameter of all."""
    shape = model.get_parameter(parameter).shape
    numbers = torch.arange(shape[0], dtype=torch.float32)[:, None, None].expand(shape)
    parts = _parts(model, parameter, numbers)
    return {name: int(part.flatten()[0]) for name, part in parts.items()}


def _others(model: PreTrainedModel, parameter: str) -> Iterator[tuple[str, torch.Size]]:
    """Names in the files and shapes [d_out, d_in] of the experts' other matrices."""
    home, _, own = parameter.rpartition(".")
    for name, tensor in model.get_submodule(home).named_parameters(recurse=False):
        if name != own and tensor.ndim == 3:
            empty = torch.empty(tensor.shape, device="meta")
            for part, found in _parts(model, f"{home}.{name}", empty).items():
                yield part, found.shape


def _parts(model: PreTrainedModel, parameter: str, tensor: Tensor) -> dict[str, Tensor]:
    """What transformers writes for `parameter`, whose content is `tensor`, by module."""
    written = revert_weight_conversion(model, {parameter: tensor})
    module: nn.Module = model.get_submodule(parameter.rpartition(".")[0])
    count, _ = count_and_width(module)
    if len(written) % count or any(part.ndim != 2 for part in written.values()):
        raise ConfigError(
            f"files of {model.config.model_type} have no names for single experts: leave out "
            "--experts each"
        )
    return {name.removesuffix(".weight"): part for name, part in written.items()}
