"""How far the edited weights move what the model knew: ‖ΔK₀‖/‖W₀K₀‖ on text not edited."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from nulledit.data.corpus import Corpus
from nulledit.editing.statistics import key_moments
from nulledit.editor import Editor
from nulledit.ledger.fold import metric_of
from nulledit.models.layouts import as_out_in, frozen

SHIPPED = "preservation.txt"


@dataclass(frozen=True)
class Preservation:
    """What the edits do to one layer's output on a text that has nothing to do with them."""

    layer: int
    """Block number."""
    error: float
    """‖ΔK₀‖_F/‖W₀K₀‖_F over the text's keys K₀ in the base model; 0 without edits."""
    free_share: float
    """Mean ‖Pk‖²/‖k‖² of the edit keys: the share that edits may use; nan without edits."""


def preservation(base_weight: Tensor, edited_weight: Tensor, moment: Tensor) -> float:
    """‖ΔK₀‖_F/‖W₀K₀‖_F from weights [d_out, d_in] and the keys' second moment C [d_in, d_in].

    The keys need not be kept: ‖ΔK₀‖²_F = n·tr(Δ C Δᵀ). A moment summed from float32 products cannot
    tell errors under about 1e-4 from 0.
    """
    C = moment.double()
    W = base_weight.to(C)
    D = edited_weight.to(C) - W
    energy = float(((W @ C) * W).sum())
    moved = float(((D @ C) * D).sum())
    return math.sqrt(max(moved, 0.0) / energy) if energy > 0 else math.nan


def preservation_report(editor: Editor, token_windows: Sequence[list[int]]) -> list[Preservation]:
    """The edited layers' preservation on `token_windows`, by layer.

    Keys are the base model's; the edited weights are as stored, rounding included. Use a text that
    the statistics did not see.
    """
    layers = editor.recipe.layers
    edited = _weights(editor)
    with frozen(editor.model), torch.no_grad(), editor.base_weights():
        base = _weights(editor)
        moments = key_moments(editor.partial, editor.tokenizer, token_windows, layers)
    return [
        Preservation(
            layer,
            preservation(base[layer], edited[layer], moments[layer].value),
            _free_share(editor, layer),
        )
        for layer in layers
    ]


def shipped_text() -> str:
    """The text that comes with the package for this check; no statistics were made on it."""
    return (resources.files("nulledit") / "assets" / SHIPPED).read_text(encoding="utf-8")


def shipped_corpus() -> Corpus:
    """`shipped_text` as a corpus, for `read_windows`."""
    text = shipped_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(SHIPPED, digest, lambda: iter(text.splitlines(keepends=True)))


def _weights(editor: Editor) -> dict[int, Tensor]:
    """A copy of W [d_out, d_in] of each edited layer, as stored now."""
    return {i: as_out_in(editor.partial.mlp_out(i)).clone() for i in editor.recipe.layers}


def _free_share(editor: Editor, layer: int) -> float:
    columns = editor.history.active
    if not columns:
        return math.nan
    keys = editor.history.column_tensor(columns, f"keys.{layer}").mT  # [d_in, n]
    metric = metric_of(editor.history.tensors[editor.history.epochs[-1].tensors], layer)
    return float(metric.free_share(keys).mean())
