"""Corpus and model to second moments and spectra of the keys, and both to disk."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file

from nulledit.config import StatisticsSettings
from nulledit.data.corpus import Corpus, windows
from nulledit.errors import StatisticsError
from nulledit.io.files import replacing
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.editable_model import EditableModel
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.layouts import as_out_in, stored_weight
from nulledit.models.quantized import make_editable
from nulledit.models.tokens import (
    beginning,
    check_embedded,
    chunks_by_length,
    context_length,
)
from nulledit.parallel.ranks import Ranks
from nulledit.statistics.found import default_folder
from nulledit.statistics.manifest import (
    UNCHECKED,
    Manifest,
    check_file,
    read_manifest,
    write_manifest,
)
from nulledit.statistics.names import NameEnds
from nulledit.statistics.spectra import Statistics
from nulledit.statistics.tensor_files import (
    MAX_WIDTH,
    MOMENTS,
    PARTIAL,
    SPECTRA,
    opened_file,
    save_alone,
    spectrum_tensors,
    sums_of,
)

logger = logging.getLogger(__name__)

SORTED_TOKENS = 32768  # windows are sorted by length within so many tokens
SAVE_EVERY = 60.0  # seconds between savings of unfinished sums, or more where these take long
Progress = Callable[[str, int, int], None]
"""Called with "tokens", how many were run, and how many there will be; 0: nobody knows."""
ROUND = 8  # batches that each of several ranks runs before they ask whether to save


def collect(
    model: EditableModel,
    corpus: Corpus,
    settings: StatisticsSettings,
    *,
    layers: Sequence[int],
    name: str,
    model_hash: str,
    folder: str | Path | None = None,
    positions: int = 2048,
    progress: Progress | None = None,
    inputs: bool = False,
) -> Statistics:
    """Second moments of the keys of all `layers` in one pass that stops behind the highest.

    `inputs`: of the MLPs' inputs instead, each with a 1 at its end, so that their mean is known,
    too; position 0 is left out. Gated edits need them.

    Kept in `folder` (made for you in the cache if left out); an interrupted run goes on where its
    sums were last saved. `positions` bounds the tokens that run together. Refuses fewer tokens
    than the keys are wide: what was not sampled would pass for null space.

    The matrices of `layers` are made ready to be edited, as an editor does: keys of one layer come
    through those below.
    """
    found = collect_together(
        Ranks(),
        model,
        corpus,
        settings,
        layers=layers,
        name=name,
        model_hash=model_hash,
        folder=folder,
        positions=positions,
        progress=progress,
        inputs=inputs,
    )
    assert found is not None
    return found


def collect_together(
    ranks: Ranks,
    model: EditableModel,
    corpus: Corpus,
    settings: StatisticsSettings,
    *,
    layers: Sequence[int],
    name: str,
    model_hash: str,
    folder: str | Path | None = None,
    positions: int = 2048,
    progress: Progress | None = None,
    inputs: bool = False,
) -> Statistics | None:
    """As `collect`, by several ranks: statistics on rank 0, which keeps them, else None.

    Each rank reads the whole corpus and runs every `size`-th batch of windows, the same ones that
    one process would run; so only the order of the float64 sums differs. RankError where ranks have
    other models, corpora or settings.
    """
    _check_window(model, settings)
    make_editable(model.model, model.layout, layers, model_hash)
    if inputs:
        settings = replace(settings, count_first=False)
    manifest = Manifest(
        model=name,
        model_hash=model_hash,
        layers=tuple(layers),
        corpus=corpus.name,
        corpus_hash=corpus.sha256,
        settings=settings,
        dtype=str(model.model.dtype).removeprefix("torch."),
        mlp_out=model.named_matrix,
        inputs=inputs,
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
    moments, done = (
        _resume(folder, manifest, model) if ranks.first else (_empty(model, layers, inputs), 0)
    )
    counted = next(iter(moments.values())).count
    done, counted = ranks.from_first([done, counted])[0]
    stream = _within_budget(_windows(model, corpus, settings), settings)
    pace, read = _Pace(), hashlib.sha256()
    ends = NameEnds(model.tokenizer) if settings.names else None
    rounds = 1 if ranks.alone else ROUND * ranks.size
    for number, group in enumerate(_groups(stream, done, positions)):
        if number % ranks.size == ranks.rank:
            _add(model, moments, group, settings, inputs, ends)
        done += len(group)
        counted += sum(len(window) - (not settings.count_first) for window in group)
        if progress:
            progress("tokens", counted, settings.tokens)
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
    _check_sampled(corpus, moments)
    if not ranks.alone:
        _save_partial(folder, manifest, moments, done)  # a rank that dies now costs nothing
    manifest = replace(manifest, tokens=count, windows=done)
    return finished(folder, manifest, moments)


def _windows(
    model: EditableModel, corpus: Corpus, settings: StatisticsSettings
) -> Iterator[list[int]]:
    return windows(
        corpus.texts(),
        lambda text: model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        window=settings.window,
        packed=settings.packing == "packed",
        first=beginning(model.tokenizer),
    )


def _check_window(model: EditableModel, settings: StatisticsSettings) -> None:
    context = context_length(model.model.config)
    if settings.window > context:
        raise StatisticsError(
            f"windows of {settings.window} tokens are longer than the model's context of {context}"
        )


def _check_sampled(corpus: Corpus, moments: dict[int, SecondMoment]) -> None:
    """StatisticsError where a layer's keys are wider than the tokens that were seen are many."""
    least = min(moments.values(), key=lambda moment: moment.sampled - moment.width)
    if least.sampled < least.width:
        whom = " to the expert with most of them" if least.tokens else ""
        raise StatisticsError(
            f"{corpus.name} gives {least.sampled} tokens{whom}; the keys are {least.width} wide, "
            "and fewer tokens than that leave directions unsampled: use a larger corpus"
        )


def finished(folder: Path, manifest: Manifest, moments: dict[int, SecondMoment]) -> Statistics:
    """Statistics of complete sums, kept in `folder`."""
    spectra = {layer: moment.spectrum() for layer, moment in moments.items()}
    _save(folder, manifest, moments, spectra)
    return Statistics(manifest, spectra)


def read_moments(folder: Path) -> tuple[Manifest, dict[int, SecondMoment]]:
    """The sums in a folder that `collect` or `merge_statistics` made; StatisticsError otherwise."""
    if not folder.is_dir():
        kind = "is a compact file, which holds no sums" if folder.is_file() else "no such folder"
        raise StatisticsError(f"{folder}: {kind}; expected a folder made by `nulledit stats make`")
    manifest, hashes = read_manifest(folder)
    check_file(folder / MOMENTS, hashes)
    if not hashes:
        logger.warning("%s: %s", folder, UNCHECKED)
    if manifest.tokens < 1:
        raise StatisticsError(f"{folder}: manifest counts {manifest.tokens} tokens")
    moments: dict[int, SecondMoment] = {}
    with opened_file(folder / MOMENTS) as (tensors, _):
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
            moments[layer] = SecondMoment(width, *blocks)
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


def _bring_together(ranks: Ranks, moments: dict[int, SecondMoment], read: hashlib._Hash) -> None:
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
    check_file(folder / MOMENTS, read_manifest(folder)[1])
    found = Statistics.load(folder)
    if found.manifest.uncounted() != manifest.uncounted():
        raise StatisticsError(f"{folder}: holds other statistics; choose another folder")
    return found


def key_moments(
    model: EditableModel,
    token_windows: Sequence[list[int]],
    layers: Sequence[int],
    *,
    inputs: bool = False,
) -> dict[int, SecondMoment]:
    """Second moments of the keys of `layers` on a few windows, all positions, in memory.

    `inputs`: as for `collect`.
    """
    moments = _empty(model, layers, inputs)
    settings = StatisticsSettings(count_first=not inputs)
    for group in _groups(iter(token_windows), 0, 2048):
        _add(model, moments, group, settings, inputs)
    return moments


@torch.no_grad()
def _add(
    model: EditableModel,
    moments: dict[int, SecondMoment],
    group: Sequence[list[int]],
    settings: StatisticsSettings,
    inputs: bool,
    ends: NameEnds | None = None,
) -> None:
    for window in group:
        check_embedded(window, model.vocabulary, model.tokenizer)
    batch = model.collate(group)
    counted = batch.mask.bool()
    if not settings.count_first:
        counted[:, 0] = False
    if ends:
        counted &= ends(group, counted.shape[1]).to(counted.device)
    full = bool(counted.all())
    reading = model.reading_inputs if inputs else model.reading_keys
    with reading(list(moments)) as keys:
        model.run(batch, last=max(moments))
    if inputs:
        keys = {i: torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) for i, x in keys.items()}
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


def _empty(model: EditableModel, layers: Sequence[int], inputs: bool) -> dict[int, SecondMoment]:
    moments: dict[int, SecondMoment] = {}
    for layer in layers:
        module = model.mlp_out(layer)
        weight = stored_weight(module)
        elsewhere = weight.device.type in ("mps", "meta")  # without float64; offloaded
        device = torch.device("cpu") if elsewhere else weight.device
        dense = not is_experts(module)
        experts, width = (0, as_out_in(module).shape[1]) if dense else count_and_width(module)
        if inputs:
            experts, width = 0, model.form(layer).d + 1
        moments[layer] = SecondMoment(width, experts, device=device)
    return moments


def _save_partial(
    folder: Path, manifest: Manifest, moments: dict[int, SecondMoment], done: int
) -> None:
    metadata = {
        "manifest": manifest.to_json(),
        "windows": str(done),
        "count": str(next(iter(moments.values())).count),
    }
    save_alone(folder / PARTIAL, sums_of(moments), metadata)


def _resume(
    folder: Path, manifest: Manifest, model: EditableModel
) -> tuple[dict[int, SecondMoment], int]:
    moments = _empty(model, manifest.layers, manifest.inputs)
    file = folder / PARTIAL
    if not file.is_file():
        return moments, 0
    with opened_file(file) as (tensors, metadata):
        if not tensors.check(metadata):
            logger.warning("%s: %s", file, UNCHECKED)
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
    moments: dict[int, SecondMoment],
    spectra: dict[int, Spectrum],
) -> None:
    parts: dict[str, torch.Tensor] = {}
    for layer, spectrum in spectra.items():
        parts |= spectrum_tensors(spectrum, layer, torch.float32)
    for tensors, name in ((sums_of(moments), MOMENTS), (parts, SPECTRA)):
        with replacing(folder / name) as partial:
            save_file(tensors, partial)
    write_manifest(folder, manifest, (MOMENTS, SPECTRA))  # last: it says "complete"
    (folder / PARTIAL).unlink(missing_ok=True)
