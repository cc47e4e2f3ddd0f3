"""Corpus and model to second moments and spectra of the keys, and both to disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import nulledit
from nulledit.config import StatisticsSettings, read_settings
from nulledit.data.corpus import Corpus, windows
from nulledit.errors import ConfigError, StatisticsError
from nulledit.files import replacing, write_text
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.editable import make_editable
from nulledit.models.layouts import as_out_in, named_by_recipe
from nulledit.models.load import cache_folder
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import beginning, chunks_by_length, collate, pad_id
from nulledit.reading import MAX_SETTINGS, one_line, parse_json, read_text

FORMAT = 1
MAX_WIDTH = 2**17
"""Of keys. The widest MLP of an open model, of LLaMA3 405B, has 53,248; a matrix of more than this
would not fit into memory."""
MAX_ROUNDING = 0.01
"""How far rounding may move an eigenvector; float16 moves one by less than 0.001."""
SORTED_TOKENS = 32768  # windows are sorted by length within so many tokens
SAVE_EVERY = 60.0  # seconds between savings of unfinished sums


@dataclass(frozen=True)
class Manifest:
    """Everything the numbers depend on."""

    model: str
    """The model's name, for people."""
    model_hash: str
    """Hash of its weights."""
    layers: tuple[int, ...]
    """Blocks whose keys were summed."""
    corpus: str
    """Name of the corpus."""
    corpus_hash: str
    """Hash of its content."""
    settings: StatisticsSettings
    """Packing, window, token budget, whether position 0 counts."""
    dtype: str
    """The model's dtype while it ran."""
    tokens: int = 0
    """Keys summed per layer."""
    windows: int = 0
    """Windows read."""
    mlp_out: str = ""
    """Path of W in a block, where a recipe's layout named it; keys of another W are others."""
    version: str = nulledit.__version__
    """Version of this library."""
    format: int = FORMAT
    """Version of the file format."""

    def to_json(self) -> str:
        """As JSON text."""
        content = asdict(self)
        if not self.mlp_out:
            del content["mlp_out"]  # as in manifests from before there was one
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read what `to_json` wrote; StatisticsError otherwise."""
        data = parse_json(text or "null", source=where, error=StatisticsError)
        if not isinstance(data, dict) or "format" not in data:
            raise StatisticsError(f"{where}: no manifest of key statistics")
        if data["format"] != FORMAT:
            raise StatisticsError(
                one_line(f"{where}: statistics of format {data['format']}, expected {FORMAT}; ")
                + " make them again"
            )
        try:
            found: Manifest = read_settings(cls, data, "")
        except (ConfigError, TypeError) as error:
            raise StatisticsError(
                one_line(f"{where}: no manifest of key statistics ({error})")
            ) from error
        for text in (
            found.model_hash,
            found.corpus_hash,
            found.dtype,
            found.version,
            found.mlp_out,
        ):
            if not (text.isascii() and text.isprintable()):
                raise StatisticsError(
                    one_line(f"{where}: {text!r} is no hash, dtype, version or path of statistics")
                )
        if not found.layers or len(set(found.layers)) < len(found.layers) or min(found.layers) < 0:
            raise StatisticsError(
                one_line(f"{where}: layers are {list(found.layers)}; expected numbers from 0")
            )
        return found


@dataclass(frozen=True)
class Statistics:
    """Spectra of the preserved keys' second moment, by layer, and where they come from."""

    manifest: Manifest
    """Provenance."""
    spectra: dict[int, Spectrum]
    """By layer."""

    def check(self, model_hash: str, layers: Sequence[int], mlp_out: str = "") -> None:
        """Raise StatisticsError unless these are of that model and its W, and cover `layers`."""
        m = self.manifest
        if m.mlp_out != mlp_out:
            raise StatisticsError(
                f"statistics are of keys of {m.mlp_out or 'the usual matrix'}, the recipe's layout "
                f"names {mlp_out or 'none'}: run `nulledit stats make` with --recipe"
            )
        if m.model_hash != model_hash:
            raise StatisticsError(
                f"statistics are of {m.model} (weights {m.model_hash[:12]}), "
                f"the model's weights are {model_hash[:12]}: make its own by `nulledit stats make`"
            )
        missing = [layer for layer in layers if layer not in self.spectra]
        if missing:
            raise StatisticsError(
                f"statistics cover layers {sorted(self.spectra)}, layers {missing} are needed: "
                f"run `nulledit stats make` with --layers {','.join(map(str, layers))}"
            )

    def save_compact(self, file: Path, thresholds: dict[int, float]) -> None:
        """One small file: all eigenvalues, and the thinner side at `thresholds` in float16."""
        tensors, starts = {}, {}
        for layer, spectrum in self.spectra.items():
            thin = spectrum.compact(thresholds[layer])
            tensors[f"eigenvalues.{layer}"] = thin.eigenvalues
            tensors[f"eigenvectors.{layer}"] = thin.eigenvectors.contiguous()
            starts[str(layer)] = thin.start
        metadata = {"manifest": self.manifest.to_json(), "starts": json.dumps(starts)}
        with replacing(file) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a folder made by `collect` or a compact file; StatisticsError otherwise."""
        if path.is_dir():
            manifest = Manifest.from_json(_text(path / "manifest.json"), str(path))
            with _opened(path / "spectra.safetensors") as (tensors, _):
                return cls(manifest, {i: tensors.spectrum(i, 0) for i in manifest.layers})
        with _opened(path) as (tensors, metadata):
            manifest = Manifest.from_json(metadata.get("manifest", ""), str(path))
            starts = parse_json(
                metadata.get("starts", "{}"), source=f"{path}: starts", error=StatisticsError
            )
            if not isinstance(starts, dict):
                raise StatisticsError(f"{path}: starts are no object")
            return cls(manifest, {i: _thin(tensors, i, starts) for i in manifest.layers})


def collect(
    model: PartialModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: StatisticsSettings,
    *,
    layers: Sequence[int],
    name: str,
    model_hash: str,
    folder: Path | None = None,
    positions: int = 2048,
    progress: bool = True,
) -> Statistics:
    """Second moments of the keys of all `layers` in one pass that stops behind the highest.

    Kept in `folder` (made for you in the cache if left out); an interrupted run goes on where its
    sums were last saved. `positions` bounds the tokens that run together. Refuses fewer tokens
    than the keys are wide: what was not sampled would pass for null space.

    The matrices of `layers` are made ready to be edited, as an editor does: keys of one layer come
    through those below.
    """
    make_editable(model.model, layers, model_hash)
    manifest = Manifest(
        model=name,
        model_hash=model_hash,
        layers=tuple(layers),
        corpus=corpus.name,
        corpus_hash=corpus.sha256,
        settings=settings,
        dtype=str(model.model.dtype).removeprefix("torch."),
        mlp_out=named_by_recipe(model.model),
    )
    folder = folder or default_folder(manifest)
    if (folder / "manifest.json").is_file():
        found = Statistics.load(folder)
        if replace(found.manifest, tokens=0, windows=0, version="") == replace(
            manifest, version=""
        ):
            return found
        raise StatisticsError(f"{folder}: holds other statistics; choose another folder")
    moments, done = _resume(folder, manifest, model)
    stream = windows(
        corpus.texts(),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        window=settings.window,
        packed=settings.packing == "packed",
        first=beginning(tokenizer),
    )
    total = settings.tokens or None
    count = next(iter(moments.values())).count
    bar = tqdm(
        total=total, initial=count, unit=" tokens", disable=None if progress else True, leave=False
    )
    saved = time.monotonic()
    with bar:
        for group in _groups(_within_budget(stream, settings), done, positions):
            before = next(iter(moments.values())).count
            _add(model, moments, group, settings, pad_id(tokenizer))
            done += len(group)
            count = next(iter(moments.values())).count
            bar.update(count - before)
            if time.monotonic() - saved > SAVE_EVERY:
                _save_partial(folder, manifest, moments, done)
                saved = time.monotonic()
    width = next(iter(moments.values())).sum.shape[0]
    if count < width:
        raise StatisticsError(
            f"{corpus.name} gives {count} tokens; the keys are {width} wide, and fewer tokens than "
            "that leave directions unsampled: use a larger corpus"
        )
    manifest = replace(manifest, tokens=count, windows=done)
    spectra = {layer: Spectrum.of(moment.value.cpu()) for layer, moment in moments.items()}
    _save(folder, manifest, moments, spectra)
    return Statistics(manifest, spectra)


def default_folder(manifest: Manifest) -> Path:
    """The place in the cache that this manifest's content has."""
    fixed = replace(manifest, tokens=0, windows=0, version="")
    key = hashlib.sha256(fixed.to_json().encode()).hexdigest()[:16]
    return cache_folder() / "statistics" / manifest.model_hash[:16] / key


def find_statistics(
    model_hash: str, layers: Sequence[int], mlp_out: str = ""
) -> Iterator[Statistics]:
    """Statistics of that model covering `layers`: shipped ones, then the cache's, largest first.

    `mlp_out`: the path of W, where a recipe's layout names it.
    """
    shipped = resources.files("nulledit") / "assets" / "statistics"
    with resources.as_file(shipped) as folder:
        for file in sorted(folder.glob("*.safetensors")):
            statistics = Statistics.load(file)
            covered = set(layers) <= set(statistics.spectra)
            if statistics.manifest.model_hash == model_hash and covered and not mlp_out:
                yield statistics
    found = []
    for file in (cache_folder() / "statistics" / model_hash[:16]).glob("*/manifest.json"):
        manifest = Manifest.from_json(_text(file), str(file.parent))
        of_it = manifest.model_hash == model_hash and manifest.mlp_out == mlp_out
        if of_it and set(layers) <= set(manifest.layers):
            found.append((manifest.tokens, file.parent))
    for _, folder in sorted(found, reverse=True):
        yield Statistics.load(folder)


def key_moments(
    model: PartialModel,
    tokenizer: PreTrainedTokenizerBase,
    token_windows: Sequence[list[int]],
    layers: Sequence[int],
) -> dict[int, SecondMoment]:
    """Second moments of the keys of `layers` on a few windows, all positions, in memory."""
    moments = _empty(model, layers)
    settings = StatisticsSettings()
    for group in _groups(iter(token_windows), 0, 2048):
        _add(model, moments, group, settings, pad_id(tokenizer))
    return moments


@torch.no_grad()
def _add(
    model: PartialModel,
    moments: dict[int, SecondMoment],
    group: Sequence[list[int]],
    settings: StatisticsSettings,
    padding: int,
) -> None:
    batch = collate(group, pad_id=padding, device=model.device)
    counted = batch.mask.bool()
    if not settings.count_first:
        counted[:, 0] = False
    full = bool(counted.all())
    with model.reading_keys(list(moments)) as keys:
        model.run(batch, last=max(moments))
    for layer, moment in moments.items():
        moment.update(keys[layer] if full else keys[layer][counted.to(keys[layer].device)])


def _groups(stream: Iterator[list[int]], skip: int, positions: int) -> Iterator[list[list[int]]]:
    """Windows in batches of similar length, without the first `skip`.

    Sorted within buffers of a fixed size, so that the order, and with it what `skip` leaves out,
    does not depend on how many run together.
    """
    buffer: list[list[int]] = []
    for window in chain(stream, [None]):
        if window is not None:
            buffer.append(window)
        if window is None or sum(map(len, buffer)) >= SORTED_TOKENS:
            ordered = sorted(buffer, key=len)
            left, skip = ordered[skip:], max(0, skip - len(ordered))
            for chunk in chunks_by_length([len(w) for w in left], positions):
                yield [left[i] for i in chunk]
            buffer = []


def _within_budget(
    stream: Iterator[list[int]], settings: StatisticsSettings
) -> Iterator[list[int]]:
    """The windows of the token budget; cut before sorting, or the shortest would fill it."""
    counted = 0
    for window in stream:
        yield window
        counted += len(window) - (not settings.count_first)
        if settings.tokens and counted >= settings.tokens:
            return


def _empty(model: PartialModel, layers: Sequence[int]) -> dict[int, SecondMoment]:
    moments = {}
    for layer in layers:
        weight = as_out_in(model.mlp_out(layer))
        elsewhere = weight.device.type in ("mps", "meta")  # without float64; offloaded
        device = torch.device("cpu") if elsewhere else weight.device
        moments[layer] = SecondMoment(weight.shape[1], device=device)
    return moments


def _save_partial(
    folder: Path, manifest: Manifest, moments: dict[int, SecondMoment], done: int
) -> None:
    metadata = {
        "manifest": manifest.to_json(),
        "windows": str(done),
        "count": str(next(iter(moments.values())).count),
    }
    with replacing(folder / "partial.safetensors") as partial:
        save_file({f"sum.{i}": m.sum.cpu() for i, m in moments.items()}, partial, metadata)


def _resume(
    folder: Path, manifest: Manifest, model: PartialModel
) -> tuple[dict[int, SecondMoment], int]:
    moments = _empty(model, manifest.layers)
    file = folder / "partial.safetensors"
    if not file.is_file():
        return moments, 0
    with _opened(file) as (tensors, metadata):
        found = Manifest.from_json(metadata.get("manifest", ""), str(file))
        if replace(found, version="") != replace(manifest, version=""):
            raise StatisticsError(
                f"{folder}: holds other unfinished statistics; choose another folder"
            )
        counts = [metadata.get(name, "") for name in ("count", "windows")]
        if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in counts):
            raise StatisticsError(f"{file}: says of no number of tokens and windows; delete it")
        for layer, moment in moments.items():
            moment.sum.copy_(tensors.tensor(f"sum.{layer}", tuple(moment.sum.shape)))
            moment.count = int(counts[0])
        return moments, int(counts[1])


def _save(
    folder: Path,
    manifest: Manifest,
    moments: dict[int, SecondMoment],
    spectra: dict[int, Spectrum],
) -> None:
    sums = {f"sum.{i}": m.sum.cpu() for i, m in moments.items()}
    parts = {}
    for layer, spectrum in spectra.items():
        parts[f"eigenvalues.{layer}"] = spectrum.eigenvalues
        parts[f"eigenvectors.{layer}"] = spectrum.eigenvectors.float().contiguous()
    for tensors, name in ((sums, "moments"), (parts, "spectra")):
        with replacing(folder / f"{name}.safetensors") as partial:
            save_file(tensors, partial)
    write_text(folder / "manifest.json", manifest.to_json())  # last: it says "complete"
    (folder / "partial.safetensors").unlink(missing_ok=True)


@dataclass(frozen=True)
class _Tensors:
    """A safetensors file whose shapes are checked in its head, before a tensor is read."""

    file: Path
    """For messages."""
    opened: Any
    """As `safe_open` gives it."""

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

    def spectrum(self, layer: int, start: int) -> Spectrum:
        """The spectrum of a layer: a possible one, with eigenvectors of length 1."""
        names = f"eigenvalues.{layer}", f"eigenvectors.{layer}"
        first, second = map(self.shape, names)
        d, m = first[0] if first else 0, second[-1] if second else 0
        matching = (first, second) == ((d,), (d, m)) and 0 < d <= MAX_WIDTH
        if not matching or not 0 <= start <= start + m <= d:
            raise StatisticsError(
                f"{self.file}: layer {layer} has eigenvalues {list(first)} and eigenvectors "
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
        return Spectrum(values, vectors, start)


def _thin(tensors: _Tensors, layer: int, starts: Mapping[str, Any]) -> Spectrum:
    """The spectrum of a layer of a compact file, whose rounding is taken back."""
    start = starts.get(str(layer))
    if type(start) is not int:
        raise StatisticsError(f"{tensors.file}: says of no first eigenvector of layer {layer}")
    rounded = tensors.spectrum(layer, start)
    found = rounded.orthonormal()
    moved = (found.eigenvectors - rounded.eigenvectors).norm(dim=0)
    if not (moved <= MAX_ROUNDING).all():  # also where it is nan
        raise StatisticsError(f"{tensors.file}: eigenvectors.{layer} are not orthogonal")
    return found


@contextmanager
def _opened(file: Path) -> Iterator[tuple[_Tensors, dict[str, str]]]:
    """Tensors and metadata of a safetensors file; nothing but its head is read.

    safetensors itself refuses a head of more than 100 MB, and shapes that the file's size doesn't
    agree with.
    """
    if not file.is_file():
        kind = "not a regular file" if file.exists() else "no such file"
        raise StatisticsError(f"{file}: no readable statistics file ({kind})")
    try:
        with safe_open(file, "pt") as opened:
            yield _Tensors(file, opened), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise StatisticsError(one_line(f"{file}: no readable statistics file ({error})")) from error


def _text(file: Path) -> str:
    try:
        return read_text(file, most=MAX_SETTINGS, error=StatisticsError, what="manifest")
    except StatisticsError as error:
        raise StatisticsError(f"{error}: no readable manifest of statistics") from None
