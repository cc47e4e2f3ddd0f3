"""The edited model as a folder that needs nothing of nulledit, with a card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.export.card import write_card
from nulledit.export.neuron_factors import neuron_factors
from nulledit.export.same_shape import Places
from nulledit.export.updates import (
    Export,
    facts_cost,
    refuse_existing,
    shard_bytes,
    whole_report,
    write_origin,
)
from nulledit.export.write import check_method
from nulledit.io.files import replacing_folder
from nulledit.models.quantized import refuse_dense
from nulledit.models.saving import save_weights


def write_checkpoint(
    editor: EditEngine,
    folder: str | Path,
    *,
    max_shard_size: str | int = "50GB",
    same_shape: bool = False,
    text: str | Path | None = None,
    run: str = "RUN",
    summary: Any = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write model, tokenizer and a model card to `folder`, in the base's dtype.

    Gated edits make MLPs wider; with `same_shape` their neurons stand in the place of the least
    used units, as `text` (None: the one that comes with nulledit) shows, and it is measured what
    that costs. `summary`: the content of the run's `summary.json`, for the card's measures. `run`:
    what the card calls the run. LedgerError if `folder` is taken, ConfigError for `same_shape` or
    `text` where edits change W.
    """
    folder = Path(folder)
    options = {"same_shape": same_shape, "text": text}
    check_method("checkpoint", options, gated=editor.weights.grown)
    most = shard_bytes(max_shard_size)
    refuse_existing(folder)
    refuse_dense(editor.model, "exported as a checkpoint")
    editor.weights.check_unchanged()
    written, shape = _whole(editor, folder)
    if same_shape:
        written, shape = _in_shape(editor, folder, text, progress)
    with replacing_folder(folder) as partial:
        write_card(partial, editor, written, run=run, summary=summary)
        with shape:
            save_weights(editor.model, partial, max_shard_size=most)
        editor.tokenizer.save_pretrained(partial)
        write_origin(editor, partial, "checkpoint", given)
        size = sum(file.stat().st_size for file in partial.iterdir())
    return replace(written, bytes=size)


def _whole(editor: EditEngine, folder: Path) -> tuple[Export, AbstractContextManager[Any]]:
    """What is said of the run's model, and the model as it is written."""
    layers = tuple(whole_report(editor, layer) for layer in editor.weights.layers)
    dtype = editor.history.base.dtype
    return Export("checkpoint", folder, layers, dtype, 0), editor.weights.as_saved()


def _in_shape(
    editor: EditEngine, folder: Path, text: str | Path | None, progress: Progress | None
) -> tuple[Export, AbstractContextManager[Any]]:
    """The same with neurons in the place of units."""
    places = Places(editor, text, progress)
    cost = facts_cost(editor, places.taken(), progress)
    layers = tuple(
        replace(
            stored.report,
            rank=0,
            of=0,
            bytes=math.prod(stored.report.shape) * editor.model.dtype.itemsize,
        )
        for stored in neuron_factors(editor, places, torch.float64)[0]
    )
    dtype, price = editor.history.base.dtype, places.price()
    written = Export("checkpoint", folder, layers, dtype, 0, cost=cost, same_shape=price)
    return written, places.taken()
