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
from nulledit.editing.editor import Editor
from nulledit.models.layouts import as_out_in, frozen

SHIPPED = "preservation.txt"


@dataclass(frozen=True)
class Preservation:
    """What the edits do to one layer's output on a text that has nothing to do with them."""

    layer: int
    """Block number."""
    error: float
    """‖ΔK₀‖_F/‖W₀K₀‖_F over the text's keys K₀ in the base model; 0 without edits."""
    standard_error: float
    """Of `error`, over windows of the text; nan for one window."""
    n: int
    """Windows."""


def preservation_error(
    base_weight: Tensor, edited_weight: Tensor, windows: Sequence[Tensor]
) -> tuple[float, float]:
    """‖ΔK₀‖_F/‖W₀K₀‖_F and its standard error.

    Weights are [d_out, d_in], keys [t, d_in] by window.

    The standard error is that of a ratio of sums over windows, by the delta method.
    """
    W = base_weight.double()
    D = edited_weight.to(W) - W
    moved = torch.stack([(K.to(W) @ D.mT).square().sum() for K in windows])
    energy = torch.stack([(K.to(W) @ W.mT).square().sum() for K in windows])
    if energy.sum() == 0:
        return math.nan, math.nan
    ratio = moved.sum() / energy.sum()
    error, n = float(ratio.sqrt()), len(windows)
    if n < 2 or error == 0:
        return error, math.nan if n < 2 else 0.0
    spread = (moved - ratio * energy).square().sum() * n / (n - 1)
    return error, float(spread.sqrt() / energy.sum()) / (2 * error)


def preservation_report(editor: Editor, token_windows: Sequence[list[int]]) -> list[Preservation]:
    """The edited layers' preservation on `token_windows`, by layer.

    Keys are the base model's; the edited weights are as stored, rounding included. Use a text that
    the statistics did not see.
    """
    layers = editor.weights.layers or editor.recipe.layers
    edited = _weights(editor, layers)
    keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with frozen(editor.model), torch.no_grad(), editor.base_weights():
        base = _weights(editor, layers)
        for window in token_windows:
            batch = editor.editable.collate([window])
            with editor.editable.reading_keys(layers) as found:
                editor.editable.run(batch, last=layers[-1])
            for layer in layers:
                keys[layer].append(found[layer][0])  # [t, d_in]
    n = len(token_windows)
    return [
        Preservation(layer, *preservation_error(base[layer], edited[layer], keys[layer]), n)
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


def _weights(editor: Editor, layers: Sequence[int]) -> dict[int, Tensor]:
    """A copy of W [d_out, d_in] of `layers`, as stored now."""
    return {i: as_out_in(editor.editable.mlp_out(i)).clone() for i in layers}
