"""The edited model as an ordinary Hugging Face folder, derived from the ledger.

`nulledit.json` in it names the ledger's state, the base, and the hash of every file. Only the files
that hold edited matrices are rewritten when the state changes, each under a temporary name that is
renamed over the old one. While that goes on the state is empty and the hashes of both are listed,
so that a rewriting that was interrupted is told apart from a file that something else changed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from nulledit.errors import LedgerError
from nulledit.io.files import (
    recover_folder,
    replacing,
    replacing_folder,
    sha256_of,
    sweep,
    write_text,
)
from nulledit.models.quantized import refuse_dense
from nulledit.models.saving import save_weights

STATE_FILE = "nulledit.json"
LARGEST_STATE = 16 << 20  # bytes
LARGEST_HEADER = 100 << 20  # bytes, as the safetensors library has it
BLOCK = 1 << 20  # bytes copied at once
DIGEST = re.compile(r"[0-9a-f]{64}")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class FolderState:
    """What `nulledit.json` says of the folder it lies in."""

    state: str
    """The ledger's state id that the model was written for; empty while files are rewritten."""
    base: str
    """Hash of the model before any edit."""
    files: dict[str, tuple[str, ...]]
    """SHA-256 of every other file by its path in the folder; old and new while it is rewritten."""

    def to_text(self) -> str:
        """The one form that it is written in; a hash of the rest comes with it."""
        files = {n: list(d) if len(d) > 1 else d[0] for n, d in self.files.items()}
        data: dict[str, Any] = {"state": self.state, "base": self.base, "files": files}
        data["sha256"] = hashlib.sha256(_canonical(data).encode()).hexdigest()
        return _canonical(data)

    @classmethod
    def from_text(cls, text: str) -> FolderState:
        """ValueError unless it is what `to_text` writes."""
        try:
            data = json.loads(text)
            files = {
                str(name): (hashes,) if isinstance(hashes, str) else tuple(hashes)
                for name, hashes in data["files"].items()
            }
            found = cls(data["state"], data["base"], files)
            same = found.to_text() == text
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            same = False
        if not same:
            raise ValueError("not what nulledit wrote")
        for name, hashes in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
                raise ValueError(f"names a file outside its folder: {name!r}")
            if not all(DIGEST.fullmatch(digest) for digest in hashes):
                raise ValueError(f"holds no hash of {name!r}")
        return found


def read_state(folder: Path) -> FolderState | None:
    """What `nulledit.json` in `folder` says, None without one; LedgerError if it is damaged."""
    file = folder / STATE_FILE
    try:
        with file.open("rb") as opened:
            raw = opened.read(LARGEST_STATE + 1)
    except OSError:
        return None
    try:
        if len(raw) > LARGEST_STATE:
            raise ValueError(f"larger than {LARGEST_STATE} bytes")
        return FolderState.from_text(raw.decode("utf-8"))
    except ValueError as error:
        raise LedgerError(
            f"{file}: damaged ({error}); move the folder away, it is written anew from the base "
            "and the ledger"
        ) from error


def as_listed(folder: Path) -> bool:
    """Whether every file that `nulledit.json` lists has its hash; reads all of them."""
    try:
        found = read_state(folder)
        return found is not None and all(
            sha256_of(folder / name) in hashes for name, hashes in found.files.items()
        )
    except (LedgerError, OSError):
        return False


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    state_id: str,
    base_hash: str,
    edited: list[str],
    whole: bool = False,
) -> None:
    """Bring `folder` to the weights of `model`; `edited` names the parameters that edits change.

    `whole`: every file is written anew, since edits change the model's shape; what else lies in
    the folder stays.

    LedgerError if something else lies there, or if something else changed a file that is to be
    rewritten: it is not overwritten.
    """
    refuse_dense(model, "written as a model folder")
    recover_folder(folder)
    found = read_state(folder)
    if found and (found.state, found.base) == (state_id, base_hash):
        return
    if (found is None or found.base != base_hash) and folder.exists() and any(folder.iterdir()):
        raise LedgerError(f"{folder}: holds another model; move it away or choose another folder")
    sweep(folder)
    parameters = as_saved(model, edited)
    kept = found and not whole and _all_there(folder, found)
    files = files_with(folder, list(parameters)) if kept else None
    if found is None or files is None:
        for name, listed in found.files.items() if found else ():
            if (folder / name).is_file():
                _refuse_changed(folder / name, sha256_of(folder / name), listed)
        with replacing_folder(folder) as partial:
            save_weights(model, partial)
            tokenizer.save_pretrained(partial)
            written: dict[str, tuple[str, ...]] = {}
            written |= {name: (sha256_of(partial / name),) for name in files_in(partial)}
            _write_state(partial, FolderState(state_id, base_hash, written))
            _carry_over(folder, partial, found)
        return
    hashes = dict(found.files)
    for file, names in files.items():
        new = _rewrite(file, {name: parameters[name][1] for name in names})
        hashes[file.relative_to(folder).as_posix()] = (new,)
    _write_state(folder, FolderState(state_id, base_hash, hashes))


def as_saved(model: PreTrainedModel, edited: list[str]) -> dict[str, tuple[str, Tensor]]:
    """The parameters `edited` under the names and in the parts that `save_pretrained` writes.

    Name in the files -> name of the parameter, and the part. transformers fuses experts when a
    model is loaded, and takes them apart again when it is saved.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, tuple[str, Tensor]] = {}
    for name in edited:
        parts = revert_weight_conversion(model, {name: parameters[name].data})
        found |= {saved: (name, part) for saved, part in parts.items()}
    return found


def files_in(folder: Path) -> list[str]:
    """Every file in `folder` but `nulledit.json` and temporary ones, by its path in it."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return sorted(n for n in names if n != STATE_FILE and not _temporary(n))


def files_with(folder: Path, names: list[str]) -> dict[Path, list[str]] | None:
    """Which file holds which of `names`; None if the folder is no model with all of them."""
    if not (folder / "config.json").is_file():
        return None
    files: dict[Path, list[str]] = {}
    missing = set(names)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            held = missing & set(read_header(file)[0])
        except (OSError, ValueError):
            return None
        if held:
            files[file] = sorted(held)
            missing -= held
    return None if missing else files


@dataclass(frozen=True)
class Place:
    """Where a safetensors file holds a tensor."""

    dtype: torch.dtype | None
    """Its dtype; None for one that no weight has."""
    shape: tuple[int, ...]
    """Its shape."""
    begin: int
    """Offset of its first byte in the file."""
    end: int
    """Offset after its last byte."""


def read_header(file: Path) -> tuple[dict[str, Place], int]:
    """Where `file` holds which tensor, and the size that it must have; ValueError if unreadable."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= LARGEST_HEADER:
            raise ValueError(f"{file}: not a safetensors file")
        try:
            header = json.loads(opened.read(length))
            places = {
                name: Place(
                    DTYPES.get(entry["dtype"]),
                    tuple(entry["shape"]),
                    *(8 + length + int(offset) for offset in entry["data_offsets"]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not a safetensors file") from error
    return places, max((place.end for place in places.values()), default=8 + length)


def _refuse_changed(file: Path, own: str, listed: Collection[str]) -> None:
    """LedgerError if the hash of `file`, `own`, is none of those that are `listed`."""
    if own not in listed:
        raise LedgerError(
            f"{file}: changed by something else: its hash is {own[:12]}; move the folder away, it "
            "is written anew from the base and the ledger"
        )


def _carry_over(folder: Path, partial: Path, found: FolderState | None) -> None:
    """Copy what others put into `folder`, and the new one lacks."""
    listed = found.files if found else {}
    for name in files_in(folder) if found else ():
        if name not in listed and not (partial / name).exists():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, partial / name)


def _rewrite(file: Path, replaced: Mapping[str, Tensor]) -> str:
    """Put tensors into a file of the folder and list its new hash, which is returned."""
    folder = file.parent
    found, name = read_state(folder), file.name
    assert found is not None
    with replacing(file) as partial:
        old, new = _copy(file, partial, replaced)
        _refuse_changed(file, old, found.files.get(name, ()))
        hashes = (old, new) if new != old else (new,)
        _write_state(folder, replace(found, state="", files={**found.files, name: hashes}))
    return new


def _copy(source: Path, target: Path, replaced: Mapping[str, Tensor]) -> tuple[str, str]:
    """Copy a safetensors file with some tensors replaced, block by block; hashes of both."""
    places, _ = read_header(source)
    old = new = hashlib.sha256()  # one until the first tensor that differs
    with source.open("rb") as reading, target.open("wb") as writing:
        at = 0
        for name in sorted(replaced, key=lambda n: places[n].begin):
            place, tensor = places[name], replaced[name]
            if place.dtype is None or place.shape != tuple(tensor.shape):
                raise LedgerError(f"{source}: {name} has another shape or dtype than the model's")
            _pass_on(_blocks(reading, place.begin - at), writing, old, new)
            if old is new:
                new = old.copy()
            for block in _blocks(reading, place.end - place.begin):
                old.update(block)
            raw = tensor.detach().to(place.dtype).cpu().contiguous().reshape(-1).view(torch.uint8)
            if raw.numel() != place.end - place.begin:
                raise LedgerError(f"{source}: {name} takes another number of bytes than it should")
            content: Any = raw.numpy()  # a buffer of bytes
            new.update(content)
            writing.write(content)
            at = place.end
        _pass_on(_blocks(reading, None), writing, old, new)
    return old.hexdigest(), new.hexdigest()


def _pass_on(blocks: Iterable[bytes], writing: IO[bytes], old: Any, new: Any) -> None:
    for block in blocks:
        writing.write(block)
        old.update(block)
        if new is not old:
            new.update(block)


def _blocks(opened: IO[bytes], length: int | None) -> Iterator[bytes]:
    """The next `length` bytes, or all that are left."""
    while length is None or length > 0:
        block = opened.read(BLOCK if length is None else min(BLOCK, length))
        if not block:
            return
        yield block
        length = None if length is None else length - len(block)


def _all_there(folder: Path, found: FolderState) -> bool:
    return all((folder / name).is_file() for name in found.files)


def _temporary(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".") and name.endswith(".part")


def _write_state(folder: Path, found: FolderState) -> None:
    write_text(folder / STATE_FILE, found.to_text())


def _canonical(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True) + "\n"
