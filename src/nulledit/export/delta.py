"""The edits as factors in one safetensors file, with a manifest that says of what and to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nulledit.editing.call_log import Progress
from nulledit.editing.editor import Editor
from nulledit.errors import ConfigError, LedgerError
from nulledit.export.updates import (
    MEASURED_ABOVE,
    Export,
    StoredLayer,
    facts_cost,
    refuse_existing,
    stored_layers,
    weight_with,
    write_json,
)
from nulledit.io.files import replacing_folder, sha256_of
from nulledit.io.untrusted import MAX_DOCUMENT, parse_json, read_text
from nulledit.models.layouts import as_out_in, as_stored
from nulledit.models.load import model_hash

FORMAT = "nulledit-delta"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TENSOR_FILE = "delta.safetensors"
MOST_HEADER = 2**20  # bytes of a tensor file that are no tensors
MOST_SIDE = 2**24  # of a matrix
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class DeltaLayer:
    """One matrix of a delta."""

    layer: int
    """Block number."""
    parameter: str
    """Its name in the state dict."""
    shape: tuple[int, int]
    """[d_out, d_in], whichever way the module stores it."""
    rank: int
    """Columns of B [d_out, r] and rows of A [r, d_in]."""


@dataclass(frozen=True)
class Manifest:
    """What a delta is of, and what it makes of its base."""

    base: str
    """Name, folder or Hub id that the base was loaded from; empty for an object in memory."""
    base_hash: str
    """`model_hash` of the base."""
    base_dtype: str
    """The base's dtype; it is loaded in this one."""
    state: str
    """The ledger's state id."""
    result_hash: str
    """`model_hash` of the base with the delta."""
    run_hash: str
    """`model_hash` of the run's model; the result's own if they are the same to the bit."""
    dtype: str
    """Of the factors."""
    layers: tuple[DeltaLayer, ...]
    """In order."""
    facts: tuple[str, ...]
    """Ids of the facts in it."""
    sha256: str
    """Of the tensor file."""
    bytes: int
    """Size of the tensor file."""


@dataclass(frozen=True)
class Delta:
    """A delta that was read and checked."""

    folder: Path
    """Where it lies."""
    manifest: Manifest
    """What it says."""
    factors: dict[int, tuple[Tensor, Tensor]]
    """Layer -> (B, A)."""


def write_delta(
    editor: Editor,
    folder: str | Path,
    *,
    rank: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Export:
    """Write the edits to `folder`, for `apply_delta`.

    `rank` cuts every layer's update; full-rank updates are cut in any case. In float64 the result
    is the run's model to the bit, as long as nothing is cut; in float32 weights differ by a step of
    the base's dtype here and there, and the report counts them. LedgerError if nothing is edited or
    `folder` is taken.
    """
    folder = Path(folder)
    refuse_existing(folder)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected 1 or more")
    kept = stored_layers(editor, rank=rank, dtype=dtype_of(dtype, DTYPES), progress=progress)
    reports = tuple(s.report for s in kept)
    inexact = any(r.error > MEASURED_ABOVE for r in reports)
    cost = facts_cost(editor, kept, progress) if inexact else None
    differing, result_hash, run_hash = _outcome(editor, kept)
    tensors = {
        name: tensor.contiguous()
        for s in kept
        for name, tensor in ((f"left.{s.layer}", s.left), (f"right.{s.layer}", s.right))
    }
    history = editor.history
    with replacing_folder(folder) as partial:
        file = partial / TENSOR_FILE
        save_file(tensors, file)
        manifest = Manifest(
            base=history.base.model,
            base_hash=history.base.hash,
            base_dtype=history.base.dtype,
            state=history.state_id,
            result_hash=result_hash,
            run_hash=run_hash,
            dtype=dtype,
            layers=tuple(DeltaLayer(r.layer, r.parameter, r.shape, r.rank) for r in reports),
            facts=tuple(dict.fromkeys(c.fact.id for c in history.present)),
            sha256=sha256_of(file),
            bytes=file.stat().st_size,
        )
        content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
        write_json(partial / MANIFEST_FILE, content)
        size = sum(f.stat().st_size for f in partial.iterdir())
    written = Export("delta", folder, reports, dtype, size, cost=cost)
    return replace(written, same_as_run=result_hash == run_hash, differing=differing)


def read_delta(folder: str | Path) -> Delta:
    """Read a delta; nothing large is read before its size and its hash are those of the manifest.

    LedgerError says what is wrong.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    file = folder / TENSOR_FILE
    if not file.is_file():
        raise LedgerError(f"{file}: missing, but the manifest names it")
    size = file.stat().st_size
    if size != manifest.bytes:
        raise LedgerError(
            f"{file}: damaged: it has {size} bytes, the manifest says {manifest.bytes}"
        )
    found = sha256_of(file)
    if found != manifest.sha256:
        raise LedgerError(
            f"{file}: damaged: its hash is {found[:12]}, expected {manifest.sha256[:12]}"
        )
    return Delta(folder, manifest, _read_factors(file, manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a delta, every field checked; LedgerError says what is wrong."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise LedgerError(f"{folder}: no delta here (expected {MANIFEST_FILE})")
    text = read_text(file, most=MAX_DOCUMENT, error=LedgerError, what="manifest")
    content = parse_json(text, source=str(file), error=LedgerError)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LedgerError(f"{file}: not the manifest of a delta (expected format {FORMAT!r})")
    if content.get("version") != VERSION:
        raise LedgerError(
            f"{file}: format version {content.get('version')!r}; this nulledit reads {VERSION}"
        )
    try:
        return _manifest(content)
    except (KeyError, TypeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise LedgerError(f"{file}: not a valid manifest: {said}") from error


def dtype_of(name: str, known: Mapping[str, torch.dtype]) -> torch.dtype:
    """The torch dtype `name`, or a ConfigError that lists the known ones."""
    if name not in known:
        raise ConfigError(f"unknown dtype {name!r}; expected one of {', '.join(known)}")
    return known[name]


def _outcome(editor: Editor, kept: list[StoredLayer]) -> tuple[int, str, str]:
    """Weights in which base and delta differ from the run's model, and the hashes of both."""
    replaced, differing = {}, 0
    changed = {s.layer: s for s in kept}
    for layer in editor.weights.layers:
        module = editor.editable.matrix(layer)
        here = as_out_in(module).cpu()
        exact = weight_with(editor, changed[layer]) if layer in changed else None
        there = (editor.weights.base(layer) if exact is None else exact).to(here.dtype)
        differing += int((there != here).sum())
        replaced[editor.editable.parameter_name(layer)] = as_stored(module, there)
    return differing, model_hash(editor.model, replaced), model_hash(editor.model)


def _manifest(content: dict[str, Any]) -> Manifest:
    layers = tuple(_layer(entry) for entry in _list(content, "layers"))
    if not layers or len({entry.layer for entry in layers}) != len(layers):
        raise ValueError("layers: expected one entry for each of some layers")
    facts = _list(content, "facts")
    if not all(isinstance(id_, str) for id_ in facts):
        raise ValueError("facts: expected ids")
    manifest = Manifest(
        **{name: _text(content, name) for name in ("base", "state")},
        **{name: _hash(content, name) for name in ("base_hash", "result_hash", "run_hash")},
        base_dtype=_choice(content, "base_dtype"),
        dtype=_choice(content, "dtype"),
        layers=layers,
        facts=tuple(facts),
        sha256=_hash(content, "sha256"),
        bytes=_whole(content, "bytes", 0, 2**62),
    )
    width = DTYPES[manifest.dtype].itemsize
    held = sum(sum(entry.shape) * entry.rank * width for entry in layers)
    if not held <= manifest.bytes <= held + MOST_HEADER:
        raise ValueError(f"bytes is {manifest.bytes}, but the shapes need {held} and a header")
    return manifest


def _layer(entry: object) -> DeltaLayer:
    if not isinstance(entry, dict):
        raise ValueError("layers: expected an object for each")
    shape = _list(entry, "shape")
    if len(shape) != 2:
        raise ValueError("shape: expected [d_out, d_in]")
    sides = {"d_out": shape[0], "d_in": shape[1]}
    d_out, d_in = (_whole(sides, name, 1, MOST_SIDE) for name in sides)
    rank = _whole(entry, "rank", 1, min(d_out, d_in))
    layer = _whole(entry, "layer", 0, 100_000)
    return DeltaLayer(layer, _text(entry, "parameter"), (d_out, d_in), rank)


def _text(content: dict[str, Any], name: str) -> str:
    if not isinstance(content[name], str) or len(content[name]) > 10_000:
        raise ValueError(f"{name}: expected a text")
    return content[name]


def _hash(content: dict[str, Any], name: str) -> str:
    text = _text(content, name)
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{name}: expected a SHA-256 in hex")
    return text


def _choice(content: dict[str, Any], name: str) -> str:
    if content[name] not in list(DTYPES):
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}")
    return content[name]


def _whole(content: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}")
    return value


def _list(content: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(content[name], list):
        raise ValueError(f"{name}: expected a list")
    return content[name]


def _read_factors(file: Path, manifest: Manifest) -> dict[int, tuple[Tensor, Tensor]]:
    """The tensors that the manifest names, in its shapes and dtype, and no others."""
    shapes = {}
    for entry in manifest.layers:
        shapes[f"left.{entry.layer}"] = (entry.shape[0], entry.rank)
        shapes[f"right.{entry.layer}"] = (entry.rank, entry.shape[1])
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            if names != set(shapes):
                raise LedgerError(f"{file}: holds other tensors than the manifest names")
            for name, shape in shapes.items():
                if tuple(opened.get_slice(name).get_shape()) != shape:
                    raise LedgerError(f"{file}: {name} has another shape than the manifest says")
            tensors = {name: opened.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise LedgerError(f"{file}: not a safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype != DTYPES[manifest.dtype] or not tensor.isfinite().all():
            raise LedgerError(f"{file}: {name} is not of finite {manifest.dtype} numbers")
    numbers = (entry.layer for entry in manifest.layers)
    return {i: (tensors[f"left.{i}"], tensors[f"right.{i}"]) for i in numbers}
