"""The edits as an adapter in PEFT's format; PEFT itself is not needed to write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.export.base_name import base_name
from nulledit.export.card import write_card
from nulledit.export.delta import DTYPES, dtype_of
from nulledit.export.expert_adapter import by_name, in_one
from nulledit.export.neuron_factors import neuron_factors
from nulledit.export.ranks import SERVED, padded, served_rank
from nulledit.export.same_shape import Places, SameShape
from nulledit.export.updates import (
    MEASURED_ABOVE,
    Export,
    FactsCost,
    StoredLayer,
    facts_cost,
    refuse_existing,
    stored_layers,
    with_stored,
    write_json,
    write_origin,
)
from nulledit.export.write import Experts, check_method, check_options
from nulledit.io.files import replacing_folder
from nulledit.models.experts import is_experts

PREFIX = "base_model.model."
"""Of every name in an adapter."""


def write_lora(
    editor: EditEngine,
    folder: str | Path,
    *,
    rank: int | None = None,
    dtype: str = "float32",
    text: str | Path | None = None,
    experts: Experts | None = None,
    run: str = "RUN",
    summary: Any = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write the edits to `folder` as an adapter for the base model, scaling 1.

    Its one rank is the least of `SERVED` that holds every layer's; beyond `rank`, or the largest of
    those, the updates are cut. Where the stored factors miss more than float32's rounding, the
    edited facts are asked again. `dtype`: float32, float64, bfloat16 or float16. `run` and
    `summary` are as for a checkpoint. LedgerError if nothing is edited or `folder` is taken.

    Experts of a mixture have factors each. `experts`: "fused" for all in one parameter, which PEFT
    loads (the default), or "each" for a pair by each expert's name, which servers load. ConfigError
    where a model has none, or where its files have no such names.

    An adapter can't add units, so neurons of gated edits stand in the place of the least used ones
    of their block, as `text` (None: the one that comes with nulledit) shows, and it is measured
    what that costs. Their rank is never cut.
    """
    folder = Path(folder)
    refuse_existing(folder)
    check_options("lora", {"experts": experts})
    matrices = map(editor.editable.matrix, editor.weights.layers)
    if experts and not any(map(is_experts, matrices)):
        raise ConfigError("experts is for mixtures of experts; this run edits none")
    layers, same_shape, cost = adapter_factors(
        editor, dtype_of(dtype, DTYPES), rank=rank, text=text, progress=progress
    )
    common = served_rank(max(1, *(s.report.rank for s in layers)))
    naming = editor.model if experts == "each" else None
    parts = adapter_tensors(layers, common, naming)
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    reports = tuple(
        replace(stored.report, bytes=sum(t.nbytes for t in part.values()))
        for stored, part in zip(layers, parts, strict=True)
    )
    with replacing_folder(folder) as partial:
        config = adapter_config(
            base_name(editor.history.base.model), layers, common, tensors if naming else ()
        )
        write_json(partial / "adapter_config.json", config)
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        write_origin(editor, partial, "lora", given)
        written = Export(
            "lora",
            folder,
            reports,
            dtype,
            0,
            rank=common,
            cost=cost,
            same_shape=same_shape,
            for_servers=naming is not None,
        )
        write_card(partial, editor, written, run=run, summary=summary)
        size = sum(file.stat().st_size for file in partial.iterdir())
    return replace(written, bytes=size)


def adapter_factors(
    editor: EditEngine,
    dtype: torch.dtype,
    *,
    rank: int | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[StoredLayer], SameShape | None, FactsCost | None]:
    """The factors of an adapter in `dtype`, whatever its format, and what they cost.

    As `write_lora` says.
    """
    check_method("lora", {"rank": rank, "text": text}, gated=editor.weights.grown)
    if editor.weights.grown:
        return _of_neurons(editor, text, dtype, progress)
    layers = _of_updates(editor, rank, dtype, progress)
    inexact = any(stored.report.error > MEASURED_ABOVE for stored in layers)
    cost = facts_cost(editor, with_stored(editor, layers), progress) if inexact else None
    return layers, None, cost


def adapter_tensors(
    layers: Sequence[StoredLayer], rank: int, naming: PreTrainedModel | None = None
) -> list[dict[str, Tensor]]:
    """What the file of an adapter of `rank` holds of each layer, by the names that PEFT gives it.

    `naming`: the model whose files have the names that experts get; None: all in one parameter.
    """
    found: list[dict[str, Tensor]] = []
    for stored in layers:
        left, right = padded(stored.left, stored.right, rank)
        if stored.left.ndim == 3:
            laid = by_name(naming, stored, left, right) if naming else in_one(stored, left, right)
        else:
            laid = {
                f"{stored.module}.lora_A.weight": right.contiguous(),
                f"{stored.module}.lora_B.weight": left.contiguous(),
            }
            if _biased(layers):
                bias = left.new_zeros(len(left)) if stored.bias is None else stored.bias
                laid[f"{stored.module}.lora_B.bias"] = bias
        found.append({f"{PREFIX}{name}": tensor for name, tensor in laid.items()})
    return found


def _of_updates(
    editor: EditEngine,
    rank: int | None,
    dtype: torch.dtype,
    progress: Progress | None,
) -> list[StoredLayer]:
    """Factors of updates of W, experts' apart, cut to what servers accept."""
    if rank is not None and not 1 <= rank <= SERVED[-1]:
        raise ConfigError(f"rank is {rank}; expected 1 to {SERVED[-1]}, what servers accept")
    most = rank or SERVED[-1]
    return stored_layers(editor, rank=most, dtype=dtype, apart=True, progress=progress)


def _of_neurons(
    editor: EditEngine, text: str | Path | None, dtype: torch.dtype, progress: Progress | None
) -> tuple[list[StoredLayer], SameShape, FactsCost]:
    """Factors of neurons in the place of units, and what that costs text and facts."""
    places = Places(editor, text, progress)
    layers, made = neuron_factors(editor, places, dtype)
    cost = facts_cost(editor, places.taken(made), progress)
    return layers, places.price(made), cost


def _biased(layers: Sequence[StoredLayer]) -> bool:
    """Whether biases change: PEFT then expects one of every B."""
    return any(stored.bias is not None for stored in layers)


def adapter_config(
    base: str, layers: Sequence[StoredLayer], rank: int, named: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields that PEFT reads; those left out have its defaults, which change nothing.

    Modules by their full names, so that the others' layers stay bare. A list and not a pattern:
    servers take the last part of each name and refuse patterns. `named`: the tensors' names, where
    each expert has its own; there are too many to list, so the last parts stand for them.
    """
    modules = sorted({name.rsplit(".", 3)[1] for name in named})
    fused: list[str] = []
    if not modules:
        modules = [stored.module for stored in layers if stored.left.ndim == 2]
        fused = [stored.module for stored in layers if stored.left.ndim == 3]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": rank,  # scaling = alpha / r = 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": layers[0].transposed,
        "target_modules": modules,
        **({"target_parameters": fused} if fused else {}),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        **({"lora_bias": True} if _biased(layers) else {}),
    }
