"""The edits as an adapter in PEFT's format; PEFT itself is not needed to write it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.export.card import adapter_card
from nulledit.export.delta import DTYPES, dtype_of
from nulledit.export.ranks import SERVED, padded, served_rank
from nulledit.export.updates import (
    MEASURED_ABOVE,
    Export,
    StoredLayer,
    facts_cost,
    refuse_existing,
    stored_layers,
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
    run: str = "RUN",
    progress: Progress | None = None,
) -> Export:
    """Write the edits to `folder` as an adapter for the base model, scaling 1.

    Its one rank is the least of `SERVED` that holds every layer's; beyond `rank`, or the largest of
    those, the updates are cut. Where the stored factors miss more than float32's rounding, the
    edited facts are asked again. `dtype`: float32, float64, bfloat16 or float16. `run`: what the
    adapter's README calls the run. LedgerError if nothing is edited or `folder` is taken,
    ConfigError for a mixture of experts.
    """
    folder = Path(folder)
    refuse_existing(folder)
    if rank is not None and not 1 <= rank <= SERVED[-1]:
        raise ConfigError(f"rank is {rank}; expected 1 to {SERVED[-1]}, what servers accept")
    fused = [i for i in editor.weights.layers if is_experts(editor.editable.matrix(i))]
    if fused:
        raise ConfigError(
            f"layers {fused} hold their experts in one parameter, for which an adapter has no "
            "place; export a delta or a checkpoint"
        )
    layers = stored_layers(
        editor, rank=rank or SERVED[-1], dtype=dtype_of(dtype, DTYPES), progress=progress
    )
    common = served_rank(max(1, *(s.report.rank for s in layers)))
    tensors: dict[str, Tensor] = {}
    reports = []
    for stored in layers:
        left, right = padded(stored.left, stored.right, common)
        prefix = f"base_model.model.{stored.module}"
        tensors[f"{prefix}.lora_A.weight"] = right.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = left.contiguous()
        reports.append(replace(stored.report, bytes=left.nbytes + right.nbytes))
    inexact = any(r.error > MEASURED_ABOVE for r in reports)
    cost = facts_cost(editor, layers, progress) if inexact else None
    with replacing_folder(folder) as partial:
        write_json(partial / "adapter_config.json", _config(editor, layers, common))
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        write_origin(editor, partial, "lora")
        written = Export("lora", folder, tuple(reports), dtype, 0, rank=common, cost=cost)
        card = adapter_card(editor, written, run=run)
        (partial / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in partial.iterdir())
    return replace(written, bytes=size)


def _config(editor: EditEngine, layers: list[StoredLayer], rank: int) -> dict[str, Any]:
    """The fields that PEFT reads; those left out have its defaults, which change nothing.

    Modules by their full names, so that the others' layers stay bare. A list and not a pattern:
    servers take the last part of each name and refuse patterns.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": editor.history.base.model or None,
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
    }
