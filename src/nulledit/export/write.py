"""Any kind of export, by its name: a row each, with its file here and what it takes."""

from __future__ import annotations

import importlib
import inspect
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from nulledit.data.facts import quote
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.editing.engine import EditEngine
    from nulledit.export.updates import Export

Experts: TypeAlias = Literal["fused", "each"]
"""How an adapter holds the experts of a mixture: all in one parameter, or each by its name."""
Kind: TypeAlias = Literal["checkpoint", "lora", "delta", "gguf", "gguf-lora"]


SHARED = "hf upload NAME {folder}"
"""What puts a folder with a card on the Hub."""


@dataclass(frozen=True)
class ExportKind:
    """A way to hand edits over."""

    home: str
    """Module and function that writes it: called with an editor and a folder, and by name with
    what it takes of `options`, `run` (its name), `summary` (the content of its summary.json) and
    `progress`; returns an `Export`."""
    options: tuple[str, ...]
    """Of `nulledit export` that it takes."""
    line: str
    """What was written, in words, with slots for `rank` and `dtype`."""
    start: tuple[str, ...] = ()
    """Commands that serve or share it, with slots for `folder`, `base` and `rank`."""


EXPORTS: dict[str, ExportKind] = {
    "checkpoint": ExportKind(
        "nulledit.export.checkpoint:write_checkpoint",
        ("max_shard_size", "same_shape", "text"),
        "The model in {dtype}",
        ("vllm serve {folder}", SHARED),
    ),
    "lora": ExportKind(
        "nulledit.export.lora:write_lora",
        ("rank", "dtype", "text", "experts"),
        "Adapter of rank {rank} in {dtype}",
        (
            "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules edits={folder}",
            "python -m sglang.launch_server --model-path {base} --lora-paths edits={folder}",
            SHARED,
        ),
    ),
    "delta": ExportKind(
        "nulledit.export.delta:write_delta",
        ("rank", "dtype"),
        "Delta in {dtype}",
        ("nulledit apply {folder} {base} --out MODEL", SHARED),
    ),
    "gguf": ExportKind(
        "nulledit.export.gguf:write_gguf",
        ("tensor_type", "gguf", "same_shape", "text"),
        "GGUF, its edited matrices in {dtype}",
        ("llama-cli -m {folder}/model.gguf", "ollama create NAME -f {folder}/Modelfile", SHARED),
    ),
    "gguf-lora": ExportKind(
        "nulledit.export.gguf_lora:write_gguf_lora",
        ("tensor_type", "gguf", "rank", "text"),
        "GGUF adapter of rank {rank} in {dtype}",
        (
            "llama-cli -m BASE.gguf --lora {folder}/adapter.gguf",
            "ollama create NAME -f {folder}/Modelfile",
            SHARED,
        ),
    ),
}
"""By the word of `nulledit export --as`."""
DEFAULT: Kind = "delta"
"""The smallest that gives the run's model to the bit."""
OPTIONS = frozenset(name for kind in EXPORTS.values() for name in kind.options)
"""Options that only some of them take."""
TEXT = (str, Path)
VALUES: dict[str, tuple[tuple[type, ...], str]] = {
    "dtype": ((str,), "a name, such as float32"),
    "experts": ((str,), "fused or each"),
    "gguf": (TEXT, "a file"),
    "max_shard_size": ((str, int), "a size, such as 5GB"),
    "rank": ((int,), "a whole number of at least 1"),
    "same_shape": ((bool,), "true or false"),
    "tensor_type": ((str,), "a name, such as q8_0"),
    "text": (TEXT, "a file"),
}
"""Of each option: which values it takes, and how they are said."""
WORDS = ("dtype", "max_shard_size", "tensor_type")
"""Options whose text is one of a few, or of one form."""


def check_options(kind: Kind, options: Mapping[str, Any]) -> None:
    """ConfigError for a value that this option of `kind` can't have; None is as left out."""
    from nulledit.export.ranks import SERVED

    for name, value in options.items():
        kinds, expected = VALUES[name]
        right = isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,))
        if name == "experts":
            right = value in get_args(Experts)
        if name == "rank":
            right = right and value >= 1
        if value is not None and not right:
            raise ConfigError(f"{name}: expected {expected}, found {quote(value)}")
        if name == "rank" and kind != "delta" and value is not None and value > SERVED[-1]:
            raise ConfigError(f"rank is {value}; expected 1 to {SERVED[-1]}, what servers accept")
        if value is not None and name in WORDS:
            _check_word(kind, name, value)


def check_method(kind: str, options: Mapping[str, Any], *, gated: bool) -> None:
    """ConfigError for options of `kind` that its edits (`gated`, or updates of W) can't have."""
    rank, text, shaped = (options.get(name) for name in ("rank", "text", "same_shape"))
    if gated and rank is not None:
        raise ConfigError(
            "rank can't be given for gated edits: each neuron is a dimension of its own, and "
            "without some of them it is not the edited model"
        )
    if not gated and shaped:
        raise ConfigError(
            "same_shape is for gated edits; the edits of this run change W, and its model has the "
            "base's shape already"
        )
    if text is not None and "same_shape" in EXPORTS[kind].options and not shaped:
        raise ConfigError("text goes with same_shape: on it the units to replace are chosen")
    if text is not None and not gated:
        raise ConfigError("text is for gated edits, whose units it chooses; this run has none")


def _check_word(kind: Kind, name: str, value: Any) -> None:
    """ConfigError for a word that the writer of `kind` does not know."""
    from nulledit.export.delta import DTYPES, dtype_of
    from nulledit.export.gguf_file import TYPES, check_type
    from nulledit.export.gguf_lora import FACTOR_TYPES
    from nulledit.export.updates import shard_bytes

    if name == "dtype":
        dtype_of(value, DTYPES)
    elif name == "tensor_type":
        check_type(value, tuple(FACTOR_TYPES) if kind == "gguf-lora" else TYPES)
    else:
        shard_bytes(value)


def write_export(
    editor: EditEngine,
    folder: str | Path,
    kind: Kind,
    *,
    run: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Export:
    """Write the edits to `folder`: `kind` is one of `EXPORTS`.

    `options`: its own; None is as left out. `run`: the run's folder, for its name and measures on
    the card. ConfigError for another kind, or an option of another one.
    """
    from nulledit.runs.folder import read_json

    if kind not in EXPORTS:
        raise ConfigError(f"unknown kind {kind!r} of export; expected one of {', '.join(EXPORTS)}")
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in given if name not in EXPORTS[kind].options]:
        raise ConfigError(f"{', '.join(wrong)} can't be given for kind {kind!r}")
    check_options(kind, given)
    module, _, name = EXPORTS[kind].home.partition(":")
    writer = getattr(importlib.import_module(module), name)
    takes = inspect.signature(writer).parameters
    name_of_run = Path(run).resolve().name if run else "RUN"
    offered = {"progress": progress, "run": name_of_run, "given": given} | given
    if "summary" in takes:
        offered["summary"] = read_json(Path(run), "summary.json", None) if run else None
    written: Export = writer(editor, folder, **{n: offered[n] for n in offered if n in takes})
    return written


def export_command(run: str | Path, kind: str, out: str | Path) -> str:
    """The command that writes the edits of `run` as `kind` to the folder `out`."""
    return shlex.join(["nulledit", "export", str(run), "--as", kind, "--out", str(out)])
