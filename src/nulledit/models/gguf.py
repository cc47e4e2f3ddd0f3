"""GGUF files: dequantised once into a Hugging Face folder in the cache, and known by their hash."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nulledit.errors import ModelError
from nulledit.io.files import cache_folder, replacing_folder, sha256_of, write_text

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
MAGIC = b"GGUF"
SOURCE_FILE = "nulledit-source.json"
PARSING = Lock()
"""Held by the one conversion that is at work."""
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
"""How the pieces end that llama.cpp's own tool makes, each with a header."""


def is_gguf(name: str) -> bool:
    """Whether `name` is, or was, a GGUF file's path: by its ending, or by how the file begins."""
    path = Path(name)
    try:
        if path.suffix.lower() == SUFFIX:
            return not path.is_dir()
        return path.is_file() and _begins(path) == MAGIC
    except OSError:  # no name that a file can have, or no file that we may read
        return False


def file_folder(file: Path) -> Path:
    """`file` as a Hugging Face folder in float32, converted once into the cache.

    The folder is named by the file's hash, so it is found wherever the file is. Takes the time of
    reading the file; ModelError, and nothing kept, for one that can't be read as a causal language
    model.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file; expected a GGUF file, a model folder or a Hub id")
    if (begins := _begins(file)) != MAGIC:
        raise ModelError(f"{file}: is no GGUF file: it begins with {begins!r}, not {MAGIC!r}")
    if SPLIT.search(file.name):
        raise ModelError(
            f"{file}: is one of several pieces; join them first: llama-gguf-split --merge "
            "FIRST-PIECE WHOLE.gguf"
        )
    digest = sha256_of(file)
    return kept_folder(digest) or converted([file], _folder_of(digest), file.name, digest)


def kept_folder(sha256: str) -> Path | None:
    """The folder that the file of this hash was converted to; None if there is no whole one."""
    folder = _folder_of(sha256)
    return folder if is_intact(folder, sha256) else None


def file_sha256(model: PreTrainedModel) -> str:
    """Hash of the GGUF file that `model` was converted from, in hex; empty for others."""
    return source(Path(model.name_or_path))[1] if model.name_or_path else ""


def source(folder: Path) -> tuple[str, str]:
    """Name and hash of the file that `folder` was converted from; empty if it says none."""
    found = _manifest(folder)
    return found.get("source", ""), found.get("source_sha256", "")


def is_intact(folder: Path, sha256: str) -> bool:
    """Whether `folder` was made of the file of this hash, and its weights are as they were."""
    found = _manifest(folder)
    try:
        return found.get("source_sha256") == sha256 and all(
            sha256_of(folder / file) == digest for file, digest in found["weights"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def joined_sha256(pieces: Sequence[Path]) -> str:
    """Hash of the bytes of all `pieces`, one after the other, in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        with piece.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def converted(pieces: Sequence[Path], folder: Path, name: str, sha256: str) -> Path:
    """Write the model of a GGUF file to `folder`, in float32, and return it.

    `pieces`: the file, or what it was cut into; `name`: what it is called; `sha256`: of the whole.
    Made under a temporary name and renamed, so that a half-written folder is never used.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name}: reading GGUF needs the package gguf: pip install gguf")
    logger.info("converting %s to float32 in %s (once)", name, folder)
    with replacing_folder(folder) as partial:
        # Apart from what lies beside it: transformers would read a folder's other files, too.
        whole = partial / f"source{SUFFIX}"
        join(pieces, whole)
        model, tokenizer = _dequantised(whole, str(pieces[0]) if len(pieces) == 1 else name)
        whole.unlink()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        weights = {p.name: sha256_of(p) for p in sorted(partial.glob("*.safetensors"))}
        manifest = {"source": name, "source_sha256": sha256, "weights": weights}
        write_text(partial / SOURCE_FILE, json.dumps(manifest, indent=2))
    return folder


def _dequantised(file: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of `file` in float32, as one that was never quantised, and its tokenizer."""
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    load: Any = AutoModelForCausalLM.from_pretrained  # declared to return no loading info
    try:
        # The bar is one that transformers' own switch leaves on.
        with _parsed_once(), redirect_stderr(StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            loaded, found = load(
                file.parent, dtype=torch.float32, output_loading_info=True, **options
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # many kinds, from three libraries
        raise _refusal(name, error) from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{name}: has no {missing[0]} (and {len(missing) - 1} more are missing): it is "
            "damaged, or one of several pieces"
        )
    state = loaded.state_dict()
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name}: {key} holds numbers that are not finite: the file is damaged"
            )
    # A model read from GGUF still counts as quantised and refuses to be saved; a plain one of the
    # same shape takes its weights, in place of any of its own.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model, tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Have a GGUF file parsed once inside.

    transformers parses it for the configuration, for the tokenizer and for the weights, and looks
    up all names of tensors again for every module: most of the time that a conversion takes.
    """
    gguf: Any = importlib.import_module("gguf")
    with PARSING:  # another thread would take what is kept here for the package's own
        before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        for name, made in before.items():
            setattr(gguf, name, cache(made))
        try:
            yield
        finally:
            for name, made in before.items():
                setattr(gguf, name, made)


def _refusal(name: str, error: Exception) -> ModelError:
    """What was said about a file that can't be read, as a line for users of nulledit."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "rchitecture" in said or "model_type" in said or "onfiguration class" in said:
        return ModelError(
            f"{name}: is of an architecture that transformers does not read from GGUF "
            f"({said[:200]})"
        )
    if isinstance(error, ImportError) or "pip install" in said:
        return ModelError(f"{name}: reading GGUF needs another package ({said[:200]})")
    return ModelError(
        f"{name}: can't be read: it is cut short, damaged, or one of several pieces, which are "
        f"joined first: cat PIECES > WHOLE.gguf ({said[:200]})"
    )


def join(pieces: Sequence[Path], whole: Path) -> None:
    """Have all `pieces` in one file; a single one stays where it is."""
    if len(pieces) == 1:
        whole.symlink_to(pieces[0].resolve())
        return
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, out, 2**20)


def _folder_of(sha256: str) -> Path:
    return cache_folder() / "models" / f"gguf-{sha256[:16]}"


def _begins(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(MAGIC))


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
