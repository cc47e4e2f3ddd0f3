"""What the JSON of a study's folder must look like, which may come from anywhere."""

from __future__ import annotations

from typing import Annotated, Any

from typing_extensions import TypedDict

from nulledit.io.settings import Expected, Whole
from nulledit.io.shapes import Digits, Finite, Measured


class _Column(TypedDict):
    key: str
    title: str
    unit: str
    digits: Digits


class _Value(TypedDict):
    mean: Measured
    standard_error: Measured
    n: Whole | None


_Cell = Annotated[str | Measured | _Value, Expected("text, a number or an estimate")]


class _Table(TypedDict):
    name: str
    title: str
    caption: str
    columns: list[_Column]
    rows: list[dict[str, _Cell]]


class _Figure(TypedDict):
    name: str
    caption: str
    kind: str
    x: str
    y: str
    series: str
    panel: str | None
    labels: dict[str, str]
    log: list[str]


class _Example(TypedDict):
    arm: str
    prompt: str
    target: str
    before: str | None
    after: str | None
    holds: bool


class StudyShape(TypedDict):
    """The content of `study.json`, but for its names, which `Study` itself checks."""

    name: str
    title: str
    question: str
    scale: str
    shows: str
    cannot_show: str
    nulledit: str
    settings: dict[str, Any]
    environment: list[dict[str, Any]]
    seconds: dict[str, Finite]
    notices: list[str]
    tables: list[_Table]
    figures: list[_Figure]
    examples: list[_Example]
