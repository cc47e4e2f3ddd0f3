"""The edited model as a folder that needs nothing of nulledit, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nulledit.editing.engine import EditEngine
from nulledit.export.card import model_card
from nulledit.export.updates import (
    Export,
    check_shard_size,
    refuse_existing,
    whole_report,
    write_origin,
)
from nulledit.io.files import replacing_folder
from nulledit.models.quantized import refuse_dense
from nulledit.models.saving import save_weights


def write_checkpoint(
    editor: EditEngine,
    folder: str | Path,
    *,
    max_shard_size: str | int = "50GB",
    run: str = "RUN",
    summary: Any = None,
) -> Export:
    """Write model, tokenizer and a model card to `folder`, in the base's dtype.

    `summary`: the content of the run's `summary.json`, for the card's measures. `run`: what the
    card calls the run. LedgerError if `folder` is taken.
    """
    folder = Path(folder)
    check_shard_size(max_shard_size)
    refuse_existing(folder)
    refuse_dense(editor.model, "exported as a checkpoint")
    editor.weights.check_unchanged()
    layers = tuple(whole_report(editor, layer) for layer in editor.weights.layers)
    with editor.weights.as_saved(), replacing_folder(folder) as partial:
        save_weights(editor.model, partial, max_shard_size=max_shard_size)
        editor.tokenizer.save_pretrained(partial)
        write_origin(editor, partial, "checkpoint")
        card = model_card(editor, layers, run=run, summary=summary)
        (partial / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in partial.iterdir())
    return Export("checkpoint", folder, layers, editor.history.base.dtype, size)
