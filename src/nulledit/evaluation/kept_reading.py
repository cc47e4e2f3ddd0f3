"""What the base makes of a text, kept from one command to the next.

Every edit, preview and check compares the model with its base on the same windows. What the base
makes of them changes with the model, the windows and the arithmetic alone, so it is read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nulledit._version import __version__
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.reading import POSITIONS, Reading, read
from nulledit.io.files import cache_folder, replacing

WORTH = 1.0  # seconds that a reading took, from which on it is kept
KEPT = 8  # readings; the one that was used longest ago goes first


def base_reading(
    editor: EditEngine,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """What the editor's base makes of `windows` of token ids, with its states.

    One that took a second is kept in the cache folder, and found there where model, windows,
    device, threads and versions are the same, so that a model that nothing has changed is still at
    exactly 0 from its base. `progress` as for `read`; it is not told of one that is found.
    """
    file = _file(editor, windows)
    # Which matrices of a quantised base are dense, and round otherwise, depends on the recipe.
    kept = editor.ranks.alone and not editor.history.base.quantized
    found = _load(file, windows) if kept else None
    if found:
        return found
    start = time.monotonic()
    with editor.base_weights():
        reading = read(editor.editable, windows, keep=True, progress=progress)
    if kept and time.monotonic() - start >= WORTH:
        _keep(file, reading)
    return reading


def _file(editor: EditEngine, windows: Sequence[Sequence[int]]) -> Path:
    model, config = editor.model, editor.model.config.to_dict()
    config.pop("_name_or_path", None)  # where it came from changes nothing
    device = editor.editable.device
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    content: list[Any] = [
        *(editor.history.base.hash, config, [list(ids) for ids in windows]),
        *(str(model.dtype), model.config._attn_implementation, named(device) if named else ""),
        *(device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()),
        *(torch.get_float32_matmul_precision(), POSITIONS),
        *(__version__, torch.__version__, transformers.__version__),
    ]
    digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    return cache_folder() / "readings" / f"{digest}.safetensors"


def _load(file: Path, windows: Sequence[Sequence[int]]) -> Reading | None:
    """None where there is none, or it is damaged."""
    texts = tuple(tuple(ids) for ids in windows if len(ids) > 1)
    lengths = [len(ids) - 1 for ids in texts]
    try:
        with safe_open(file, "pt") as opened:
            losses, states = opened.get_tensor("losses"), opened.get_tensor("states")
        os.utime(file)
    except (SafetensorError, OSError):
        return None
    if not len(losses) == len(states) == sum(lengths):
        return None
    by_window = tuple(part.numpy() for part in losses.split(lengths))
    return Reading(texts, by_window, states=tuple(states.split(lengths)))


def _keep(file: Path, reading: Reading) -> None:
    """Write it, and drop the oldest; a folder that can't be written is no reason to stop."""
    assert reading.states is not None
    losses = torch.cat([torch.from_numpy(part) for part in reading.losses])
    try:
        with replacing(file) as partial:
            save_file({"losses": losses, "states": torch.cat(reading.states)}, partial)
        others = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for old in others[:-KEPT]:
            old.unlink(missing_ok=True)
    except (SafetensorError, OSError):
        return
