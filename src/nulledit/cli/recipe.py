"""`nulledit recipe`: what a recipe may hold, for editors that complete and check it."""

from __future__ import annotations

from typing import Any

import click

from nulledit.cli.command import Call, command
from nulledit.cli.common import emit
from nulledit.cli.methods import field_docs


@click.group(short_help="What a recipe may hold, for editors.")
def recipe() -> None:
    """Recipes: YAML files of settings for `nulledit edit --recipe`.

    \b
    $ nulledit recipe schema > recipe.schema.json
    """


@command("The JSON Schema of recipes.", group=recipe)
def schema(_call: Call) -> None:
    """The JSON Schema of recipes: every setting, what it does, its bounds and its default.

    An editor with a YAML language server completes and checks a recipe whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.

    \b
    $ nulledit recipe schema > recipe.schema.json
    """
    emit(recipe_schema())


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, with the constants of each method that is known here."""
    import nulledit.config as config
    from nulledit.methods import METHODS

    found = described(config.Recipe)
    sections = found["$defs"] = {
        name: described(getattr(config, name)) for name in found.pop("$defs")
    }
    method = sections[config.MethodSettings.__name__]
    own = method.pop("properties")
    del own["constants"], method["additionalProperties"]
    # In a recipe a method's constants stand beside its name, which may be left out for the default.
    method["anyOf"] = [
        {
            "properties": own
            | {"name": own["name"] | {"const": known.name}}
            | described(known.settings)["properties"],
            "required": [] if known.name == config.MethodSettings.name else ["name"],
            "additionalProperties": False,
        }
        for known in METHODS
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found


def described(settings: type) -> dict[str, Any]:
    """The JSON Schema of settings, with the docstring of each field."""
    from nulledit.io.settings import json_schema

    found, docs = json_schema(settings), field_docs(settings)
    for name, field in found["properties"].items():
        field.pop("title", None)
        field["description"] = docs.get(name, "")
    return found
