"""How large a study is: its arms, queues and checks, from a YAML file for each scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nulledit.config import Recipe
from nulledit.data.facts import suggest
from nulledit.errors import ConfigError

PROJECTIONS = ("inside", "after", "none")


@dataclass(frozen=True)
class Scale:
    """Settings of all studies at one scale."""

    name: str
    """small, paper, or a file's name."""
    arms: Mapping[str, Mapping[str, Any]]
    """Name -> dotted fields of the recipe that differ from the base recipe."""
    studies: Mapping[str, Mapping[str, Any]]
    """Name of a study -> its settings."""

    def of(self, study: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A study's settings with `changes`; ConfigError for a setting that it does not have."""
        settings = dict(self.studies[study])
        for name, value in changes.items():
            if name not in settings:
                raise ConfigError(
                    f"study {study} has no setting {name!r}{suggest(name, settings)}; it has "
                    f"{', '.join(settings)}"
                )
            settings[name] = yaml.safe_load(value) if isinstance(value, str) else value
        return settings

    def recipe(self, base: Recipe, arm: str) -> Recipe:
        """The recipe of an arm: `memit`, or `memit+inside` for MEMIT with the projection."""
        name, plus, projection = arm.partition("+")
        if name not in self.arms:
            raise ConfigError(
                f"unknown arm {arm!r}{suggest(name, self.arms)}; known: {', '.join(self.arms)}, "
                "each also with +inside or +after for the projection"
            )
        if plus and projection not in PROJECTIONS:
            raise ConfigError(
                f"arm {arm!r}: expected {name}+ one of {', '.join(PROJECTIONS)}, found "
                f"{projection!r}"
            )
        changes = dict(self.arms[name])
        if plus:
            changes["method.projection"] = projection
        return base.with_fields(changes)


def load_scale(name_or_path: str) -> Scale:
    """The scale `small` or `paper`, or a file of the same form."""
    shipped = resources.files("nulledit") / "assets" / "studies" / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if name_or_path in ("small", "paper"):
        text = shipped.read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ConfigError(f"no scale {name_or_path!r}: expected small, paper or a YAML file")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: broken YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping) or set(data) != {"arms", "studies"}:
        raise ConfigError(f"{path}: expected `arms` and `studies`")
    return Scale(path.stem, data["arms"], data["studies"])


def chosen(settings: Mapping[str, Any], name: str = "arms") -> Sequence[str]:
    """A list setting, written as a list or with commas."""
    value = settings[name]
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
