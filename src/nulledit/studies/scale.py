"""How large a study is: its arms, queues and checks, from a YAML file for each scale."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nulledit.config import Recipe
from nulledit.data.facts import suggest
from nulledit.errors import ConfigError
from nulledit.io.untrusted import MAX_SETTINGS, parse_yaml, read_text
from nulledit.methods import find_method

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
        try:
            recipe = base.with_fields(changes)
            find_method(recipe.method.name).check(recipe)
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}") from error
        return recipe


POSITIVE = (
    *("facts", "batch_size", "windows", "items", "prompts", "smallest", "leak_prompts"),
    *("expansion", "solve_facts"),
)
COUNTS = ("skip", "zsre", "answers", "fluency")  # 0 leaves it out
NUMBERS = ("thresholds", "leakages", "softness", "penalties", "tokens", "widths", "batch_sizes")
NAMES = ("arms", "zsre_arms", "projections")


def check_settings(settings: Mapping[str, Any]) -> None:
    """ConfigError for a setting of the wrong kind or out of range."""
    for name, value in settings.items():
        if name in POSITIVE and not _whole(value, 1):
            raise ConfigError(f"{name} is {value!r}; expected a whole number above 0")
        if name in COUNTS and not _whole(value, 0):
            raise ConfigError(f"{name} is {value!r}; expected a whole number, 0 or more")
        if name in NUMBERS and not (_list(value) and all(_number(v) and v > 0 for v in value)):
            raise ConfigError(f"{name} is {value!r}; expected a list of numbers above 0")
        if name == "crowds" and not (_list(value) and all(_whole(v, 0) for v in value)):
            raise ConfigError(f"{name} is {value!r}; expected a list of whole numbers")
        if name == "ask_every":
            listed = value if _list(value) else [value]
            if not all(_whole(v, 1) for v in listed):
                raise ConfigError(f"{name} is {value!r}; expected a number of facts, or a list")
        if name in NAMES:
            found = chosen(settings, name) if isinstance(value, str | list) else []
            if not found or not all(isinstance(v, str) and v for v in found):
                raise ConfigError(f"{name} is {value!r}; expected names, with commas between them")


def load_scale(name_or_path: str) -> Scale:
    """The scale `small` or `paper`, or a file of the same form."""
    shipped = resources.files("nulledit") / "assets" / "studies" / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if name_or_path in ("small", "paper"):
        text = shipped.read_text(encoding="utf-8")
    elif os.path.exists(path):
        text = read_text(path, most=MAX_SETTINGS, error=ConfigError, what="scale")
    else:
        raise ConfigError(f"no scale {name_or_path!r}: expected small, paper or a YAML file")
    data = parse_yaml(text, source=str(path), error=ConfigError)
    if not isinstance(data, Mapping) or set(data) != {"arms", "studies"}:
        raise ConfigError(f"{path}: expected `arms` and `studies`")
    for part in ("arms", "studies"):
        named = data[part]
        if not isinstance(named, Mapping) or not all(
            isinstance(v, Mapping) for v in named.values()
        ):
            raise ConfigError(f"{path}: {part} must be names with settings behind them")
    return Scale(path.stem, data["arms"], data["studies"])


def _value(name: str, text: Any) -> Any:
    """A setting as given on the command line; lists with commas or in YAML's brackets."""
    if not isinstance(text, str):
        return text
    if name in NAMES and not text.lstrip().startswith("["):
        return text
    if name in (*NUMBERS, "crowds") and not text.lstrip().startswith("["):
        text = f"[{text}]"
    return parse_yaml(text, source=name, error=ConfigError)


def _list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def chosen(settings: Mapping[str, Any], name: str = "arms") -> Sequence[str]:
    """A list setting, written as a list or with commas."""
    value = settings[name]
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
