"""What browsers post, as it is meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import FormData

from nulledit.errors import ConfigError
from nulledit.ui import deeds
from nulledit.ui.forms import Checked
from nulledit.ui.settings import Settings

MOST_RETRIES = 3


def text(given: Mapping[str, Any], name: str) -> str:
    """A form's text; browsers send its newlines as CR LF."""
    value = given.get(name, "")
    return value.replace("\r\n", "\n") if isinstance(value, str) else ""


def whole(said: str | None, otherwise: int) -> int:
    """A whole number; `otherwise` for anything else."""
    return int(said) if said and said.isdecimal() and 0 < len(said) < 10 else otherwise


def times(given: FormData, *, least: int = 0) -> int:
    """How often what does not hold is written again."""
    return min(max(whole(text(given, "retry"), 0), least), MOST_RETRIES)


def edit_of(checked: Checked, settings: Settings, given: FormData) -> deeds.Edit:
    """Facts to write, and how."""
    return deeds.Edit(
        checked.whole,
        retry=times(given),
        limits=settings.limits,
        changes=settings.changes,
        statistics=settings.statistics,
        evaluate=not given.get("no_evaluate"),
        old_answers=bool(given.get("old_answers")),
    )


def texts(given: Mapping[str, Any]) -> dict[str, str]:
    """All texts of a form by their names."""
    return {name: text(given, name) for name in given}


def change(given: FormData) -> tuple[str, list[str]]:
    """One of `deeds.CHANGES`, and the ids of its facts; ConfigError for anything else."""
    kind, ids = text(given, "kind"), [i for i in given.getlist("id") if isinstance(i, str)]
    if kind not in deeds.CHANGES:
        raise ConfigError(f"unknown change {kind!r}: expected {', '.join(deeds.CHANGES)}")
    if kind == "undo" and not ids:
        raise ConfigError("no fact was ticked: choose those to undo")
    return kind, list(dict.fromkeys(ids))


def named(kind: str, ids: Sequence[str], *, noun: bool = False) -> str:
    """A change in words."""
    few = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return f"{deeds.CHANGES[kind][noun]} {few}".strip()
