"""What commands load: a model that was asked for, or the editor of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.api.editor import Editor
from nulledit.cli.common import say
from nulledit.cli.options import model_source
from nulledit.config import Placement
from nulledit.errors import LedgerError
from nulledit.models.load import load_model
from nulledit.parallel.ranks import Ranks


def load_asked(
    name: str, given: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, loaded as `MODEL_OPTIONS` say."""
    return load_model(
        model_source(name),
        device=given["device"],
        dtype=given["dtype"],
        quantize=given["quantize"] or "",
        trust_remote_code=given["trust_remote_code"],
    )


def load_run(
    folder: str | Path,
    device: str | Placement | None,
    *,
    quiet: bool,
    trust_remote_code: bool = False,
    ranks: Ranks | None = None,
) -> Editor:
    """The editor of a run folder; LedgerError if there is no run."""
    folder = Path(folder)
    if not (folder / "ledger" / "ledger.db").is_file():
        raise LedgerError(f"{folder}: no run here (expected {folder / 'ledger' / 'ledger.db'})")
    say(f"Loading the model of {folder}", quiet=quiet)
    return Editor.load(folder, device=device, trust_remote_code=trust_remote_code, ranks=ranks)
