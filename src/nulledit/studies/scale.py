"""How large a study is: its arms, queues and checks, from a YAML file for each scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from nulledit.config import Recipe, load_recipe
from nulledit.data.facts import suggest
from nulledit.errors import ConfigError
from nulledit.io.settings import (
    Count,
    Expected,
    Positive,
    Several,
    Whole,
    checked,
    load_settings,
    read_settings,
)
from nulledit.io.untrusted import parse_yaml
from nulledit.methods import change_recipe, find_method

PROJECTIONS = ("inside", "after", "none")
PLACES: Mapping[str, Callable[[tuple[int, ...]], list[int]]] = {
    "middle": lambda layers: [layers[len(layers) // 2]] if layers else [],
    "last": lambda layers: list(layers[-1:]),
}
"""What an arm that edits one block names instead of its number, which hangs on the model."""


@checked
@dataclass(frozen=True)
class Scale:
    """Settings of all studies at one scale."""

    kind: ClassVar[str] = "scale"
    folder: ClassVar[str] = "studies"

    name: str
    """small, paper, or a file's name."""
    arms: Mapping[str, Mapping[str, Any]]
    """Name -> dotted fields of the recipe that differ from the base recipe."""
    studies: Mapping[str, Mapping[str, Any]]
    """Name of a study -> its settings."""

    @classmethod
    def from_dict(cls, data: Any) -> Scale:
        """From plain data; ConfigError for what can't be."""
        return read_settings(cls, {"name": "", **data} if isinstance(data, Mapping) else data)

    def of(self, study: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A study's settings with `changes`; ConfigError for what can't be."""
        if study not in self.studies:
            raise ConfigError(f"scale {self.name} has no settings of the study {study}")
        settings = dict(self.studies[study])
        for name, value in changes.items():
            if name not in settings:
                raise ConfigError(
                    f"study {study} has no setting {name!r}{suggest(name, settings)}; it has "
                    f"{', '.join(settings)}"
                )
            settings[name] = _value(name, value)
        check_settings(settings)
        return settings

    def recipe(self, base: Recipe, arm: str, *, called: str = "arm") -> Recipe:
        """The recipe of an arm: `memit`, or `memit+inside` for MEMIT with the projection.

        A recipe's file is an arm, too, whatever the base recipe says. `called`: what messages call
        an arm.
        """
        name, plus, projection = arm.partition("+")
        if Path(name).suffix in (".yaml", ".yml"):
            base, changes = load_recipe(name), {}
        elif name in self.arms:
            changes = dict(self.arms[name])
        else:
            raise ConfigError(
                f"unknown {called} {arm!r}{suggest(name, self.arms)}; known: "
                f"{', '.join(self.arms)}, each also with +inside or +after for the projection; or "
                "a recipe's file"
            )
        if plus and projection not in PROJECTIONS:
            raise ConfigError(
                f"{called} {arm!r}: expected {name}+ one of {', '.join(PROJECTIONS)}, found "
                f"{projection!r}"
            )
        if (place := str(changes.get("layers"))) in PLACES:
            changes["layers"] = PLACES[place](base.layers)
        if plus:
            changes["method.projection"] = projection
        try:
            recipe = change_recipe(base, changes)
            find_method(recipe.method.name).check(recipe)
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}") from error
        return recipe


Numbers = Annotated[Several[Positive], Expected("a list of numbers above 0", bool)]
Crowds = Annotated[Several[Whole], Expected("a list of whole numbers", bool)]
Often = Annotated[Several[Count] | Count, Expected("a number of facts, or a list", bool)]
Names = Annotated[
    Several[str] | str,
    Expected("names, with commas between them", lambda given: all(listed(given) or [""])),
]
_POSITIVE = ("facts", "batch_size", "windows", "items", "prompts", "smallest", "leak_prompts")
_COUNTS = ("skip", "zsre", "answers", "fluency")  # 0 leaves it out
_LISTS = ("thresholds", "leakages", "softness", "penalties", "tokens", "widths", "batch_sizes")
SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys((*_POSITIVE, "expansion", "solve_facts"), Count),
    **dict.fromkeys(_COUNTS, Whole),
    **dict.fromkeys(_LISTS, Numbers),
    **dict.fromkeys(("arms", "zsre_arms", "projections"), Names),
    "crowds": Crowds,
    "ask_every": Often,
}
"""What the settings of studies hold; those of one study are checked there."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """ConfigError for a setting of the wrong kind or out of range."""
    for name in settings.keys() & SETTINGS:
        read_settings(SETTINGS[name], settings[name], name)


def load_scale(name_or_path: str) -> Scale:
    """The scale `small` or `paper`, or a file of the same form."""
    return replace(load_settings(Scale, name_or_path), name=Path(name_or_path).stem)


def _value(name: str, text: Any) -> Any:
    """A setting as given on the command line; lists with commas or in YAML's brackets."""
    if not isinstance(text, str):
        return text
    kind, bare = SETTINGS.get(name), not text.lstrip().startswith("[")
    if kind is Names and bare:
        return text
    if kind in (Numbers, Crowds) and bare:
        text = f"[{text}]"
    return parse_yaml(text, source=name, error=ConfigError)


def chosen(settings: Mapping[str, Any], name: str = "arms") -> Sequence[str]:
    """A list setting, written as a list or with commas."""
    return listed(settings[name])


def listed(given: Sequence[str] | str) -> Sequence[str]:
    """Names in a list, or in a text with commas."""
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
