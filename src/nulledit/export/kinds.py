"""What a run can be exported as, a row each: its file here, and what it takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nulledit.editing.editor import Editor
    from nulledit.export.updates import Export


@dataclass(frozen=True)
class ExportKind:
    """A way to hand edits over."""

    home: str
    """Module and function that writes it: called with an editor and a folder, and by name with
    what it takes of `options`, `run` (its name), `summary` (the content of its summary.json) and
    `progress`; returns an `Export`."""
    options: tuple[str, ...]
    """Of `nulledit export` that it takes."""
    line: str
    """What was written, in words, with slots for `rank` and `dtype`."""

    def write(
        self,
        editor: Editor,
        folder: str | Path,
        *,
        run: Path,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Any,
    ) -> Export:
        """Write the edits of the run folder `run`, which `editor` holds, to `folder`."""
        from nulledit.runs.folder import read_json

        module, _, name = self.home.partition(":")
        writer = getattr(importlib.import_module(module), name)
        takes = inspect.signature(writer).parameters
        offered: dict[str, Any] = {"run": run.resolve().name, "progress": progress} | options
        if "summary" in takes:
            offered["summary"] = read_json(run, "summary.json", None)
        written: Export = writer(editor, folder, **{n: offered[n] for n in offered if n in takes})
        return written


EXPORTS = {
    "checkpoint": ExportKind(
        "nulledit.export.checkpoint:write_checkpoint", ("max_shard_size",), "The model in {dtype}"
    ),
    "lora": ExportKind(
        "nulledit.export.lora:write_lora", ("rank", "dtype"), "Adapter of rank {rank} in {dtype}"
    ),
    "delta": ExportKind("nulledit.export.delta:write_delta", ("rank", "dtype"), "Delta in {dtype}"),
}
"""By the word of `nulledit export --as`."""
OPTIONS = frozenset(name for kind in EXPORTS.values() for name in kind.options)
"""Options that only some of them take."""
