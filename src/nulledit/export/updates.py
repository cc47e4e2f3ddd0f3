"""What the edits of a run add to each edited matrix, and what an artefact of it keeps."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError, LedgerError
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.scores import score
from nulledit.export.factors import (
    applied,
    factorise,
    factorise_each,
    ordered_sum,
    relative_error,
)
from nulledit.export.same_shape import SameShape
from nulledit.io.untrusted import MAX_SETTINGS, parse_json, read_text
from nulledit.ledger.records import History
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.layer_edit import update_of
from nulledit.models.layouts import as_out_in, write_weight

ORIGIN_FILE = "nulledit-export.json"
MOST_RANK = 512
"""Dimensions that a full-rank update is cut to, unless another number is asked for."""
MEASURED_ABOVE = 1e-6
"""‖Δ − BA‖/‖Δ‖ beyond which the facts are asked again: more than float32 factors leave."""


@dataclass(frozen=True)
class LayerExport:
    """One edited matrix as an artefact holds it."""

    layer: int
    """Block number."""
    parameter: str
    """Name of the matrix in the state dict."""
    shape: tuple[int, int]
    """[d_out, d_in], whichever way the module stores it."""
    rank: int
    """Dimensions that are kept; 0 in a whole checkpoint."""
    of: int
    """Dimensions that Δ has; 0 in a whole checkpoint."""
    error: float
    """‖Δ − BA‖/‖Δ‖ with the factors as they are stored; 0 in a whole checkpoint."""
    key_error: float
    """‖(Δ − BA)K‖/‖ΔK‖ at the facts' keys."""
    update_share: float
    """‖Δ‖/‖W₀‖."""
    rounding_share: float
    """‖rounding‖/‖Δ‖: what storing W₀ + Δ in the base's dtype costs."""
    bytes: int
    """Of its tensors, without headers."""


@dataclass(frozen=True)
class FactsCost:
    """What the stored factors change for the edited facts, against the run's model."""

    facts: int
    """How many were asked, all of them."""
    exact_nll: float
    """Mean negative log-probability of the target, nats per token, in the run's model; over facts
    that are to be said, nan if there are none."""
    stored_nll: float
    """The same with the stored factors."""
    worst: float
    """Largest change of any fact's, nats per token."""
    exact_strict: int
    """Facts that hold in the run's model: every token of the target is the likeliest, or, where it
    is to be forgotten, not every one."""
    stored_strict: int
    """The same with the stored factors."""


@dataclass(frozen=True, repr=False)
class Export:
    """What an export wrote."""

    kind: str
    """One of `EXPORTS`."""
    folder: Path
    """Where."""
    layers: tuple[LayerExport, ...]
    """Edited matrices that changed."""
    dtype: str
    """Of the factors, or of the checkpoint."""
    bytes: int
    """Of all files together."""
    rank: int | None = None
    """The adapter's one rank, padded with zeros; None for other kinds."""
    cost: FactsCost | None = None
    """Measured where the factors miss more than float32 rounding does."""
    same_as_run: bool | None = None
    """Whether the delta gives the run's model to the bit; None for other kinds."""
    differing: int | None = None
    """Weights that base + delta has otherwise than the run's model; None for other kinds."""
    same_shape: SameShape | None = None
    """Which units gated edits stand in the place of, and what that costs; None where none do."""
    for_servers: bool = False
    """Whether experts have a name each in it, as servers read them and PEFT does not."""

    def __repr__(self) -> str:
        layers = ", ".join(dict.fromkeys(str(layer.layer) for layer in self.layers))
        return f"<Export {self.kind} in {self.folder}: layers {layers}, {self.bytes:,} bytes>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class StoredLayer:
    """One matrix's factors as they are stored."""

    layer: int
    """Block number."""
    module: str
    """Full name of the module."""
    transposed: bool
    """Whether the module stores [d_in, d_out], as GPT-2's Conv1D does."""
    left: Tensor
    """B [d_out, r]; of experts that are apart [E, d_out, r]."""
    right: Tensor
    """A [r, d_in]; of experts that are apart [E, r, d_in]."""
    report: LayerExport
    """What they miss."""
    bias: Tensor | None = None
    """Added to what the module gives [d_out], where a bias changes."""


def write_origin(
    editor: EditEngine, folder: Path, kind: str, given: Mapping[str, Any] | None
) -> None:
    """Say in `folder` which state of which base it was made from, with which options."""
    write_json(folder / ORIGIN_FILE, _origin(editor.history, kind, given))


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Indented, as UTF-8."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def in_the_way(out: Path, run: Path) -> bool:
    """Whether an export to `out` would lie around the folder of the run, or in what it writes."""
    place, own = (Path(os.path.abspath(path)) for path in (out, run))
    inside = any(place.is_relative_to(own / name) for name in ("model", "ledger"))
    return inside or own.is_relative_to(place)


def refuse_existing(folder: Path) -> None:
    """LedgerError if something lies at `folder`, or a file above it: an export never overwrites.

    Links into nowhere and devices count as something; a folder with nothing in it does not.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if os.path.lexists(folder):
        raise LedgerError(f"{folder}: exists already; choose another folder")
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise LedgerError(f"{folder}: {above.name} is no folder; choose another one")
    if not os.access(above, os.W_OK | os.X_OK):
        raise LedgerError(f"{folder}: can't write in {above}; choose another folder")


def is_of(folder: Path, kind: str, history: History, given: Mapping[str, Any]) -> bool:
    """Whether `folder` is an export as `kind`, with the same options, of what `history` has now."""
    try:
        text = read_text(folder / ORIGIN_FILE, most=MAX_SETTINGS, error=LedgerError, what="export")
        found = parse_json(text, source=str(folder / ORIGIN_FILE), error=LedgerError)
    except LedgerError:
        return False
    return bool(found == _origin(history, kind, given))


def _origin(history: History, kind: str, given: Mapping[str, Any] | None) -> dict[str, str]:
    """Options by their hash: a path of this machine is nobody else's business."""
    found = {"kind": kind, "state": history.state_id, "base_hash": history.base.hash}
    if asked := {name: value for name, value in (given or {}).items() if value is not None}:
        content = json.dumps(asked, sort_keys=True, default=str)
        found["options"] = hashlib.sha256(content.encode()).hexdigest()
    return found


def shard_bytes(size: str | int) -> int:
    """The bytes of `size`, a number of them or a text such as 5GB; ConfigError for another."""
    found = re.fullmatch(r"([1-9]\d{0,14})(?:([KMGT])(i?)B)?", str(size))
    if not found:
        raise ConfigError(f"shard size {size!r}: expected bytes, or a size such as 500MB or 5GB")
    number, unit, binary = found.groups()
    return int(number) * (1024 if binary else 1000) ** (" KMGT".index(unit) if unit else 0)


def stored_layers(
    editor: EditEngine,
    *,
    rank: int | None,
    dtype: torch.dtype,
    apart: bool = False,
    progress: Progress | None = None,
) -> list[StoredLayer]:
    """Factors of every matrix that the run changed, rounded to `dtype`.

    Updates by closed-form methods are kept whole unless `rank` is smaller; full-rank ones are cut
    to `rank`, or `MOST_RANK`. `apart`: each expert of a mixture has factors of its own, else all of
    a layer have theirs together. LedgerError if nothing is edited.
    """
    found = []
    for number, layer in enumerate(editor.weights.layers):
        if progress:
            progress("factors", number, len(editor.weights.layers))
        stored = _stored(editor, layer, rank, dtype, apart)
        if stored.report.update_share:
            found.append(stored)
    if not found:
        raise LedgerError("nothing is edited in this run: there is no update to export")
    return found


def update_and_base(editor: EditEngine, layer: int) -> tuple[Tensor, Tensor]:
    """Δ and W₀ [d_out, d_in] of `layer`, float64, where the exact weight lies."""
    edit = update_of(editor.weights.edit(layer))
    return edit.change.to(edit.base.device), edit.base.double()


def facts_cost(
    editor: EditEngine,
    held: AbstractContextManager[None],
    progress: Progress | None = None,
) -> FactsCost:
    """Ask the edited facts of the run's model, and with what is stored, as it is inside `held`.

    The model is as before afterwards.
    """
    facts = list(dict.fromkeys(column.fact for column in editor.history.present))
    queries = [queries_of(fact)[0] for fact in facts]

    def ask(stage: str) -> tuple[list[float], float, int]:
        tell = (lambda done, total: progress(stage, done, total)) if progress else None
        scores = score(editor.editable, queries, progress=tell)
        said = [s.answer_nll for s, fact in zip(scores, facts, strict=True) if not fact.forget]
        strict = sum(s.strict for s in scores)
        return [s.answer_nll for s in scores], sum(said) / len(said) if said else math.nan, strict

    exact, exact_nll, exact_strict = ask("facts, exact")
    with held:
        stored, stored_nll, stored_strict = ask("facts, as stored")
    return FactsCost(
        facts=len(facts),
        exact_nll=exact_nll,
        stored_nll=stored_nll,
        worst=max(abs(b - a) for a, b in zip(exact, stored, strict=True)),
        exact_strict=exact_strict,
        stored_strict=stored_strict,
    )


def weight_with(editor: EditEngine, stored: StoredLayer) -> Tensor:
    """W₀ + BA [d_out, d_in] of a stored layer, float64, on the CPU."""
    return ordered_sum(editor.weights.base(stored.layer), stored.left, stored.right)


def with_stored(editor: EditEngine, layers: Sequence[StoredLayer]) -> AbstractContextManager[None]:
    """W₀ + BA of `layers` in the model inside; bit for bit as before after."""
    return with_weights([(editor.editable.matrix(s.layer), weight_with(editor, s)) for s in layers])


@contextmanager
def with_weights(weights: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Other weights [d_out, d_in] in modules inside; bit for bit as before after."""
    kept = [(module, as_out_in(module).clone()) for module, _ in weights]
    try:
        for module, weight in weights:
            write_weight(module, weight)
        yield
    finally:
        for module, weight in kept:
            write_weight(module, weight)


def whole_report(editor: EditEngine, layer: int) -> LayerExport:
    """The numbers of one layer as it is in the model, whatever the edits leave in it."""
    edit, weights = editor.weights.edit(layer), editor.weights
    stored = as_out_in(editor.editable.matrix(layer))
    norm, base = edit.norm, weights.base(layer)
    return LayerExport(
        layer=layer,
        parameter=editor.editable.parameter_name(layer),
        shape=(stored.shape[0], stored.shape[1]),
        rank=0,
        of=0,
        error=0.0,
        key_error=0.0,
        update_share=norm / float(torch.linalg.matrix_norm(base)),
        rounding_share=edit.rounding(editor.editable, layer) / norm if norm else 0.0,
        bytes=stored.nbytes,
    )


def layer_report(
    editor: EditEngine, layer: int, factors: tuple[Tensor, Tensor], *, of: int
) -> LayerExport:
    """The numbers of one layer with `factors` (B, A) as stored; `of`: the rank of Δ."""
    update, base = update_and_base(editor, layer)
    stored = as_out_in(editor.editable.matrix(layer))
    norm = float(torch.linalg.matrix_norm(update))
    rounding = float(torch.linalg.matrix_norm(stored.to(base) - (base + update)))
    left, right = factors
    return LayerExport(
        layer=layer,
        parameter=editor.editable.parameter_name(layer),
        shape=(base.shape[0], base.shape[1]),
        rank=left.shape[-1],
        of=of,
        error=relative_error(update, left, right),
        key_error=_key_error(editor, layer, update, left, right),
        update_share=norm / float(torch.linalg.matrix_norm(base)),
        rounding_share=rounding / norm if norm else 0.0,
        bytes=left.nbytes + right.nbytes,
    )


def _stored(
    editor: EditEngine, layer: int, rank: int | None, dtype: torch.dtype, apart: bool
) -> StoredLayer:
    update, base = update_and_base(editor, layer)
    module = editor.editable.matrix(layer)
    options: dict[str, Any] = {
        "columns": len(editor.history.active),
        "most": rank,
        "full_rank": MOST_RANK,
    }
    # Less than float64 tells apart in W₀ + Δ is no edit.
    rounding = torch.finfo(base.dtype).eps
    if apart and is_experts(module):
        count, _ = count_and_width(module)
        norms = torch.stack([part.norm() for part in base.chunk(count, dim=1)])
        factors = factorise_each(update, count, noise=rounding * norms, **options)
    else:
        noise = rounding * float(torch.linalg.matrix_norm(base))
        factors = factorise(update, noise=noise, **options)
    left, right = factors.left.to(dtype), factors.right.to(dtype)
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ConfigError(f"layer {layer}: {dtype} can't hold the factors; use another dtype")
    return StoredLayer(
        layer=layer,
        module=editor.editable.parameter_name(layer).removesuffix(".weight"),
        transposed=isinstance(module, Conv1D),
        left=left,
        right=right,
        report=layer_report(editor, layer, (left, right), of=factors.of),
    )


def _key_error(
    editor: EditEngine, layer: int, update: Tensor, left: Tensor, right: Tensor
) -> float:
    """‖(Δ − BA)K‖/‖ΔK‖ over the active columns that have a key in `layer`."""
    keys = editor.weights.recorded(editor.history.active, layer)[0].to(update)  # [d_in, n]
    written = update @ keys
    missing = written - applied(left.to(update), right.to(update), keys)
    total = float(written.norm())
    return float(missing.norm()) / total if total else 0.0
