"""Whether the JSON of a study's folder, which may come from anywhere, is a study."""

from __future__ import annotations

from typing import Any

from nulledit.io.shapes import (
    has,
    is_bool,
    is_digits,
    is_measured,
    is_object,
    is_shallow,
    is_text,
    is_whole,
    list_of,
    named,
    or_none,
)
from nulledit.io.untrusted import is_number


def is_study(value: Any) -> bool:
    """The content of `study.json`, but for its names, which `Study` itself checks."""
    texts = ("name", "title", "question", "scale", "shows", "cannot_show", "nulledit")
    return is_shallow(value) and has(
        **dict.fromkeys(texts, is_text),
        settings=is_object,
        environment=list_of(is_object),
        seconds=named(is_number),
        notices=list_of(is_text),
        tables=list_of(_is_table),
        figures=list_of(_is_figure),
        examples=list_of(_is_example),
    )(value)


def _is_table(value: Any) -> bool:
    texts = dict.fromkeys(("name", "title", "caption"), is_text)
    column = has(key=is_text, title=is_text, unit=is_text, digits=is_digits)
    rows = list_of(named(_is_cell))
    return has(**texts, columns=list_of(column), rows=rows)(value)


def _is_cell(value: Any) -> bool:
    measured = has(mean=is_measured, standard_error=is_measured, n=or_none(is_whole))
    return is_text(value) or is_measured(value) or measured(value)


def _is_figure(value: Any) -> bool:
    texts = dict.fromkeys(("name", "caption", "kind", "x", "y", "series"), is_text)
    rest = {"panel": or_none(is_text), "labels": named(is_text), "log": list_of(is_text)}
    return has(**texts, **rest)(value)


def _is_example(value: Any) -> bool:
    texts = dict.fromkeys(("arm", "prompt", "target"), is_text)
    said = dict.fromkeys(("before", "after"), or_none(is_text))
    return has(**texts, **said, holds=is_bool)(value)
