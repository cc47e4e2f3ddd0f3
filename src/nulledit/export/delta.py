"""The edits as factors in one safetensors file, with a manifest that says of what and to what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nulledit.config import Layout
from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError, LedgerError
from nulledit.export.base_name import base_name
from nulledit.export.card import write_card
from nulledit.export.neuron_factors import added_reports
from nulledit.export.same_shape import require_neurons
from nulledit.export.updates import (
    MEASURED_ABOVE,
    Export,
    FactsCost,
    LayerExport,
    StoredLayer,
    facts_cost,
    refuse_existing,
    stored_layers,
    weight_with,
    with_stored,
    write_json,
    write_origin,
)
from nulledit.export.write import check_method
from nulledit.io.files import replacing_folder, sha256_of
from nulledit.io.settings import Count, Expected, Several, checked, read_settings
from nulledit.io.untrusted import MAX_DOCUMENT, parse_json, read_text
from nulledit.linalg.neurons import Neurons
from nulledit.models.layouts import as_out_in, as_stored
from nulledit.models.load import model_hash

FORMAT = "nulledit-delta"
VERSIONS = (1, 2)
"""Of the format: the second has neurons."""
OUTSIDE = {"format", "version"}  # of the manifest: what says how it is read
MANIFEST_FILE = "manifest.json"
TENSOR_FILE = "delta.safetensors"
MOST_HEADER = 2**20  # bytes of a tensor file that are no tensors
MOST_SIDE = 2**24  # of a matrix
DTYPES = {n: getattr(torch, n) for n in ("float32", "float64", "bfloat16", "float16")}


Text = Annotated[str, Expected("a text", lambda text: len(text) <= 10_000)]
Hash = Annotated[str, Expected("a SHA-256 in hex", pattern="^[0-9a-f]{64}$")]
Dtype = Annotated[str, Expected(f"one of {', '.join(DTYPES)}", DTYPES.__contains__)]
Block = Annotated[int, Expected("a whole number from 0 to 100000", ge=0, le=100_000)]
Side = Annotated[int, Expected(f"a whole number from 1 to {MOST_SIDE}", ge=1, le=MOST_SIDE)]
Size = Annotated[int, Expected("a whole number from 0 to 2^62", ge=0, le=2**62)]


@checked
@dataclass(frozen=True)
class DeltaLayer:
    """One matrix of a delta."""

    layer: Block
    """Block number."""
    parameter: Text
    """Its name in the state dict."""
    shape: Annotated[tuple[Side, Side], Expected()]
    """[d_out, d_in], whichever way the module stores it."""
    rank: Count
    """Columns of B [d_out, r] and rows of A [r, d_in]."""

    def __post_init__(self) -> None:
        if self.rank > min(self.shape):
            raise ConfigError(f"rank is {self.rank}; expected at most {min(self.shape)}")


@checked
@dataclass(frozen=True)
class DeltaNeurons:
    """Neurons that a delta gives one block's MLP besides its own units."""

    layer: Block
    """Block number."""
    parameter: Text
    """Name of W in the state dict."""
    n: Side
    """How many."""
    d: Side
    """Width of the MLP's input."""
    d_out: Side
    """Width of its output."""
    width: Side
    """Units of the block's own."""
    biased: bool
    """Whether what φ is applied to has a bias."""
    gated: bool
    """Whether φ's result is multiplied by a second factor."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that hold them, by the fields of `Neurons`."""
        found: dict[str, tuple[int, ...]] = {
            "rows": (self.n, self.d),
            "columns": (self.d_out, self.n),
        }
        if self.biased:
            found["biases"] = (self.n,)
        if self.gated:
            found["factors"] = (self.n, self.d)
        return found


@checked
@dataclass(frozen=True)
class Manifest:
    """What a delta is of, and what it makes of its base."""

    base: Text
    """Name or Hub id that the base was loaded by, of a folder its last part; empty for an object in
    memory."""
    base_hash: Hash
    """`model_hash` of the base."""
    base_dtype: Dtype
    """The base's dtype; it is loaded in this one."""
    state: Text
    """The ledger's state id."""
    result_hash: Hash
    """`model_hash` of the base with the delta."""
    run_hash: Hash
    """`model_hash` of the run's model; the result's own if they are the same to the bit."""
    dtype: Dtype
    """Of the factors."""
    layers: Several[DeltaLayer]
    """Matrices with an update, in order; none where there are neurons."""
    facts: Several[str]
    """Ids of the facts in it."""
    sha256: Hash
    """Of the tensor file."""
    bytes: Size
    """Size of the tensor file."""
    neurons: Several[DeltaNeurons] = ()
    """Of gated edits, by block, in order."""
    layout: Layout | None = None
    """Where W is, if the run's recipe names it; else where it is found in a model of this kind."""

    def __post_init__(self) -> None:
        blocks: tuple[DeltaLayer | DeltaNeurons, ...] = self.layers or self.neurons
        if not blocks or (self.layers and self.neurons):
            raise ConfigError(f"layers is {list(self.layers)}; expected some layers, or neurons")
        if len({entry.layer for entry in blocks}) < len(blocks):
            raise ConfigError("layers: one of them stands twice")
        width = DTYPES[self.dtype].itemsize
        held = width * sum(math.prod(shape) for shape in self.shapes.values())
        if not held <= self.bytes <= held + MOST_HEADER:
            raise ConfigError(f"bytes is {self.bytes}, but the shapes need {held} and a header")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in the file, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for entry in self.layers:
            found[f"left.{entry.layer}"] = (entry.shape[0], entry.rank)
            found[f"right.{entry.layer}"] = (entry.rank, entry.shape[1])
        for block in self.neurons:
            found |= {f"{name}.{block.layer}": shape for name, shape in block.shapes.items()}
        return found


@dataclass(frozen=True)
class Delta:
    """A delta that was read and checked."""

    folder: Path
    """Where it lies."""
    manifest: Manifest
    """What it says."""
    tensors: dict[str, Tensor]
    """As in the file."""

    @property
    def factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer -> (B, A); empty where there are neurons."""
        numbers = (entry.layer for entry in self.manifest.layers)
        return {i: (self.tensors[f"left.{i}"], self.tensors[f"right.{i}"]) for i in numbers}

    @property
    def neurons(self) -> dict[int, Neurons]:
        """Layer -> neurons; empty where W has an update."""
        return {
            block.layer: Neurons(
                rows=self.tensors[f"rows.{block.layer}"],
                biases=self.tensors.get(f"biases.{block.layer}"),
                factors=self.tensors.get(f"factors.{block.layer}"),
                columns=self.tensors[f"columns.{block.layer}"],
            )
            for block in self.manifest.neurons
        }


@dataclass(frozen=True)
class _Content:
    """What a delta is made of."""

    tensors: dict[str, Tensor]
    """By name in the file."""
    reports: tuple[LayerExport, ...]
    """A row for each matrix that they change."""
    differing: int
    """Weights that base + delta has otherwise than the run's model."""
    result_hash: str
    """Of base + delta."""
    run_hash: str
    """Of the run's model."""
    cost: FactsCost | None
    """What that means for the facts."""
    layers: tuple[DeltaLayer, ...] = ()
    """Of the manifest."""
    neurons: tuple[DeltaNeurons, ...] = ()
    """Of the manifest."""


def write_delta(
    editor: EditEngine,
    folder: str | Path,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    run: str = "RUN",
    summary: Any = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write the edits to `folder`, for `apply_delta`, with a card.

    With `dtype` left out the result is the run's model to the bit, as long as nothing is cut:
    updates of W are kept in float64, neurons of gated edits as the run's model has them. In float32
    some updated weights differ by a step of the base's dtype, and the report counts them. `rank`
    cuts every layer's update; full-rank ones are cut in any case. `run`, `summary`: as for a
    checkpoint. LedgerError if nothing is edited or `folder` is taken.
    """
    folder = Path(folder)
    refuse_existing(folder)
    check_method("delta", {"rank": rank}, gated=editor.weights.grown)
    if editor.weights.grown:
        dtype = dtype or editor.history.base.dtype
        content = _of_neurons(editor, dtype_of(dtype, DTYPES), progress)
    else:
        dtype = dtype or "float64"
        content = _of_updates(editor, rank, dtype_of(dtype, DTYPES), progress)
    history = editor.history
    with replacing_folder(folder) as partial:
        file = partial / TENSOR_FILE
        save_file({name: t.contiguous() for name, t in content.tensors.items()}, file)
        manifest = Manifest(
            base=base_name(history.base.model),
            base_hash=history.base.hash,
            base_dtype=history.base.dtype,
            state=history.state_id,
            result_hash=content.result_hash,
            run_hash=content.run_hash,
            dtype=dtype,
            layers=content.layers,
            facts=tuple(dict.fromkeys(c.fact.id for c in history.present)),
            sha256=sha256_of(file),
            bytes=file.stat().st_size,
            neurons=content.neurons,
            layout=history.base.recipe.layout,
        )
        head = {"format": FORMAT, "version": VERSIONS[1] if content.neurons else VERSIONS[0]}
        plain = head | asdict(manifest)
        if not content.neurons:  # as readers of the first version know it
            del plain["neurons"]
        if manifest.layout is None:
            del plain["layout"]
        write_json(partial / MANIFEST_FILE, plain)
        write_origin(editor, partial, "delta", given)
        written = Export(
            "delta",
            folder,
            content.reports,
            dtype,
            0,
            cost=content.cost,
            same_as_run=content.result_hash == content.run_hash,
            differing=content.differing,
        )
        write_card(partial, editor, written, run=run, summary=summary)
        size = sum(f.stat().st_size for f in partial.iterdir())
    return replace(written, bytes=size)


def _of_updates(
    editor: EditEngine, rank: int | None, dtype: torch.dtype, progress: Progress | None
) -> _Content:
    """Factors of updates of W."""
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected 1 or more")
    kept = stored_layers(editor, rank=rank, dtype=dtype, progress=progress)
    reports = tuple(s.report for s in kept)
    inexact = any(r.error > MEASURED_ABOVE for r in reports)
    cost = facts_cost(editor, with_stored(editor, kept), progress) if inexact else None
    tensors = {
        name: tensor
        for s in kept
        for name, tensor in ((f"left.{s.layer}", s.left), (f"right.{s.layer}", s.right))
    }
    layers = tuple(DeltaLayer(r.layer, r.parameter, r.shape, r.rank) for r in reports)
    return _Content(tensors, reports, *_outcome(editor, kept), cost, layers=layers)


def _of_neurons(editor: EditEngine, dtype: torch.dtype, progress: Progress | None) -> _Content:
    """Neurons as the run's model has them, in `dtype`."""
    exact = require_neurons(editor, "this")
    tensors: dict[str, Tensor] = {}
    rounded: dict[int, Neurons] = {}
    reports: list[LayerExport] = []
    entries, differing = [], 0
    for layer, neurons in exact.items():
        form = editor.editable.form(layer)
        held = form.held()
        assert held is not None
        kept = held.map(lambda t: t.cpu().to(dtype))
        for name, tensor in kept.tensors().items():
            if not tensor.isfinite().all():
                raise ConfigError(
                    f"layer {layer}: {dtype} can't hold its neurons; use another dtype"
                )
            tensors[f"{name}.{layer}"] = tensor
            own = held.tensors()[name].cpu()
            differing += int((tensor.to(own.dtype) != own).sum())
        rounded[layer] = kept
        reports += added_reports(editor, layer, neurons, kept)
        entries.append(
            DeltaNeurons(
                layer=layer,
                parameter=editor.editable.parameter_name(layer),
                n=len(kept.rows),
                d=form.d,
                d_out=len(kept.columns),
                width=form.width,
                biased=kept.biases is not None,
                gated=kept.factors is not None,
            )
        )
    run_hash = result_hash = model_hash(editor.model)
    cost = None
    if differing:
        with _put(editor, rounded):
            result_hash = model_hash(editor.model)
        cost = facts_cost(editor, _put(editor, rounded), progress)
    return _Content(
        tensors, tuple(reports), differing, result_hash, run_hash, cost, neurons=tuple(entries)
    )


@contextmanager
def _put(editor: EditEngine, neurons: Mapping[int, Neurons]) -> Iterator[None]:
    """`neurons` in the place of the run's inside; afterwards those, to the bit."""
    held = {layer: editor.editable.form(layer).held() for layer in neurons}
    try:
        for layer, others in neurons.items():
            editor.editable.form(layer).put(others)
        yield
    finally:
        for layer, own in held.items():
            editor.editable.form(layer).put(own)


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
    return Delta(folder, manifest, _read_tensors(file, manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a delta, every field checked; LedgerError says what is wrong."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise LedgerError(f"{folder}: no delta here (expected {MANIFEST_FILE})")
    text = read_text(file, most=MAX_DOCUMENT, error=LedgerError, what="manifest")
    content = parse_json(text, source=str(file), error=LedgerError)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LedgerError(f"{file}: not the manifest of a delta (expected format {FORMAT!r})")
    if content.get("version") not in VERSIONS:
        raise LedgerError(
            f"{file}: format version {content.get('version')!r}; this nulledit reads "
            + " and ".join(map(str, VERSIONS))
        )
    try:
        return read_settings(Manifest, {k: content[k] for k in content.keys() - OUTSIDE})
    except ConfigError as error:
        raise LedgerError(f"{file}: not a valid manifest: {error}") from error


def dtype_of(name: str, known: Mapping[str, torch.dtype]) -> torch.dtype:
    """The torch dtype `name`, or a ConfigError that lists the known ones."""
    if name not in known:
        raise ConfigError(f"unknown dtype {name!r}; expected one of {', '.join(known)}")
    return known[name]


def _outcome(editor: EditEngine, kept: list[StoredLayer]) -> tuple[int, str, str]:
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


def _read_tensors(file: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors that the manifest names, in its shapes and dtype, and no others."""
    shapes = manifest.shapes
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
    return tensors
