"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from nulledit.errors import ConfigError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path to write; it takes the place of `file` when the inside ends well.

    What other libraries write with narrow permissions becomes as readable as any new file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{escape(file.name)}.*.part"):
        if not _alive(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)  # of a process that was killed
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    partial.unlink(missing_ok=True)  # of a killed process that had this one's number
    try:
        with _naming(file):
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            sync(partial)
            os.replace(partial, file)
            sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def check_output(folder: Path, marks: Iterable[str], command: str) -> None:
    """ConfigError unless `command` may write into `folder`: new, empty, or of an earlier call.

    `marks`: patterns of what only such a call leaves there, one of which must be met.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; give a folder")
    if (folder / "ledger").exists():
        raise ConfigError(f"{folder}: holds a run; give another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any(any(folder.glob(mark)) for mark in marks):
        raise ConfigError(
            f"{folder}: is not empty, and nothing of `{command}` is there; give another folder"
        )


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of `folder` when the inside ends well.

    The old folder is set aside until the new one stands in its place. A process that is killed in
    between leaves no folder for a moment: `recover_folder` puts the new one there.
    """
    recover_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    new, old = partial / "new", partial / "old"
    try:
        with _naming(folder):
            new.mkdir(parents=True)
            yield new
            probe = partial / "probe"
            probe.touch()
            for path in new.rglob("*"):
                if path.is_file():
                    path.chmod(probe.stat().st_mode)
                if path.exists():  # no link into nowhere
                    sync(path)
            sync(new)
            if folder.exists():
                os.replace(folder, old)
                sync(partial)
            os.replace(new, folder)
            sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(partial, ignore_errors=True)


def recover_folder(folder: Path) -> bool:
    """Finish what killed processes left of `replacing_folder`; whether the folder came back by it.

    A new folder was complete before the old one was set aside, so it is the one that stays.
    """
    recovered = False
    for left in folder.parent.glob(f".{escape(folder.name)}.*.part"):
        number = left.name.split(".")[-2]
        if number != str(os.getpid()) and _alive(number):
            continue
        if (left / "old").exists() and not folder.exists():
            whole = left / "new" if (left / "new").exists() else left / "old"
            os.replace(whole, folder)
            sync(folder.parent)
            recovered = True
        shutil.rmtree(left, ignore_errors=True)
    return recovered


def sweep(folder: Path) -> None:
    """Remove temporary files that killed processes left in `folder`.

    Also those under this process's number, which an earlier one may have had: not to be called
    while this one writes there.
    """
    for left in folder.glob(".*.part"):
        number = left.name.split(".")[-2]
        if left.is_file() and (number == str(os.getpid()) or not _alive(number)):
            left.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an error of the system say what was being written: a full disk names no file itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _alive(process: str) -> bool:
    """Whether the process that a temporary name tells of still runs, on this machine."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def cache_folder() -> Path:
    """Where converted models and statistics are kept: $NULLEDIT_CACHE or ~/.cache/nulledit."""
    given = os.environ.get("NULLEDIT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "nulledit"


def from_anywhere(name: str) -> str:
    """The name of a model, of a local folder or file as an absolute path."""
    local = Path(name).exists() or Path(name).suffix.lower() == ".gguf"
    return str(Path(name).resolve()) if name and local else name
