"""Which statistics there are of a model: those that come with the package, and the cache's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from nulledit.errors import StatisticsError
from nulledit.io.files import cache_folder
from nulledit.statistics.manifest import Manifest, parts_of, read_manifest
from nulledit.statistics.spectra import Statistics
from nulledit.statistics.tensor_files import opened_file


def default_folder(manifest: Manifest) -> Path:
    """The place in the cache that this manifest's content has."""
    key = hashlib.sha256(manifest.uncounted().to_json().encode()).hexdigest()[:16]
    return cache_folder() / "statistics" / manifest.model_hash[:16] / key


def find_statistics(
    model_hash: str, layers: Sequence[int], mlp_out: str = "", *, inputs: bool = False
) -> Iterator[Statistics]:
    """Statistics of that model covering `layers`: shipped ones, then the cache's, largest first.

    `mlp_out`: the path of W, where a recipe's layout names it; `inputs`: as for `collect`.
    """

    def of_it(manifest: Manifest) -> bool:
        same = manifest.model_hash == model_hash and manifest.mlp_out == mlp_out
        same = same and manifest.inputs == inputs and not manifest.settings.names
        return same and set(layers) <= set(manifest.layers)

    return _kept(of_it, f"{model_hash[:16]}/*")


def named_statistics(source: str | Path) -> Statistics:
    """Statistics at a path, or of the model that they were made under this name.

    Those of keys before those of inputs; of a kind shipped ones, then the largest. StatisticsError
    where there are none.
    """
    path = Path(source)
    if path.is_file() or (path / "manifest.json").is_file():
        return Statistics.load(path)

    def of_it(inputs: bool) -> Iterator[Statistics]:
        return _kept(lambda found: found.model == str(source) and found.inputs == inputs, "*/*")

    found = next(chain(of_it(False), of_it(True)), None)
    if found is None:
        raise StatisticsError(
            f"no statistics at or of {str(source)!r}: "
            f"make them with `nulledit stats make {source} --text ...`"
        )
    return found


def check_there(path: str | Path) -> None:
    """StatisticsError unless statistics lie at `path`; their tensors are not read."""
    refuse_empty(str(path))
    path = Path(path)
    if parts_of(path):
        return
    if path.is_dir():
        read_manifest(path)
    else:
        with opened_file(path) as (_, metadata):
            Manifest.from_json(metadata.get("manifest", ""), str(path))


def refuse_empty(path: str) -> None:
    """StatisticsError for a name that says nothing: it would be the folder where we are."""
    if not path.strip():
        raise StatisticsError(
            "statistics: the name is empty; expected their folder or file, or leave it out to have "
            "them found"
        )


def _kept(wanted: Callable[[Manifest], bool], folders: str) -> Iterator[Statistics]:
    """Those with a `wanted` manifest: shipped, then the cache's in `folders`, largest first."""
    yield from Statistics.shipped(wanted)
    found = []
    for file in (cache_folder() / "statistics").glob(f"{folders}/manifest.json"):
        manifest, _ = read_manifest(file.parent)
        if wanted(manifest):
            found.append((manifest.tokens, file.parent))
    for _, folder in sorted(found, reverse=True):
        yield Statistics.load(folder)
