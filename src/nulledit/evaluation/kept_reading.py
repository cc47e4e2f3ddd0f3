"""What a base and its edited model make of a text, kept from one command to the next.

Every edit, preview and check compares the model with its base on the same windows. What either
makes of them changes with its weights, the windows and the arithmetic alone, so it is read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nulledit._version import __version__
from nulledit.editing.engine import EditEngine
from nulledit.errors import LedgerError
from nulledit.evaluation.opening import Gates, Opening
from nulledit.evaluation.reading import POSITIONS, Reading, read
from nulledit.io.files import cache_folder, replacing

WORTH = 1.0  # seconds that a reading took, from which on it is kept
PARTS = ("losses", "apart", "states")  # of a reading
KEPT = 8  # readings of each kind; the one that was used longest ago goes first


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
    kept = _can_be_kept(editor)
    file = _file(editor, windows)
    found = _load(file, windows) if kept else None
    if found and found.states:
        return found
    start = time.monotonic()
    with editor.base_weights():
        reading = read(editor.editable, windows, keep=True, progress=progress)
    if kept and time.monotonic() - start >= WORTH:
        _keep(file, reading)
    return reading


def edited_reading(
    editor: EditEngine,
    windows: Sequence[Sequence[int]],
    base: Reading,
    *,
    gates: Gates | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """What the editor's model, as it is now, makes of `windows`, compared with `base`'s reading.

    `gates` are those that it has. Kept as `base_reading` is, by the weights themselves, so that a
    check after an edit reads nothing again; not of a model that something else wrote to.
    """
    kept = _can_be_kept(editor) and _is_as_recorded(editor)
    state = ["edited", editor.weights.digest(), gates and [gates.layer, *gates.facts]]
    file = _file(editor, windows, *state)
    file = file.parent / "edited" / file.name
    found = _load(file, windows) if kept else None
    if found and found.apart and (found.opening is None) == (gates is None):
        return found
    start = time.monotonic()
    reading = read(editor.editable, windows, base=base, gates=gates, progress=progress)
    if kept and time.monotonic() - start >= WORTH:
        _keep(file, reading)
    return reading


def _can_be_kept(editor: EditEngine) -> bool:
    # Which matrices of a quantised base are dense, and round otherwise, depends on the recipe.
    return editor.ranks.alone and not editor.history.base.quantized


def _is_as_recorded(editor: EditEngine) -> bool:
    """Whether the model in memory is what the ledger says."""
    try:
        editor.weights.check_unchanged()
    except LedgerError:
        return False
    return True


def _file(editor: EditEngine, windows: Sequence[Sequence[int]], *state: Any) -> Path:
    """`state`: what tells the model from its base."""
    model, config = editor.model, editor.model.config.to_dict()
    config.pop("_name_or_path", None)  # where it came from changes nothing
    device = editor.editable.device
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    content: list[Any] = [
        *(editor.history.base.hash, config, [list(ids) for ids in windows]),
        *(str(model.dtype), model.config._attn_implementation, named(device) if named else ""),
        *(device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()),
        *(torch.get_float32_matmul_precision(), POSITIONS),
        getattr(model.config, "_experts_implementation", None),
        *(__version__, torch.__version__, transformers.__version__),
        *state,
    ]
    digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    return cache_folder() / "readings" / f"{digest}.safetensors"


def _load(file: Path, windows: Sequence[Sequence[int]]) -> Reading | None:
    """None where there is none, or it is damaged."""
    texts = tuple(tuple(ids) for ids in windows if len(ids) > 1)
    lengths = [len(ids) - 1 for ids in texts]
    try:
        with safe_open(file, "pt") as opened:
            there = set(opened.keys())
            held = {name: opened.get_tensor(name) for name in PARTS if name in there}
            opening = json.loads((opened.metadata() or {}).get("opening", "null"))
        with suppress(OSError):  # another user's
            os.utime(file)
        if "losses" not in held or any(len(t) != sum(lengths) for t in held.values()):
            return None
        parts = {name: t.split(lengths) for name, t in held.items()}
        return Reading(
            texts,
            tuple(part.numpy() for part in parts["losses"]),
            tuple(part.numpy() for part in parts["apart"]) if "apart" in parts else None,
            tuple(parts["states"]) if "states" in parts else None,
            Opening(**opening) if opening else None,
        )
    except (SafetensorError, OSError, ValueError, TypeError):
        return None


def _keep(file: Path, reading: Reading) -> None:
    """Write it, and drop the oldest; a folder that can't be written is no reason to stop."""
    held = {"losses": torch.cat([torch.from_numpy(part) for part in reading.losses])}
    if reading.apart is not None:
        held["apart"] = torch.cat([torch.from_numpy(part) for part in reading.apart])
    if reading.states is not None:
        held["states"] = torch.cat(reading.states)
    told = json.dumps(asdict(reading.opening)) if reading.opening else "null"
    try:
        with replacing(file) as partial:
            save_file(held, partial, metadata={"opening": told})
        others = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for old in others[:-KEPT]:
            old.unlink(missing_ok=True)
    except (SafetensorError, OSError):
        return
