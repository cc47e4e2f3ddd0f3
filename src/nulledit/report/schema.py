"""What the JSON of a study's folder must look like, which may come from anywhere."""

from __future__ import annotations

from typing import Any

from nulledit.io.settings import Whole
from nulledit.io.shapes import Digits, Finite, Measured, has, list_of, named, or_none, that

_ESTIMATE = has(mean=Measured, standard_error=Measured, n=or_none(Whole))
_TABLE = has(
    **dict.fromkeys(("name", "title", "caption"), str),
    columns=list_of(has(key=str, title=str, unit=str, digits=Digits)),
    rows=list_of(named(that(str | Measured | _ESTIMATE, "text, a number or an estimate"))),
)
_FIGURE = has(
    **dict.fromkeys(("name", "caption", "kind", "x", "y", "series"), str),
    panel=or_none(str),
    labels=named(str),
    log=list_of(str),
)
_EXAMPLE = has(
    **dict.fromkeys(("arm", "prompt", "target"), str),
    **dict.fromkeys(("before", "after"), or_none(str)),
    holds=bool,
)
_TEXTS = ("name", "title", "question", "scale", "shows", "cannot_show", "nulledit")
STUDY = has(
    **dict.fromkeys(_TEXTS, str),
    settings=named(Any),
    environment=list_of(named(Any)),
    seconds=named(Finite),
    notices=list_of(str),
    tables=list_of(_TABLE),
    figures=list_of(_FIGURE),
    examples=list_of(_EXAMPLE),
)
"""The content of `study.json`, but for its names, which `Study` itself checks."""
