"""How far the edited weights move what the model knew: ‖ΔK₀‖/‖W₀K₀‖ on text not edited."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from nulledit.data.corpus import Corpus
from nulledit.editing.engine import EditEngine
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
    moved = [(K.to(W) @ D.mT).square().sum() for K in windows]
    return _ratio(moved, [(K.to(W) @ W.mT).square().sum() for K in windows])


def _ratio(by_window: Sequence[Tensor], energies: Sequence[Tensor]) -> tuple[float, float]:
    """√(Σ moved / Σ energy) over windows, and its standard error."""
    moved, energy = torch.stack(list(by_window)), torch.stack(list(energies))
    if energy.sum() == 0:
        return math.nan, math.nan
    ratio = moved.sum() / energy.sum()
    error, n = float(ratio.sqrt()), len(moved)
    if n < 2 or error == 0:
        return error, math.nan if n < 2 else 0.0
    spread = (moved - ratio * energy).square().sum() * n / (n - 1)
    return error, float(spread.sqrt() / energy.sum()) / (2 * error)


def preservation_report(
    editor: EditEngine, token_windows: Sequence[list[int]]
) -> list[Preservation]:
    """The edited layers' preservation on `token_windows`, by layer.

    Keys are the base model's; the edited weights are as stored, rounding included. Use a text that
    the statistics did not see.
    """
    layers = editor.weights.layers or editor.recipe.layers
    if editor.weights.grown:
        return [_of_neurons(editor, layer, token_windows) for layer in layers]
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


def _of_neurons(editor: EditEngine, layer: int, token_windows: Sequence[list[int]]) -> Preservation:
    """What a layer's neurons, as stored, add to the output of its MLP on text."""
    model, form = editor.editable, editor.editable.form(layer)
    neurons, moved, energy = form.held(), [], []
    with frozen(editor.model), torch.no_grad(), editor.base_weights():
        for window in token_windows:
            batch = model.collate([window])
            with model.reading_inputs([layer]) as found, model.reading_output(layer) as written:
                model.run(batch, last=layer)
            given = found[layer][0].mT.double()  # [d, t]
            added = given.new_zeros(1)
            if neurons is not None:
                added = neurons.columns.double() @ neurons.units(given, form.activation)
            moved.append(added.square().sum().cpu())
            energy.append(written[0].double().square().sum().cpu())
    return Preservation(layer, *_ratio(moved, energy), len(token_windows))


def shipped_text() -> str:
    """The text that comes with the package for this check; no statistics were made on it."""
    return shipped_file().read_text(encoding="utf-8")


def shipped_file() -> Path:
    """Where that text lies."""
    return Path(str(resources.files("nulledit") / "assets" / SHIPPED))


def shipped_corpus() -> Corpus:
    """`shipped_text` as a corpus, for `read_windows`."""
    text = shipped_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(SHIPPED, digest, lambda: iter(text.splitlines(keepends=True)))


def _weights(editor: EditEngine, layers: Sequence[int]) -> dict[int, Tensor]:
    """A copy of W [d_out, d_in] of `layers`, as stored now."""
    return {i: as_out_in(editor.editable.mlp_out(i)).clone() for i in layers}
