"""What the form of an edit says of how it is written: limits that must hold, and the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nulledit.config import Recipe
from nulledit.errors import ConfigError
from nulledit.io.settings import parse_changes, typed
from nulledit.methods import METHODS, change_recipe, find_method
from nulledit.runs.limits import KINDS, Least, Limits, load_limits

LIMIT = "limit."
"""How the names of the limits' fields begin."""
RECIPE = ("method", "settings", "stats")
"""Fields of another recipe."""
TICKS = ("gate", "old_answers", "no_evaluate")


@dataclass(frozen=True)
class LimitField:
    """One limit in the form."""

    name: str
    about: str
    sign: str
    unit: str
    value: str
    """Its number among the default limits; empty where it is none of them."""

    @property
    def field(self) -> str:
        """Its name in the form."""
        return LIMIT + self.name


@dataclass(frozen=True)
class Settings:
    """How facts are to be written, or what is wrong with what was given."""

    limits: Limits | None = None
    """What must hold, or nothing is written."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted fields of the recipe that are otherwise from here on."""
    statistics: str | None = None
    """Of another recipe; None: those found."""
    errors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field -> what is wrong with it."""


def limit_fields() -> list[LimitField]:
    """All limits that there are, those of the default set first."""
    known = load_limits()
    names = [*known.bounds, *(name for name in KINDS if name not in known.bounds)]
    return [
        LimitField(
            name=name,
            about=KINDS[name].about,
            sign="≥" if _side(name) == "at_least" else "≤",
            unit=KINDS[name].unit,
            value=f"{known.to_dict()[name][_side(name)]:g}" if name in known.bounds else "",
        )
        for name in names
    ]


def limits_given(given: Mapping[str, str]) -> bool:
    """Whether the form had the limits' fields at all."""
    return any(name.startswith(LIMIT) for name in given)


def methods() -> list[tuple[str, str]]:
    """Names of all methods, and what each does."""
    return [(method.name, method.about) for method in METHODS]


def read_settings_of(given: Mapping[str, str], recipe: Recipe) -> Settings:
    """What a form's texts say. `recipe`: of the run, as it is now."""
    limits, errors = read_limits_of(given)
    changes = _changes(given, recipe, errors)
    statistics = given.get("stats", "").strip() or None
    if statistics and not Path(statistics).expanduser().exists():
        errors["stats"] = (f"{statistics}: no such file or folder",)
    elif statistics and not changes:
        errors["stats"] = ("statistics belong to another recipe: change the method or a setting",)
    return Settings(limits, changes, statistics, errors)


def read_limits_of(
    given: Mapping[str, str],
) -> tuple[Limits | None, dict[str, tuple[str, ...]]]:
    """The limits that a form asks for, if it does, and what is wrong with its fields."""
    errors: dict[str, tuple[str, ...]] = {}
    return _limits(given, errors) if given.get("gate") else None, errors


def _limits(given: Mapping[str, str], errors: dict[str, tuple[str, ...]]) -> Limits | None:
    """The limits whose fields have a number; a form without such fields means the default ones."""
    known = load_limits()
    if not limits_given(given):
        return known
    asked, wrong = dict(_asked(given, known.to_dict())), False
    for name, bound in asked.items():
        try:
            Limits.from_dict({name: bound})
        except ConfigError as error:
            errors[LIMIT + name], wrong = (str(error),), True
    if not asked:
        errors["gate"] = ("no limit has a number: give one, or do not ask for limits",)
    return Limits.from_dict(asked, source="the limits of the form") if asked and not wrong else None


def _asked(
    given: Mapping[str, str], known: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in KINDS:
        if text := given.get(LIMIT + name, "").strip():
            yield name, {**known.get(name, {}), _side(name): typed(text)}


def _side(name: str) -> str:
    return "at_least" if issubclass(KINDS[name].settings, Least) else "at_most"


def _changes(
    given: Mapping[str, str], recipe: Recipe, errors: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Checked as the options --method and --set of `nulledit edit` are."""
    method = given.get("method", "").strip()
    lines = [line.strip() for line in given.get("settings", "").splitlines() if line.strip()]
    changes: dict[str, Any] = {}
    if method and method != recipe.method.name:
        try:
            find_method(method)
            changes["method.name"] = method
        except ConfigError as error:
            errors["method"] = (str(error),)
    wrong = []
    for line in lines:
        try:
            change = parse_changes([line], "")
            recipe.with_fields({**changes, **change})
            changes |= change
        except ConfigError as error:
            wrong.append(str(error))
    if not wrong and not errors.get("method"):
        try:
            changed = change_recipe(recipe, changes)
            find_method(changed.method.name).check(changed)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        errors["settings" if lines else "method"] = tuple(wrong)
    return changes
