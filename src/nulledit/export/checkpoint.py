"""The edited model as a folder that needs nothing of nulledit, with a card."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nulledit.editing.call_log import Progress
from nulledit.editing.editor import Editor
from nulledit.errors import ConfigError
from nulledit.export.card import model_card
from nulledit.export.same_shape import Places, SameShape
from nulledit.export.updates import (
    Export,
    FactsCost,
    check_shard_size,
    facts_cost,
    refuse_existing,
    whole_report,
    write_origin,
)
from nulledit.io.files import replacing_folder
from nulledit.models.quantized import refuse_dense
from nulledit.models.saving import save_weights


def write_checkpoint(
    editor: Editor,
    folder: str | Path,
    *,
    max_shard_size: str | int = "50GB",
    same_shape: bool = False,
    text: str | Path | None = None,
    run: str = "RUN",
    summary: Any = None,
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
    if text is not None and not same_shape:
        raise ConfigError("text goes with same_shape: on it the units to replace are chosen")
    check_shard_size(max_shard_size)
    refuse_existing(folder)
    refuse_dense(editor.model, "exported as a checkpoint")
    editor.weights.check_unchanged()
    found: SameShape | None = None
    cost: FactsCost | None = None
    shape: AbstractContextManager[Any] = editor.weights.as_saved()
    if same_shape:
        places = Places(editor, text, progress)
        found, cost = places.price(), facts_cost(editor, places.taken(), progress)
        shape = places.taken()
    with shape, replacing_folder(folder) as partial:
        layers = tuple(whole_report(editor, layer) for layer in editor.weights.layers)
        save_weights(editor.model, partial, max_shard_size=max_shard_size)
        editor.tokenizer.save_pretrained(partial)
        write_origin(editor, partial, "checkpoint")
        dtype = editor.history.base.dtype
        written = Export("checkpoint", folder, layers, dtype, 0, cost=cost, same_shape=found)
        card = model_card(editor, written, run=run, summary=summary)
        (partial / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in partial.iterdir())
    return replace(written, bytes=size)
