"""Any kind of export, by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nulledit.editing.call_log import Progress
from nulledit.editing.editor import Editor
from nulledit.errors import ConfigError
from nulledit.export.checkpoint import write_checkpoint
from nulledit.export.delta import write_delta
from nulledit.export.lora import write_lora
from nulledit.export.updates import Export
from nulledit.runs.folder import read_json

Kind = Literal["checkpoint", "lora", "delta"]
KINDS: tuple[Kind, ...] = ("checkpoint", "lora", "delta")
SHARD = "50GB"


def write_export(
    editor: Editor,
    folder: str | Path,
    kind: Kind,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    run: str | Path | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write the edits to `folder`: `write_lora`, `write_delta` or `write_checkpoint`.

    `rank` and `dtype` (float32 by default) are of factors, `max_shard_size` ("50GB") is of a
    checkpoint: ConfigError where one is given to the other kind. `run`: the run's folder, for its
    name and, on a checkpoint's card, its measures.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r} of export; expected one of {', '.join(KINDS)}")
    given = {"rank": rank, "dtype": dtype, "max_shard_size": max_shard_size}
    unfit = ("rank", "dtype") if kind == "checkpoint" else ("max_shard_size",)
    if wrong := [name for name in unfit if given[name] is not None]:
        raise ConfigError(f"{', '.join(wrong)} can't be given for kind {kind!r}")
    name = Path(run).resolve().name if run else "RUN"
    if kind == "checkpoint":
        summary = read_json(Path(run), "summary.json", None) if run else None
        size = max_shard_size or SHARD
        return write_checkpoint(editor, folder, max_shard_size=size, run=name, summary=summary)
    dtype = dtype or "float32"
    if kind == "delta":
        return write_delta(editor, folder, rank=rank, dtype=dtype, progress=progress)
    return write_lora(editor, folder, rank=rank, dtype=dtype, run=name, progress=progress)
