"""Corpus and model to second moments of keys, or of the MLPs' inputs, or both in one pass."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from nulledit.config import StatisticsSettings
from nulledit.data.corpus import Corpus, windows
from nulledit.errors import StatisticsError
from nulledit.linalg.moments import SecondMoment
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.quantized import make_editable
from nulledit.models.tokens import beginning, check_embedded, context_length
from nulledit.parallel.ranks import Ranks
from nulledit.statistics.found import default_folder
from nulledit.statistics.manifest import INPUTS, KEYS, Manifest
from nulledit.statistics.names import NameEnds
from nulledit.statistics.spectra import Statistics
from nulledit.statistics.sums import Sums, empty_moments, ready

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
    """Second moments of the keys of all `layers` in one pass that stops after the highest.

    `inputs`: of the MLPs' inputs instead, each with a 1 at its end, so that their mean is known,
    too; position 0 is left out. Gated edits need them.

    Kept in `folder` (made for you in the cache if left out); an interrupted run goes on where its
    sums were last saved. `positions` bounds the tokens that run together. Refuses fewer tokens
    than the keys are wide: what was not sampled would pass for null space.

    The matrices of `layers` are made ready to be edited, as an editor does: keys of one layer come
    through those below.
    """
    kind = INPUTS if inputs else KEYS
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
        of=(kind,),
    )
    assert found is not None
    return found[kind]


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
    of: Sequence[str] = (KEYS,),
) -> dict[str, Statistics] | None:
    """As `collect`, by several ranks: statistics on rank 0, which keeps them, else None.

    `of`: keys, inputs, or both in one pass over the text; the statistics of each are found by that
    name, and equal those of a pass of its own. Both in one `folder` are in folders of these names.

    Each rank reads the whole corpus and runs every `size`-th batch of windows, the same ones that
    one process would run; so only the order of the float64 sums differs. RankError where ranks have
    other models, corpora or settings.
    """
    _check_window(model, settings)
    make_editable(model.model, model.layout, layers, model_hash)
    usual = Manifest(
        model=name,
        model_hash=model_hash,
        layers=tuple(layers),
        corpus=corpus.name,
        corpus_hash=corpus.sha256,
        settings=settings,
        dtype=str(model.model.dtype).removeprefix("torch."),
        mlp_out=model.named_matrix,
    )
    manifests = {kind: usual.of_inputs() if kind == INPUTS else usual for kind in of}
    asked = [*(manifest.to_json() for manifest in manifests.values()), f"{positions}"]
    ranks.agree(
        {
            "model": model_hash,
            "corpus": corpus.sha256,
            "setting": hashlib.sha256(" ".join(asked).encode()).hexdigest(),
        }
    )
    places = {
        kind: Path(folder, kind if len(of) > 1 else "") if folder else default_folder(manifest)
        for kind, manifest in manifests.items()
    }
    found = {}
    if ranks.first:
        there = {kind: ready(places[kind], manifest) for kind, manifest in manifests.items()}
        found = {kind: statistics for kind, statistics in there.items() if statistics}
    made = ranks.from_first(list(found))[0]
    sums = [
        Sums(manifest, places[kind], empty_moments(model, layers, manifest.inputs))
        for kind, manifest in manifests.items()
        if kind not in made
    ]
    if sums:
        _read(ranks, model, corpus, sums, positions, progress)
    if not ranks.first:
        return None
    found |= {each.manifest.kind: each.finished() for each in sums}
    return {kind: found[kind] for kind in of}


def _read(
    ranks: Ranks,
    model: EditableModel,
    corpus: Corpus,
    sums: Sequence[Sums],
    positions: int,
    progress: Progress | None,
) -> None:
    """Read the text into `sums`, each from where it was last saved."""
    if ranks.first:
        for each in sums:
            each.resume()
    begun: list[list[int]] = ranks.from_first([[each.done, each.tokens] for each in sums])[0]
    for each, (windows_held, _) in zip(sums, begun, strict=True):
        each.done = windows_held
    done, counted = min(begun)
    settings = sums[0].manifest.settings
    stream = _within_budget(_windows(model, corpus, settings), settings.tokens)
    pace, read = _Pace(), hashlib.sha256()
    ends = NameEnds(model.tokenizer) if settings.names else None
    rounds = 1 if ranks.alone else ROUND * ranks.size
    for number, group in enumerate(_groups(stream, done, positions)):
        if number % ranks.size == ranks.rank:
            _add(model, group, [Part.of(each, done) for each in sums], ends)
        done += len(group)
        counted += sum(map(len, group))
        if progress:
            progress("tokens", counted, settings.tokens)
        if not ranks.alone:
            read.update(json.dumps(group).encode())
        if (number + 1) % rounds == 0 and ranks.from_first(pace.due())[0]:
            with pace.saving():
                _bring_together(ranks, sums, read)
                _save(ranks, sums, done)
    _bring_together(ranks, sums, read)
    if ranks.first:
        for each in sums:
            each.done = max(each.done, done)
            each.check_sampled()
    if not ranks.alone:
        _save(ranks, sums, done)  # a rank that dies now costs nothing


def _save(ranks: Ranks, sums: Sequence[Sums], done: int) -> None:
    """Have rank 0 keep `sums`, each by itself: one may be ahead where a process died in between."""
    if ranks.first:
        for each in sums:
            each.done = max(each.done, done)
            each.save()


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


def _bring_together(ranks: Ranks, sums: Sequence[Sums], read: hashlib._Hash) -> None:
    """All sums and counts into rank 0's; RankError unless all ranks saw the same windows."""
    if ranks.alone:
        return
    ranks.agree({"tokenised text": read.hexdigest()})
    moments = [moment for each in sums for moment in each.moments.values()]
    counts = [note for note, _ in ranks.gather([moment.counts for moment in moments])]
    for moment, of_layer in zip(moments, zip(*counts, strict=True), strict=True):
        ranks.sum_at_first(moment.sum)
        whole = [sum(of_ranks) for of_ranks in zip(*of_layer, strict=True)]
        moment.restore(moment.sum, whole if ranks.first else [0] * len(whole))


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
    moments = empty_moments(model, layers, inputs)
    for group in _groups(iter(token_windows), 0, 2048):
        _add(model, group, [Part(moments, inputs, not inputs)])
    return moments


class Part(NamedTuple):
    """What one set of statistics takes of a batch of windows."""

    moments: Mapping[int, SecondMoment]
    """By layer."""
    inputs: bool
    """Whether they are of the MLPs' inputs."""
    first: bool
    """Whether position 0 counts."""
    held: int = 0
    """How many windows of the batch they hold already."""

    @classmethod
    def of(cls, sums: Sums, start: int) -> Part:
        """What `sums` take of a batch that begins with window number `start`."""
        manifest = sums.manifest
        held = max(0, sums.done - start)
        return cls(sums.moments, manifest.inputs, manifest.settings.count_first, held)


@torch.no_grad()
def _add(
    model: EditableModel,
    group: Sequence[list[int]],
    parts: Sequence[Part],
    ends: NameEnds | None = None,
) -> None:
    for window in group:
        check_embedded(window, model.vocabulary, model.tokenizer)
    batch = model.collate(group)
    own = batch.mask.bool()
    if ends:
        own &= ends(group, own.shape[1]).to(own.device)
    with ExitStack() as stack:
        read = []
        for part in parts:
            reading = model.reading_inputs if part.inputs else model.reading_keys
            read.append(stack.enter_context(reading(list(part.moments))))
        model.run(batch, last=max(max(part.moments) for part in parts))
    for part, found in zip(parts, read, strict=True):
        counted = own.clone()
        counted[: part.held] = False
        if not part.first:
            counted[:, 0] = False
        full = bool(counted.all())
        for layer, moment in part.moments.items():
            rows = found[layer]
            if part.inputs:
                rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
            moment.update(rows if full else rows[counted.to(rows.device)])


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


def _within_budget(stream: Iterator[list[int]], tokens: int) -> Iterator[list[int]]:
    """The windows of a budget of `tokens` to read, 0: all; what is counted of them is the same for
    keys and for inputs. Cut before sorting, or the shortest would fill it."""
    read = 0
    for window in stream:
        yield window
        read += len(window)
        if tokens and read >= tokens:
            return
