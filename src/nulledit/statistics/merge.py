"""Statistics of several corpora made one: a second moment is a sum, so sums add up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nulledit._version import __version__
from nulledit.errors import StatisticsError
from nulledit.statistics.found import default_folder
from nulledit.statistics.manifest import Manifest, Source
from nulledit.statistics.spectra import Statistics
from nulledit.statistics.sums import finished, read_moments, ready


def merge_statistics(folders: Sequence[str | Path], folder: str | Path | None = None) -> Statistics:
    """Add the sums of statistics in `folders`, and keep them in `folder` (or in the cache).

    Equal to one pass over all the corpora, as far as their windows are the same. StatisticsError
    where models, layers, dtypes or windows differ, where one corpus would count twice, or where
    `folder` holds something.
    """
    if len(folders) < 2:
        raise StatisticsError("give two or more statistics to merge")
    first, *others = map(Path, folders)
    manifest, moments = read_moments(first)
    for other in others:
        theirs, more = read_moments(other)
        manifest = _joined(manifest, theirs, f"{first}", f"{other}")
        for layer, moment in moments.items():
            if moment.sum.shape != more[layer].sum.shape:
                raise StatisticsError(
                    f"{other}: the sum of layer {layer} is {list(more[layer].sum.shape)}, that of "
                    f"{first} {list(moment.sum.shape)}"
                )
            counts = zip(moment.counts, more[layer].counts, strict=True)
            moment.restore(moment.sum + more[layer].sum, [a + b for a, b in counts])
    folder = Path(folder or default_folder(manifest))
    there = ready(folder, manifest)
    if there is not None:
        return there
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StatisticsError(f"{folder}: is there already; choose another --out")
    return finished(folder, manifest, moments)


def _joined(a: Manifest, b: Manifest, first: str, second: str) -> Manifest:
    """The manifest of both; StatisticsError where they can't be added."""
    for what, mine, theirs in (
        ("the model's weights", a.model_hash[:12], b.model_hash[:12]),
        ("layers", sorted(a.layers), sorted(b.layers)),
        ("the model's dtype", a.dtype, b.dtype),
        ("the matrix W", a.mlp_out or "the usual one", b.mlp_out or "the usual one"),
        ("of MLPs' inputs", a.inputs, b.inputs),
        ("packing", a.settings.packing, b.settings.packing),
        ("the window", a.settings.window, b.settings.window),
        ("position 0 counted", a.settings.count_first, b.settings.count_first),
        ("names alone counted", a.settings.names, b.settings.names),
    ):
        if mine != theirs:
            raise StatisticsError(
                f"{second} can't be added to {first}: {what} {theirs}, there {mine}; make both "
                "with the same model and settings"
            )
    held = {source.corpus_hash for source in _sources(a)}
    for source in _sources(b):
        if source.corpus_hash in held:
            raise StatisticsError(
                f"{second} can't be added to {first}: both are of {source.corpus}, whose keys "
                "would count twice"
            )
    sources = _sources(a) + _sources(b)
    hashes = "\n".join(f"{s.corpus_hash} {s.budget}" for s in sources)
    return replace(
        a,
        corpus=" + ".join(source.corpus for source in sources),
        corpus_hash=hashlib.sha256(hashes.encode()).hexdigest(),
        settings=replace(a.settings, tokens=0),
        tokens=a.tokens + b.tokens,
        windows=a.windows + b.windows,
        sources=sources,
        version=__version__,
    )


def _sources(manifest: Manifest) -> tuple[Source, ...]:
    return manifest.sources or (
        Source(
            manifest.corpus,
            manifest.corpus_hash,
            manifest.tokens,
            manifest.windows,
            manifest.settings.tokens,
        ),
    )
