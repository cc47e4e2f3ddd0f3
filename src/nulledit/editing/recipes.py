"""Which recipe an editor uses on a model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from nulledit.config import Recipe, ValueSettings, layers_by_depth, read_recipe
from nulledit.errors import ConfigError, ModelError
from nulledit.methods import change_recipe, find_method
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in
from nulledit.models.quantized import make_editable

logger = logging.getLogger(__name__)
STEP = 0.125
"""Of ‖h‖, where a norm follows W and a recipe says nothing of steps; as with SmolLM2-135M's."""


def resolve_recipe(
    recipe: Recipe | str | Path | None, name: str, model: EditableModel, base_hash: str
) -> Recipe:
    """The recipe to use on `model`, with all of its constants and with layers, whose matrices are
    made ready to be written.

    `base_hash`: of the model without edits. ModelError where the layers don't fit the model.
    """
    recipe = read_recipe(recipe, name)
    if recipe.layout not in (None, model.layout):
        raise ConfigError("layout is another than the model's first recipe gave; start a new run")
    top, named = model.depth - 1, bool(recipe.layers)
    recipe = with_layers(recipe, model)
    recipe = replace(recipe, values=_stepping(recipe.values, model))
    last = recipe.layers[-1]
    if last > top:
        raise ModelError(f"layer {last} is out of range: the model has layers 0 to {top}")
    if last == top:
        raise ModelError(
            f"layer {top} is the model's last: nothing above it would read the edit; "
            f"choose layers up to {top - 1}"
        )
    recipe = with_method(recipe, model)
    method = find_method(recipe.method.name)
    method.check(recipe)
    if recipe.values.at == "first" and model.values_at_output:
        raise ConfigError(
            "values.at is first, but a norm follows W, so that values are of each layer's own W: "
            "set it to last or each"
        )
    recipe = replace(recipe, layers=method.edited(recipe.layers))
    if not named:
        logger.warning("the recipe names no layers; chosen by depth: %s", list(recipe.layers))
    for layer in recipe.layers:
        model.mlp_out(layer)
    make_editable(model.model, model.layout, recipe.layers, base_hash)
    for layer in recipe.layers:
        as_out_in(model.mlp_out(layer))
    if method.apart:
        _check_neurons(model, last)
    return method.filled(recipe)


def with_method(recipe: Recipe, model: EditableModel) -> Recipe:
    """`recipe`, which names layers, by the method that `model` can take of the two it may name."""
    if not (otherwise := recipe.method.otherwise):
        return recipe
    instead = change_recipe(recipe, {"method.name": otherwise})
    find_method(otherwise).check(instead)
    recipe = replace(recipe, method=replace(recipe.method, otherwise=""))
    if find_method(recipe.method.name).apart:
        try:
            _check_neurons(model, recipe.layers[-1])
        except ModelError as error:
            logger.warning("%s in place of %s: %s", otherwise, recipe.method.name, error)
            return instead
    return recipe


def with_layers(recipe: Recipe, model: EditableModel) -> Recipe:
    """`recipe`, with layers by depth if it names none."""
    if recipe.layers:
        return recipe
    chosen = layers_by_depth(model.depth)
    chosen = tuple(layer for layer in chosen if model.fits(layer)) or chosen
    return replace(recipe, layers=chosen)


def _check_neurons(model: EditableModel, layer: int) -> None:
    """ModelError unless the MLP of block `layer` can be given neurons, and saved with them."""
    model.form(layer)
    holding = [layer for layer in range(model.depth) if model.fits(layer)]
    widths = sorted({model.width(layer) for layer in holding})
    if len(widths) > 1:
        raise ModelError(
            f"its blocks have MLPs of {', '.join(map(str, widths))} units; expected one width "
            "(a model that was given neurons in memory: take the edits back, or load what "
            "editor.save wrote)"
        )


def _stepping(values: ValueSettings, model: EditableModel) -> ValueSettings:
    """`values`, with steps that suit a norm after W where theirs are the published ones.

    These are in units of W's output, which the norm lets have any length.
    """
    published = ValueSettings()
    ours = values.learning_rate, values.learning_rate_of
    if not model.values_at_output or ours != (published.learning_rate, published.learning_rate_of):
        return values
    logger.warning(
        "a norm follows W, so steps of values are shares of the state's length: "
        "values.learning_rate_of state, values.learning_rate %s",
        STEP,
    )
    return replace(values, learning_rate=STEP, learning_rate_of="state")
