"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path to write; it takes the place of `file` when the inside ends well.

    What other libraries write with narrow permissions becomes as readable as any new file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{file.name}.*.part"):
        if not _alive(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)  # of a process that was killed
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def _alive(process: str) -> bool:
    """Whether the process that a temporary name tells of still runs, on this machine."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of `folder` when the inside ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*.part"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    inside = partial / "content"
    try:
        inside.mkdir()
        yield inside
        probe = partial / "probe"
        probe.touch()
        for file in inside.rglob("*"):
            if file.is_file():
                file.chmod(probe.stat().st_mode)
                sync(file)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(inside, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write `text`, or leave `file` as it was."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
