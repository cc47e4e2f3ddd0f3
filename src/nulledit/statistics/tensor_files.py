"""The tensor files of statistics: sums, full spectra and compact ones, checked as they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nulledit.errors import StatisticsError
from nulledit.io.files import replacing
from nulledit.io.untrusted import one_line
from nulledit.linalg.inverse_factor import packed, unpacked
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.spectrum import Block, Spectrum, part_names
from nulledit.models.dense import update_digest
from nulledit.statistics.manifest import HASHES, damaged

MOMENTS, SPECTRA, PARTIAL = "moments.safetensors", "spectra.safetensors", "partial.safetensors"
MAX_WIDTH = 2**17
"""Of keys. The widest MLP of an open model, of LLaMA3 405B, has 53,248; a matrix of more than this
would not fit into memory."""
MAX_ROUNDING = 0.01
"""How far rounding may move an eigenvector; float16 moves one by less than 0.001."""


def save_alone(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file that no manifest lies beside: its own head tells the hash of all the rest."""
    with replacing(file) as partial:
        save_file(tensors, partial, metadata | {HASHES: _digest(metadata, tensors.items())})


def sums_of(moments: Mapping[int, SecondMoment]) -> dict[str, torch.Tensor]:
    """What `restore` of each layer's moment needs, by name."""
    tensors = {f"sum.{i}": m.sum.cpu() for i, m in moments.items()}
    for i, moment in moments.items():
        tensors |= _tokens(i, moment.tokens)
    return tensors


def _tokens(layer: int, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    counted = torch.tensor(tokens, dtype=torch.float64)
    return {f"tokens.{layer}": counted} if tokens else {}


def spectrum_tensors(
    spectrum: Spectrum, layer: int, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """What `Tensors.layer` reads, with the eigenvectors in `dtype` or as they are."""
    tensors = _tokens(layer, spectrum.tokens)
    for name, part in spectrum.parts(str(layer)).items():
        tensors[f"eigenvalues.{name}"] = part.eigenvalues
        tensors[f"eigenvectors.{name}"] = part.eigenvectors.to(dtype).contiguous()
    return tensors


def inverse_tensors(spectrum: Spectrum, layer: int) -> dict[str, torch.Tensor]:
    """What `Tensors.inverse` reads: all of a dense layer's moment, in a few bytes."""
    below, diagonals = packed(spectrum.whole())
    return {f"inverse.{layer}": below, f"diagonals.{layer}": diagonals}


@dataclass(frozen=True)
class Tensors:
    """A safetensors file whose shapes are checked in its head, before a tensor is read."""

    file: Path
    """For messages."""
    opened: Any
    """As `safe_open` gives it."""

    def check(self, metadata: Mapping[str, str]) -> bool:
        """Whether a file from `save_alone` tells its hash; StatisticsError if it has another."""
        told = metadata.get(HASHES)
        if told is None:
            return False
        rest = {name: text for name, text in metadata.items() if name != HASHES}
        tensors = ((name, self.opened.get_tensor(name)) for name in self.opened.keys())
        if _digest(rest, tensors) != told:
            raise damaged(self.file)
        return True

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of numbers with a fraction; StatisticsError if there is none."""
        if name not in set(self.opened.keys()):
            raise StatisticsError(f"{self.file}: has no tensor {name}")
        part = self.opened.get_slice(name)
        if part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
            raise StatisticsError(f"{self.file}: {name} is of {part.get_dtype()}; expected floats")
        return tuple(part.get_shape())

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """In float64; StatisticsError unless it has this shape and is finite."""
        if (found := self.shape(name)) != shape:
            raise StatisticsError(
                f"{self.file}: {name} has the shape {list(found)}, expected {list(shape)}"
            )
        tensor: torch.Tensor = self.opened.get_tensor(name).double()
        if not tensor.isfinite().all():
            raise StatisticsError(f"{self.file}: {name} has entries that are not finite")
        return tensor

    def tokens(self, layer: int, total: torch.Tensor) -> list[int]:
        """Of each expert, where the layer's sum `total` has a block for each; else none."""
        if total.ndim < 3:
            return []
        found = self.tensor(f"tokens.{layer}", (len(total),)).clamp(0, 2**53)
        return [int(number) for number in found.tolist()]

    def layer(self, layer: int, read: Callable[[str], Block]) -> Spectrum:
        """The spectrum of a layer, each part as `read` finds it by its name."""
        held, name = set(self.opened.keys()), f"tokens.{layer}"
        count = next(iter(self.shape(name)), 0) if name in held else 0
        tokens = self.tensor(name, (count,)).clamp(0, 2**53).tolist() if count else []
        blocks = {i: read(part) for i, part in part_names(str(layer), count, held).items()}
        try:
            return Spectrum.joined(blocks, tokens)
        except StatisticsError as error:
            raise StatisticsError(f"{self.file}: layer {layer}: {error}") from error

    def block(self, name: str, start: int = 0) -> Block:
        """Of a dense layer or an expert: a possible one, with eigenvectors of length 1."""
        names = f"eigenvalues.{name}", f"eigenvectors.{name}"
        first, second = map(self.shape, names)
        d, m = first[0] if first else 0, second[-1] if second else 0
        matching = (first, second) == ((d,), (d, m)) and 0 < d <= MAX_WIDTH
        if not matching or not 0 <= start <= start + m <= d:
            raise StatisticsError(
                f"{self.file}: layer {name} has eigenvalues {list(first)} and eigenvectors "
                f"{list(second)} from {start}; expected [d] and [d, m] of at most {MAX_WIDTH}"
            )
        values, vectors = self.tensor(names[0], (d,)), self.tensor(names[1], (d, m))
        if values.min() < 0 or (values.diff() < 0).any() or not 0 < values.sum() < torch.inf:
            raise StatisticsError(
                f"{self.file}: {names[0]} are no eigenvalues of a second moment: expected "
                "ascending numbers from 0"
            )
        if ((vectors.norm(dim=0) - 1).abs() > MAX_ROUNDING).any():
            raise StatisticsError(f"{self.file}: {names[1]} are not of length 1")
        return Block(values, vectors, start)

    def inverse(self, name: str) -> Block | None:
        """Of a dense layer whose inverse moment is held; None where it is not."""
        names = f"inverse.{name}", f"diagonals.{name}"
        if names[0] not in set(self.opened.keys()):
            return None
        d = self.shape(names[1])[-1] if self.shape(names[1]) else 0
        if not 0 < d <= MAX_WIDTH:
            raise StatisticsError(f"{self.file}: {names[1]} is {d} wide; expected 1 to {MAX_WIDTH}")
        below = self.tensor(names[0], (d * (d - 1) // 2,))
        diagonals = self.tensor(names[1], (2, d))
        if diagonals.min() <= 0:
            raise StatisticsError(f"{self.file}: {names[1]} are not all above 0")
        try:
            return unpacked(below, diagonals)
        except (ValueError, RuntimeError) as error:
            raise StatisticsError(
                f"{self.file}: {names[0]} is of no second moment ({error})"
            ) from error


def thin(tensors: Tensors, name: str, starts: Mapping[str, Any]) -> Block:
    """A block of a compact file, whose rounding is taken back."""
    if whole := tensors.inverse(name):
        return whole
    start = starts.get(name)
    if type(start) is not int:
        raise StatisticsError(f"{tensors.file}: says of no first eigenvector of layer {name}")
    rounded = tensors.block(name, start)
    found = rounded.orthonormal()
    moved = (found.eigenvectors - rounded.eigenvectors).norm(dim=0)
    if not (moved <= MAX_ROUNDING).all():  # also where it is nan
        raise StatisticsError(f"{tensors.file}: eigenvectors.{name} are not orthogonal")
    return found


@contextmanager
def opened_file(file: Path) -> Iterator[tuple[Tensors, dict[str, str]]]:
    """Tensors and metadata of a safetensors file; nothing but its head is read.

    safetensors itself refuses a head of more than 100 MB, and shapes that the file's size doesn't
    agree with.
    """
    if not file.is_file():
        kind = "not a regular file" if file.exists() else "no such file"
        raise StatisticsError(f"{file}: no readable statistics file ({kind})")
    try:
        with safe_open(file, "pt") as opened:
            yield Tensors(file, opened), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise StatisticsError(one_line(f"{file}: no readable statistics file ({error})")) from error


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of names, shapes, types and bytes, and of what the head says beside them."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    parts = {}
    for name, tensor in tensors:
        part = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        update_digest(part, tensor)
        parts[name] = part.hexdigest()
    digest.update(json.dumps(sorted(parts.items())).encode())
    return digest.hexdigest()
