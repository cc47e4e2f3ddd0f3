"""Corpus and model to second moments and spectra of the keys, and both to disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from nulledit.distributed import Ranks
from nulledit.errors import ConfigError, StatisticsError
from nulledit.files import replacing, write_text
from nulledit.linalg.blocks import (
    AnyMoment,
    AnySpectrum,
    BlockMoment,
    BlockSpectrum,
    part_names,
    parts_of,
)
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.editable import make_editable
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.layouts import as_out_in, named_by_recipe, stored_weight
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
SAVE_EVERY = 60.0  # seconds between savings of unfinished sums, or more where these take long
ROUND = 8  # batches that each of several ranks runs before they ask whether to save


@dataclass(frozen=True)
class Source:
    """One of the corpora whose sums were added."""

    corpus: str
    """Its name."""
    corpus_hash: str
    """Hash of its content."""
    tokens: int
    """Keys summed per layer."""
    windows: int
    """Windows read."""
    budget: int = 0
    """Token budget that it was read with; 0: the whole corpus."""


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
    sources: tuple[Source, ...] = ()
    """What was added up, where statistics of several corpora were; `corpus` names them all."""
    version: str = nulledit.__version__
    """Version of this library."""
    format: int = FORMAT
    """Version of the file format."""

    def to_json(self) -> str:
        """As JSON text."""
        content = asdict(self)
        for name in ("mlp_out", "sources"):
            if not content[name]:
                del content[name]  # as in manifests from before there was one
        return json.dumps(content, indent=2)

    def uncounted(self) -> Manifest:
        """What was asked for: without what was found, and by which version."""
        return replace(self, tokens=0, windows=0, version="")

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
            *(source.corpus_hash for source in found.sources),
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
    spectra: dict[int, AnySpectrum]
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

    def save_compact(self, file: str | Path, thresholds: dict[int, float]) -> None:
        """One small file: all eigenvalues, and the thinner side at `thresholds` in float16."""
        tensors: dict[str, torch.Tensor] = {}
        starts: dict[str, int] = {}
        for layer, spectrum in self.spectra.items():
            thin = spectrum.compact(thresholds[layer])
            tensors |= _tensors_of(thin, layer)
            starts |= {name: part.start for name, part in parts_of(thin, str(layer)).items()}
        metadata = {"manifest": self.manifest.to_json(), "starts": json.dumps(starts)}
        with replacing(Path(file)) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a folder made by `collect` or a compact file; StatisticsError otherwise."""
        path = Path(path)
        if path.is_dir():
            manifest = Manifest.from_json(_text(path / "manifest.json"), str(path))
            with _opened(path / "spectra.safetensors") as (tensors, _):
                found = {i: tensors.layer(i, tensors.spectrum) for i in manifest.layers}
                return cls(manifest, found)
        with _opened(path) as (tensors, metadata):
            manifest = Manifest.from_json(metadata.get("manifest", ""), str(path))
            starts = parse_json(
                metadata.get("starts", "{}"), source=f"{path}: starts", error=StatisticsError
            )
            if not isinstance(starts, dict):
                raise StatisticsError(f"{path}: starts are no object")
            found = {
                i: tensors.layer(i, lambda name: _thin(tensors, name, starts))
                for i in manifest.layers
            }
            return cls(manifest, found)


def collect(
    model: PartialModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: StatisticsSettings,
    *,
    layers: Sequence[int],
    name: str,
    model_hash: str,
    folder: str | Path | None = None,
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
    found = collect_together(
        Ranks(),
        model,
        tokenizer,
        corpus,
        settings,
        layers=layers,
        name=name,
        model_hash=model_hash,
        folder=folder,
        positions=positions,
        progress=progress,
    )
    assert found is not None
    return found


def collect_together(
    ranks: Ranks,
    model: PartialModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: StatisticsSettings,
    *,
    layers: Sequence[int],
    name: str,
    model_hash: str,
    folder: str | Path | None = None,
    positions: int = 2048,
    progress: bool = True,
) -> Statistics | None:
    """As `collect`, by several ranks: statistics on rank 0, which keeps them, else None.

    Each rank reads the whole corpus and runs every `size`-th batch of windows, the same ones that
    one process would run; so only the order of the float64 sums differs. RankError where ranks have
    other models, corpora or settings.
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
    ranks.agree(
        {
            "model": model_hash,
            "corpus": corpus.sha256,
            "setting": hashlib.sha256(f"{manifest.to_json()} {positions}".encode()).hexdigest(),
        }
    )
    folder = Path(folder or default_folder(manifest))
    found = ready(folder, manifest) if ranks.first else None
    if ranks.from_first(found is not None)[0]:
        return found
    moments, done = _resume(folder, manifest, model) if ranks.first else (_empty(model, layers), 0)
    counted = next(iter(moments.values())).count
    done, counted = ranks.from_first([done, counted])[0]
    stream = windows(
        corpus.texts(),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        window=settings.window,
        packed=settings.packing == "packed",
        first=beginning(tokenizer),
    )
    bar = tqdm(
        total=settings.tokens or None,
        initial=counted,
        unit=" tokens",
        disable=None if progress else True,
        leave=False,
    )
    pace = _Pace()
    read = hashlib.sha256()
    rounds = 1 if ranks.alone else ROUND * ranks.size
    with bar:
        for number, group in enumerate(_groups(_within_budget(stream, settings), done, positions)):
            if number % ranks.size == ranks.rank:
                _add(model, moments, group, settings, pad_id(tokenizer))
            done += len(group)
            bar.update(sum(len(window) - (not settings.count_first) for window in group))
            if not ranks.alone:
                read.update(json.dumps(group).encode())
            if (number + 1) % rounds == 0 and ranks.from_first(pace.due())[0]:
                with pace.saving():
                    _bring_together(ranks, moments, read)
                    if ranks.first:
                        _save_partial(folder, manifest, moments, done)
    _bring_together(ranks, moments, read)
    if not ranks.first:
        return None
    count = next(iter(moments.values())).count
    least = min(moments.values(), key=lambda moment: moment.sampled - moment.width)
    if least.sampled < least.width:
        whom = " to the expert with most of them" if isinstance(least, BlockMoment) else ""
        raise StatisticsError(
            f"{corpus.name} gives {least.sampled} tokens{whom}; the keys are {least.width} wide, "
            "and fewer tokens than that leave directions unsampled: use a larger corpus"
        )
    if not ranks.alone:
        _save_partial(folder, manifest, moments, done)  # a rank that dies now costs nothing
    manifest = replace(manifest, tokens=count, windows=done)
    return finished(folder, manifest, moments)


def finished(folder: Path, manifest: Manifest, moments: dict[int, AnyMoment]) -> Statistics:
    """Statistics of complete sums, kept in `folder`."""
    spectra = {layer: moment.spectrum() for layer, moment in moments.items()}
    _save(folder, manifest, moments, spectra)
    return Statistics(manifest, spectra)


def read_moments(folder: Path) -> tuple[Manifest, dict[int, AnyMoment]]:
    """The sums in a folder that `collect` or `merge_statistics` made; StatisticsError otherwise."""
    if not folder.is_dir():
        kind = "is a compact file, which holds no sums" if folder.is_file() else "no such folder"
        raise StatisticsError(f"{folder}: {kind}; expected a folder made by `nulledit stats make`")
    manifest = Manifest.from_json(_text(folder / "manifest.json"), str(folder))
    if manifest.tokens < 1:
        raise StatisticsError(f"{folder}: manifest counts {manifest.tokens} tokens")
    moments: dict[int, AnyMoment] = {}
    with _opened(folder / "moments.safetensors") as (tensors, _):
        for layer in manifest.layers:
            shape = tensors.shape(f"sum.{layer}")
            width = shape[-1] if shape else 0
            blocks = shape[:-2]
            if (*blocks, width, width) != shape or len(blocks) > 1 or not 0 < width <= MAX_WIDTH:
                raise StatisticsError(
                    f"{folder}: sum.{layer} has the shape {list(shape)}; expected [d, d] or "
                    f"[experts, d, d], d at most {MAX_WIDTH}"
                )
            total = tensors.tensor(f"sum.{layer}", shape)
            moments[layer] = BlockMoment(blocks[0], width) if blocks else SecondMoment(width)
            moments[layer].restore(total, [manifest.tokens, *tensors.tokens(layer, total)])
    return manifest, moments


class _Pace:
    """When to save: not so often that saving takes more than a tenth of the time."""

    def __init__(self) -> None:
        self.next = time.monotonic() + SAVE_EVERY

    def due(self) -> bool:
        return time.monotonic() > self.next

    @contextmanager
    def saving(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.next = end + max(SAVE_EVERY, 10 * (end - start))


def _bring_together(ranks: Ranks, moments: dict[int, AnyMoment], read: hashlib._Hash) -> None:
    """All sums and counts into rank 0's; RankError unless all ranks saw the same windows."""
    if ranks.alone:
        return
    ranks.agree({"tokenised text": read.hexdigest()})
    counts = [note for note, _ in ranks.gather([moment.counts for moment in moments.values()])]
    for moment, of_layer in zip(moments.values(), zip(*counts, strict=True), strict=True):
        ranks.sum_at_first(moment.sum)
        whole = [sum(of_ranks) for of_ranks in zip(*of_layer, strict=True)]
        moment.restore(moment.sum, whole if ranks.first else [0] * len(whole))


def ready(folder: Path, manifest: Manifest) -> Statistics | None:
    """Statistics that are there already; StatisticsError if they are others."""
    if not (folder / "manifest.json").is_file():
        return None
    found = Statistics.load(folder)
    if found.manifest.uncounted() != manifest.uncounted():
        raise StatisticsError(f"{folder}: holds other statistics; choose another folder")
    return found


def default_folder(manifest: Manifest) -> Path:
    """The place in the cache that this manifest's content has."""
    key = hashlib.sha256(manifest.uncounted().to_json().encode()).hexdigest()[:16]
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
) -> dict[int, AnyMoment]:
    """Second moments of the keys of `layers` on a few windows, all positions, in memory."""
    moments = _empty(model, layers)
    settings = StatisticsSettings()
    for group in _groups(iter(token_windows), 0, 2048):
        _add(model, moments, group, settings, pad_id(tokenizer))
    return moments


@torch.no_grad()
def _add(
    model: PartialModel,
    moments: dict[int, AnyMoment],
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


def _empty(model: PartialModel, layers: Sequence[int]) -> dict[int, AnyMoment]:
    moments: dict[int, AnyMoment] = {}
    for layer in layers:
        module = model.mlp_out(layer)
        weight = stored_weight(module)
        elsewhere = weight.device.type in ("mps", "meta")  # without float64; offloaded
        device = torch.device("cpu") if elsewhere else weight.device
        if is_experts(module):
            moments[layer] = BlockMoment(*count_and_width(module), device=device)
        else:
            moments[layer] = SecondMoment(as_out_in(module).shape[1], device=device)
    return moments


def _save_partial(
    folder: Path, manifest: Manifest, moments: dict[int, AnyMoment], done: int
) -> None:
    metadata = {
        "manifest": manifest.to_json(),
        "windows": str(done),
        "count": str(next(iter(moments.values())).count),
    }
    with replacing(folder / "partial.safetensors") as partial:
        save_file(_sums(moments), partial, metadata)


def _resume(
    folder: Path, manifest: Manifest, model: PartialModel
) -> tuple[dict[int, AnyMoment], int]:
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
            total = tensors.tensor(f"sum.{layer}", tuple(moment.sum.shape))
            moment.restore(total, [int(counts[0]), *tensors.tokens(layer, total)])
        return moments, int(counts[1])


def _save(
    folder: Path,
    manifest: Manifest,
    moments: dict[int, AnyMoment],
    spectra: dict[int, AnySpectrum],
) -> None:
    parts: dict[str, torch.Tensor] = {}
    for layer, spectrum in spectra.items():
        parts |= _tensors_of(spectrum, layer, torch.float32)
    for tensors, name in ((_sums(moments), "moments"), (parts, "spectra")):
        with replacing(folder / f"{name}.safetensors") as partial:
            save_file(tensors, partial)
    write_text(folder / "manifest.json", manifest.to_json())  # last: it says "complete"
    (folder / "partial.safetensors").unlink(missing_ok=True)


def _sums(moments: Mapping[int, AnyMoment]) -> dict[str, torch.Tensor]:
    tensors = {f"sum.{i}": m.sum.cpu() for i, m in moments.items()}
    blocks = {i: m for i, m in moments.items() if isinstance(m, BlockMoment)}
    return tensors | {f"tokens.{i}": m.tokens for i, m in blocks.items()}


def _tensors_of(
    spectrum: AnySpectrum, layer: int, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """What `_Tensors.layer` reads, with the eigenvectors in `dtype` or as they are."""
    tensors = {}
    if isinstance(spectrum, BlockSpectrum):
        tensors[f"tokens.{layer}"] = torch.tensor(spectrum.tokens, dtype=torch.float64)
    for name, part in parts_of(spectrum, str(layer)).items():
        tensors[f"eigenvalues.{name}"] = part.eigenvalues
        tensors[f"eigenvectors.{name}"] = part.eigenvectors.to(dtype).contiguous()
    return tensors


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

    def tokens(self, layer: int, total: torch.Tensor) -> list[int]:
        """Of each expert, where the layer's sum `total` has a block for each; else none."""
        if total.ndim < 3:
            return []
        found = self.tensor(f"tokens.{layer}", (len(total),)).clamp(0, 2**53)
        return [int(number) for number in found.tolist()]

    def layer(self, layer: int, read: Callable[[str], Spectrum]) -> AnySpectrum:
        """The spectrum of a layer, each part as `read` finds it by its name."""
        held = set(self.opened.keys())
        if f"tokens.{layer}" not in held:
            return read(str(layer))
        (count,) = self.shape(f"tokens.{layer}") or (0,)
        tokens = self.tensor(f"tokens.{layer}", (count,)).clamp(0, 2**53).tolist()
        blocks = {i: read(name) for i, name in part_names(str(layer), count, held).items()}
        width = next(iter(blocks.values())).d_in if blocks else 0
        try:
            return BlockSpectrum(blocks, tuple(map(int, tokens)), width)
        except StatisticsError as error:
            raise StatisticsError(f"{self.file}: layer {layer}: {error}") from error

    def spectrum(self, name: str, start: int = 0) -> Spectrum:
        """A layer's spectrum, or an expert's: a possible one, with eigenvectors of length 1."""
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
        return Spectrum(values, vectors, start)


def _thin(tensors: _Tensors, name: str, starts: Mapping[str, Any]) -> Spectrum:
    """A spectrum of a compact file, whose rounding is taken back."""
    start = starts.get(name)
    if type(start) is not int:
        raise StatisticsError(f"{tensors.file}: says of no first eigenvector of layer {name}")
    rounded = tensors.spectrum(name, start)
    found = rounded.orthonormal()
    moved = (found.eigenvectors - rounded.eigenvectors).norm(dim=0)
    if not (moved <= MAX_ROUNDING).all():  # also where it is nan
        raise StatisticsError(f"{tensors.file}: eigenvectors.{name} are not orthogonal")
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
