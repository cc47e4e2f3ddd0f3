"""What an epoch fixes for all its batches: W₀ and the spectrum of each edited layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from nulledit.config import Recipe
from nulledit.errors import ConfigError, StatisticsError
from nulledit.ledger.records import Epoch, History
from nulledit.ledger.store import tensor_bytes
from nulledit.ledger.tensors import form_tensors, spectrum_tensors
from nulledit.ledger.update_solver import LayerPreconditioners
from nulledit.linalg.spectrum import RULES, Spectrum
from nulledit.methods import find_method
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in
from nulledit.statistics.spectra import Statistics

logger = logging.getLogger(__name__)
Opening = Callable[[tuple[str, ...], int], tuple[Epoch, dict[str, Tensor]]]
"""Contexts and seed -> the epoch and its tensors."""


def open_epoch(
    model: EditableModel, recipe: Recipe, statistics: Statistics, history: History
) -> Opening:
    """Prepare the next epoch of `history`; called with contexts and seed, it is made.

    Warns where the null-space rule protects nothing or leaves no room. StatisticsError where the
    statistics do not fit the model's layers or do not serve the method's filter.
    """
    dtype = torch.float64 if model.model.dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor] = {}
    gated = is_gated(recipe)
    check_joins(recipe, history)
    for layer in recipe.layers:
        weight = as_out_in(model.mlp_out(layer))
        if gated:
            form = model.form(layer)
            spectrum, threshold = _inputs(statistics.spectra[layer], layer, form.d), 0.0
            tensors |= form_tensors(form.units, layer)
        else:
            found = statistics.spectra[layer]
            spectrum, threshold = _spectrum(recipe, found, layer, weight.shape[1])
        tensors |= spectrum_tensors(spectrum, threshold, layer, dtype)
        if layer not in history.layers:
            tensors[f"base.{layer}"] = weight.detach().clone().cpu().contiguous()

    def make(contexts: tuple[str, ...], seed: int) -> tuple[Epoch, dict[str, Tensor]]:
        digest, _ = tensor_bytes(tensors)
        manifest = asdict(statistics.manifest)
        return Epoch(
            len(history.epochs) + 1, recipe.to_dict(), seed, contexts, manifest, digest
        ), tensors

    return make


def check_joins(recipe: Recipe, history: History) -> None:
    """ConfigError where an epoch of `recipe` can't follow those of `history`."""
    gated = is_gated(recipe)
    if any(is_gated(epoch.recipe) != gated for epoch in history.epochs):
        raise ConfigError(
            "gated edits and updates of W can't be in one run: start a new one, on what `nulledit "
            "export --as checkpoint` makes of this one"
        )
    if gated and history.layers and recipe.layers != history.layers:
        raise ConfigError(
            f"gated edits of one run are in one block: this one's are in {history.layers[0]}, the "
            f"recipe names {recipe.layers[-1]}; start a new run"
        )


def is_gated(recipe: Recipe) -> bool:
    """Whether its edits are neurons, and no updates of W."""
    return find_method(recipe.method.name).apart


def _inputs(spectrum: Spectrum, layer: int, d: int) -> Spectrum:
    """The whole spectrum of a layer's inputs, each with a 1 at its end."""
    if spectrum.d_in != d + 1:
        raise StatisticsError(
            f"statistics of layer {layer} are {spectrum.d_in} wide, its MLP's inputs {d} and a 1"
        )
    try:
        spectrum.whole()
    except LookupError as error:
        raise StatisticsError(f"these statistics don't serve gated edits: {error}") from error
    return spectrum


def _spectrum(recipe: Recipe, spectrum: Spectrum, layer: int, d_in: int) -> tuple[Spectrum, float]:
    """What the recipe's preconditioners need of `spectrum`, and τ."""
    rule, value = recipe.null_space.rule, recipe.null_space.value
    method = find_method(recipe.method.name)
    if spectrum.d_in != d_in:
        raise StatisticsError(
            f"statistics of layer {layer} are {spectrum.d_in} wide, its keys {d_in}"
        )
    threshold = RULES[rule](spectrum.eigenvalues, value)
    try:
        found = LayerPreconditioners.of(recipe, spectrum, threshold)
    except LookupError as error:
        raise StatisticsError(
            f"these compact statistics don't serve {method.name} with null_space {rule} {value} at "
            f"layer {layer} ({error}): give full ones by --stats (`nulledit stats make --keys` "
            "makes them)"
        ) from error
    if spectrum.closed:
        logger.warning(
            "layer %d: %d of %d experts are left alone: in the statistics they were given fewer "
            "tokens than their keys are wide (%d)",
            layer,
            spectrum.closed,
            len(spectrum.tokens),
            spectrum.width,
        )
    if method.projection(recipe.method) != "none":
        _warn_of_extremes(found.projector.rank, layer, d_in, threshold)
    return found.spectrum, threshold


def _warn_of_extremes(free: int, layer: int, d_in: int, threshold: float) -> None:
    if free == d_in:
        logger.warning(
            "layer %d: nothing is protected (no eigenvalue reaches %.3g)", layer, threshold
        )
    if free == 0:
        logger.warning(
            "layer %d: no room left (every eigenvalue reaches %.3g): edits are void",
            layer,
            threshold,
        )
