"""Options of a recipe: which of them a ledger fixes, and what they change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nulledit.cli.options import chat_settings, parse_changes, parse_layers, parse_null_space

if TYPE_CHECKING:
    from nulledit.config import Recipe

# What a ledger fixes for good: parameter -> flag.
FIXED = {
    "model": "--model",
    "out": "--out",
    "seed": "--seed",
    "dtype": "--dtype",
    "quantize": "--quantize",
    "dry_run": "--dry-run",
}
# What an epoch fixes.
OF_EPOCH = {
    "recipe": "--recipe",
    "stats": "--stats",
    "batch_size": "--batch-size",
    "layers": "--layers",
    "method": "--method",
    "project": "--project",
    "learning_rate": "--learning-rate",
    "steps": "--steps",
    "clamp": "--clamp",
    "l2": "--l2",
    "null_space": "--null-space",
    "chat": "--chat",
    "system": "--system",
    "changes": "--set",
}
FIELDS = {
    "batch_size": "batch_size",
    "method": "method.name",
    "project": "method.projection",
    "learning_rate": "values.learning_rate",
    "steps": "values.steps",
    "clamp": "values.clamp",
    "l2": "method.l2",
}


def make_recipe(given: dict[str, Any]) -> Recipe:
    """The recipe of the options: a file's, a shipped one's or the default, changed by flags."""
    from nulledit.config import Recipe, load_recipe, shipped_recipes

    name = given["recipe"] or (given["model"] if given["model"] in shipped_recipes() else None)
    return changed(load_recipe(name) if name else Recipe(), given)


def changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """`recipe` with the fields that flags name."""
    changes: dict[str, Any] = dict(parse_changes(given["changes"]))
    changes |= {FIELDS[k]: given[k] for k in FIELDS if given[k] is not None}
    if given["layers"]:
        changes["layers"] = parse_layers(given["layers"])
    if given["null_space"]:
        changes["null_space"] = parse_null_space(given["null_space"])
    recipe = recipe.with_fields(changes)
    return replace(recipe, chat=chat_settings(given, recipe.chat))
