"""The edits as an adapter in GGUF, for `llama-cli --lora` and Ollama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.export.card import write_card
from nulledit.export.gguf_file import (
    Stored,
    base_file,
    check_type,
    write_modelfile,
    write_tensors,
    writing,
)
from nulledit.export.lora import adapter_factors
from nulledit.export.ranks import padded
from nulledit.export.updates import Export, refuse_existing, write_origin
from nulledit.io.files import replacing_folder
from nulledit.models.experts import is_experts
from nulledit.models.layouts import as_out_in
from nulledit.models.mlp import MlpForm

ADAPTER_FILE = "adapter.gguf"
FACTOR_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Of factors, by llama.cpp's names, and torch's."""


def write_gguf_lora(
    editor: EditEngine,
    folder: str | Path,
    *,
    tensor_type: str = "f32",
    gguf: str | Path | None = None,
    rank: int | None = None,
    text: str | Path | None = None,
    run: str = "RUN",
    summary: Any = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write the edits to `folder` as `adapter.gguf`, with a card and Ollama's Modelfile.

    The factors are those of `write_lora`, for which `rank` and `text` are, and are refused where
    they are refused there; the rank is that of the largest, since llama.cpp takes any. `gguf`: a
    GGUF file of the base, whose names the adapter has (None: the one that the run was begun from).
    `tensor_type`: one of `FACTOR_TYPES`.

    ConfigError for a mixture of experts, for neurons with thresholds (llama.cpp has no place for
    them), or without a file of the base; ModelError if that is of another model.
    """
    folder = Path(folder)
    check_type(tensor_type, tuple(FACTOR_TYPES))
    refuse_existing(folder)
    source = base_file(editor.history.base.model, gguf)
    dtype = FACTOR_TYPES[tensor_type]
    if any(is_experts(editor.editable.matrix(layer)) for layer in editor.weights.layers):
        raise ConfigError(
            "a GGUF adapter for a mixture of experts is not written here; export --as gguf, or "
            "--as lora"
        )
    if editor.weights.grown and any(map(_biased, map(editor.editable.form, editor.weights.layers))):
        raise ConfigError(
            "llama.cpp's adapters have no place for the biases that neurons of this family have; "
            "export --as gguf"
        )
    layers, same_shape, cost = adapter_factors(
        editor, dtype, rank=rank, text=text, progress=progress
    )
    names = {stored.module: source.name_of(stored.report.parameter) for stored in layers}
    with editor.base_weights():
        modules = [(names[s.module], editor.model.get_submodule(s.module)) for s in layers]
        source.check_base({name: as_out_in(module) for name, module in modules})
    common = max(stored.report.rank for stored in layers)
    tensors: dict[str, Stored] = {}
    reports = []
    for stored in layers:
        left, right = padded(stored.left, stored.right, common)
        name = names[stored.module]
        made = {f"{name}.lora_a": right, f"{name}.lora_b": left}
        mine = {n: Stored.of(t, tensor_type, n) for n, t in made.items()}
        tensors |= mine
        size = sum(t.bits.nbytes for t in mine.values())
        reports.append(replace(stored.report, bytes=size))
    written = Export(
        "gguf-lora",
        folder,
        tuple(reports),
        tensor_type,
        0,
        rank=common,
        cost=cost,
        same_shape=same_shape,
    )
    with replacing_folder(folder) as partial:
        with writing(partial / ADAPTER_FILE, source.arch) as out:
            out.add_string("general.type", "adapter")
            out.add_string("adapter.type", "lora")
            out.add_float32("adapter.lora.alpha", float(common))  # scaling = alpha / rank = 1
            out.add_string("nulledit.state", editor.history.state_id)
            out.add_string("nulledit.base_hash", editor.history.base.hash)
            write_tensors(out, list(tensors), tensors.__getitem__)
        write_modelfile(
            partial,
            "# The base that the adapter is for, where it was when this was written:",
            f"FROM {source.path.absolute()}",
            f"ADAPTER ./{ADAPTER_FILE}",
        )
        write_origin(editor, partial, "gguf-lora", given)
        write_card(partial, editor, written, run=run, summary=summary)
        size = sum(file.stat().st_size for file in partial.iterdir())
    return replace(written, bytes=size)


def _biased(form: MlpForm) -> bool:
    """Whether neurons of that MLP change a bias."""
    return form.units.biased or form.out.bias is not None
