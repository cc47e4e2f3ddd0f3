"""The edits as an adapter in PEFT's format; PEFT itself is not needed to write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.export.card import Told, adapter_card
from nulledit.export.delta import DTYPES, dtype_of
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
from nulledit.io.files import replacing_folder
from nulledit.models.experts import is_experts


def write_lora(
    editor: EditEngine,
    folder: str | Path,
    *,
    rank: int | None = None,
    dtype: str = "float32",
    text: str | Path | None = None,
    run: str = "RUN",
    summary: Any = None,
    lines: Sequence[Mapping[str, Any]] = (),
    progress: Progress | None = None,
) -> Export:
    """Write the edits to `folder` as an adapter for the base model, scaling 1.

    Its one rank is the least of `SERVED` that holds every layer's; beyond `rank`, or the largest of
    those, the updates are cut. Where the stored factors miss more than float32's rounding, the
    edited facts are asked again. `dtype`: float32, float64, bfloat16 or float16. `run`: what the
    adapter's README calls the run; `summary` and `lines`: the content of its summary.json and
    results.jsonl, for what the README says of the facts. LedgerError if nothing is edited or
    `folder` is taken, ConfigError for a mixture of experts.

    An adapter can't add units, so neurons of gated edits stand in the place of the least used ones
    of their block, as `text` (None: the one that comes with nulledit) shows, and it is measured
    what that costs. Their rank is never cut.
    """
    folder = Path(folder)
    refuse_existing(folder)
    layers, same_shape, cost = adapter_factors(
        editor, dtype_of(dtype, DTYPES), rank=rank, text=text, progress=progress
    )
    common = served_rank(max(1, *(s.report.rank for s in layers)))
    tensors = adapter_tensors(layers, common)
    reports = tuple(
        replace(s.report, bytes=sum(t.nbytes for n, t in tensors.items() if _is_of(n, s.module)))
        for s in layers
    )
    with replacing_folder(folder) as partial:
        config = adapter_config(editor.history.base.model, layers, common)
        write_json(partial / "adapter_config.json", config)
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        write_origin(editor, partial, "lora")
        written = Export(
            "lora", folder, reports, dtype, 0, rank=common, cost=cost, same_shape=same_shape
        )
        card = adapter_card(editor, written, Told(run, summary, lines))
        (partial / "README.md").write_text(card, encoding="utf-8")
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

    As `write_lora` says. ConfigError for a mixture of experts.
    """
    if editor.weights.grown:
        if rank is not None:
            raise ConfigError(
                "rank can't be given for gated edits: each neuron is a dimension of its own, and "
                "an adapter without some of them is not the edited model"
            )
        return _of_neurons(editor, text, dtype, progress)
    layers = _of_updates(editor, rank, text, dtype, progress)
    inexact = any(stored.report.error > MEASURED_ABOVE for stored in layers)
    cost = facts_cost(editor, with_stored(editor, layers), progress) if inexact else None
    return layers, None, cost


def adapter_tensors(layers: Sequence[StoredLayer], rank: int) -> dict[str, Tensor]:
    """What the file of an adapter of `rank` holds, by the names that PEFT gives it."""
    tensors: dict[str, Tensor] = {}
    for stored in layers:
        left, right = padded(stored.left, stored.right, rank)
        prefix = f"base_model.model.{stored.module}"
        tensors[f"{prefix}.lora_A.weight"] = right.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = left.contiguous()
        if _biased(layers):
            bias = left.new_zeros(len(left)) if stored.bias is None else stored.bias
            tensors[f"{prefix}.lora_B.bias"] = bias
    return tensors


def _is_of(name: str, module: str) -> bool:
    """Whether the tensor `name` of an adapter is of `module`."""
    return name.startswith(f"base_model.model.{module}.lora_")


def _of_updates(
    editor: EditEngine,
    rank: int | None,
    text: str | Path | None,
    dtype: torch.dtype,
    progress: Progress | None,
) -> list[StoredLayer]:
    """Factors of updates of W, cut to what servers accept."""
    if text is not None:
        raise ConfigError("text is for gated edits, whose units it chooses; this run has none")
    if rank is not None and not 1 <= rank <= SERVED[-1]:
        raise ConfigError(f"rank is {rank}; expected 1 to {SERVED[-1]}, what servers accept")
    fused = [i for i in editor.weights.layers if is_experts(editor.editable.matrix(i))]
    if fused:
        raise ConfigError(
            f"layers {fused} hold their experts in one parameter, for which an adapter has no "
            "place; export a delta or a checkpoint"
        )
    return stored_layers(editor, rank=rank or SERVED[-1], dtype=dtype, progress=progress)


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


def adapter_config(base: str, layers: Sequence[StoredLayer], rank: int) -> dict[str, Any]:
    """The fields that PEFT reads; those left out have its defaults, which change nothing.

    Modules by their full names, so that the others' layers stay bare. A list and not a pattern:
    servers take the last part of each name and refuse patterns.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": rank,  # scaling = alpha / r = 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": layers[0].transposed,
        "target_modules": [stored.module for stored in layers],
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        **({"lora_bias": True} if _biased(layers) else {}),
    }
