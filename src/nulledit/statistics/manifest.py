"""What statistics of preserved keys depend on, and the hashes of the files that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from nulledit._version import __version__
from nulledit.config import StatisticsSettings
from nulledit.errors import ConfigError, StatisticsError
from nulledit.io.files import sha256_of, write_text
from nulledit.io.settings import Expected, Several, checked, read_settings
from nulledit.io.untrusted import MAX_SETTINGS, one_line, parse_json, read_text

FORMAT = 1
FILE = "manifest.json"
KEYS, INPUTS = "keys", "inputs"
"""What statistics are of: names of kinds, and of the folders of both."""
HASHES = "sha256"
"""Key of the hashes of a folder's files, beside the manifest's own fields."""
UNCHECKED = "made before hashes were kept with statistics: damage to them can't be seen"


Plain = Annotated[str, Expected("plain ASCII", lambda text: text.isascii() and text.isprintable())]


@checked
@dataclass(frozen=True)
class Source:
    """One of the corpora whose sums were added."""

    corpus: str
    """Its name."""
    corpus_hash: Plain
    """Hash of its content."""
    tokens: int
    """Keys summed per layer."""
    windows: int
    """Windows read."""
    budget: int = 0
    """Token budget that it was read with; 0: the whole corpus."""


@checked
@dataclass(frozen=True)
class Manifest:
    """Everything the numbers depend on."""

    model: str
    """The model's name, for people."""
    model_hash: Plain
    """Hash of its weights."""
    layers: Several[int]
    """Blocks whose keys were summed."""
    corpus: str
    """Name of the corpus."""
    corpus_hash: Plain
    """Hash of its content."""
    settings: StatisticsSettings
    """Packing, window, token budget, whether position 0 counts."""
    dtype: Plain
    """The model's dtype while it ran."""
    tokens: int = 0
    """Keys summed per layer."""
    windows: int = 0
    """Windows read."""
    mlp_out: Plain = ""
    """Path of W in a block, where a recipe's layout named it; keys of another W are others."""
    inputs: bool = False
    """Whether they are of the inputs of MLPs with a 1 after them, for gated edits, and not of
    keys."""
    sources: Several[Source] = ()
    """What was added up, where statistics of several corpora were; `corpus` names them all."""
    version: Plain = __version__
    """Version of this library."""
    format: int = FORMAT
    """Version of the file format."""

    @property
    def kind(self) -> str:
        """What the statistics are of: keys, or inputs."""
        return INPUTS if self.inputs else KEYS

    def of_inputs(self) -> Manifest:
        """The same of inputs, whose position 0 is always left out."""
        return replace(self, inputs=True, settings=replace(self.settings, count_first=False))

    def to_json(self) -> str:
        """As JSON text."""
        content = asdict(self)
        for name in ("mlp_out", "inputs", "sources"):
            if not content[name]:
                del content[name]  # as in manifests from before there was one
        if not self.settings.names:
            del content["settings"]["names"]
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
            found = read_settings(cls, data)
        except ConfigError as error:
            raise StatisticsError(
                one_line(f"{where}: no manifest of key statistics ({error})")
            ) from error
        if not found.layers or len(set(found.layers)) < len(found.layers) or min(found.layers) < 0:
            raise StatisticsError(
                one_line(f"{where}: layers are {list(found.layers)}; expected numbers from 0")
            )
        return found


def parts_of(folder: Path) -> dict[str, Path]:
    """Where statistics of keys and of inputs lie in a folder that one pass made of both."""
    found = {kind: folder / kind for kind in (KEYS, INPUTS)}
    return {kind: part for kind, part in found.items() if (part / FILE).is_file()}


def write_manifest(folder: Path, manifest: Manifest, files: Sequence[str]) -> None:
    """Write it with the hashes of itself and of `files` in `folder`: that says "complete"."""
    content = json.loads(manifest.to_json())
    content[HASHES] = {name: sha256_of(folder / name) for name in files}
    content[HASHES] |= {FILE: _hash_of(content)}
    write_text(folder / FILE, json.dumps(content, indent=2))


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, str]]:
    """It and the hashes of the other files, none where it is from before they were kept.

    StatisticsError where it is no manifest, or another one than was written.
    """
    file = folder / FILE
    try:
        text = read_text(file, most=MAX_SETTINGS, error=StatisticsError, what="manifest")
    except StatisticsError as error:
        raise StatisticsError(f"{error}: no readable manifest of statistics") from None
    content = parse_json(text, source=str(folder), error=StatisticsError)
    hashes: Any = content.get(HASHES, {}) if isinstance(content, dict) else {}
    if not isinstance(hashes, dict) or (hashes and hashes.pop(FILE, None) != _hash_of(content)):
        raise damaged(file)
    if hashes:
        del content[HASHES]
    return Manifest.from_json(json.dumps(content), str(folder)), hashes


def check_file(file: Path, hashes: Mapping[str, str]) -> None:
    """StatisticsError if `hashes` are kept and `file` has another one, or is not there."""
    if hashes and file.is_file() and sha256_of(file) != hashes.get(file.name):
        raise damaged(file)


def damaged(file: Path) -> StatisticsError:
    """What to say of a file whose hash is another one than was written with it."""
    return StatisticsError(
        f"{file}: damaged or changed: its SHA-256 is not the one written with it; take it from a "
        "copy, or make the statistics again in another folder"
    )


def _hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
