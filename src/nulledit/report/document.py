"""What is shown: tables, figures, examples and text, in a study that is kept or a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nulledit._version import __version__
from nulledit.io.notebook import html_table
from nulledit.io.text import count
from nulledit.report.points import Point, Stored

FORMAT = 1


KINDS = ("lines", "bars", "scatter", "intervals")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Value(Stored):
    """A measured number of a table, in its column's unit."""

    mean: float | None
    """None if it is not finite."""
    standard_error: float | None = None
    """Of the mean; None where one value has none."""
    n: int | None = None
    """What the mean is over: facts, windows, questions."""

    @classmethod
    def percent(cls, rate: Any) -> Value | None:
        """A `Rate` (or its plain form) times 100; None where the data can't give it."""
        if rate is None:
            return None
        plain = rate if isinstance(rate, Mapping) else asdict(rate)
        mean, error = (
            None if plain[k] is None else 100 * plain[k] for k in ("mean", "standard_error")
        )
        return cls(mean, error, plain["n"])


Cell = str | int | float | Value | None


@dataclass(frozen=True)
class Column(Stored):
    """One column of a table."""

    key: str
    """Its name in the rows."""
    title: str
    """Its head."""
    better: str | None = None
    """`high` or `low` if the best row is to be marked; None if neither is better."""
    unit: str = ""
    """Of its numbers as they are stored: `%` means 0 to 100."""
    digits: int = 1
    """Shown after the point."""

    def __post_init__(self) -> None:
        _one_of("better", self.better, ("high", "low", None))
        _one_of("digits", self.digits, range(21))


@dataclass(frozen=True, repr=False)
class StudyTable(Stored):
    """One table. The first column names the rows; what the data can't give is None or left out."""

    name: str
    """For links."""
    title: str
    caption: str
    """What the numbers are of."""
    columns: tuple[Column, ...]
    """From left to right."""
    rows: tuple[Mapping[str, Cell], ...]
    """Column key to text, number or Value."""

    def __post_init__(self) -> None:
        check_name(self.name)
        keys = [column.key for column in self.columns]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(f"table {self.name}: expected different column keys, found {keys}")
        for row in self.rows:
            if unknown := set(row) - set(keys):
                raise ValueError(f"table {self.name}: a row has {sorted(unknown)}, not in {keys}")

    @classmethod
    def of(
        cls,
        name: str,
        title: str,
        head: Sequence[str],
        rows: Iterable[Sequence[Cell]],
        said: str = "",
    ) -> StudyTable:
        """A table from its head and rows; `said`: its caption."""
        columns = tuple(Column(str(i), text) for i, text in enumerate(head))
        told = tuple({str(i): cell for i, cell in enumerate(row)} for row in rows)
        return cls(name, title, said, columns, told)

    def __repr__(self) -> str:
        return f"<StudyTable {self.name}: {count(len(self.rows), 'row')}>"

    def _repr_html_(self) -> str:
        from nulledit.report import cells  # which knows what a table is

        title = ". ".join(filter(None, (self.title, cells.caption(self))))
        return html_table(title, cells.heads(self), cells.shown(self))


@dataclass(frozen=True)
class FigureSpec(Stored):
    """What a figure shows; its points are tidy rows, kept as CSV."""

    name: str
    """Of its files."""
    caption: str
    """What to see; n is added to it."""
    kind: str
    """`lines` (error bars), `bars` (grouped), `scatter` (clouds) or `intervals` (differences)."""
    x: str
    """What x is, such as `edits`."""
    y: str
    """What y is, such as `efficacy`."""
    series: str = "method"
    """What tells the series apart."""
    panel: str | None = None
    """What tells the panels apart; None for one panel."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Axis labels with units, of `x` and `y`; without, the names above."""
    log: tuple[str, ...] = ()
    """Axes (`x`, `y`) on a logarithmic scale."""
    points: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        _one_of("kind", self.kind, KINDS)
        for axis in (*self.log, *self.labels):
            _one_of("axis", axis, ("x", "y"))

    def label(self, axis: str) -> str:
        """The label of `x` or `y`."""
        return self.labels.get(axis, self.x if axis == "x" else self.y)


@dataclass(frozen=True)
class Example(Stored):
    """What the model says by itself, before and after."""

    arm: str
    """Which of the study's arms, usually a method."""
    prompt: str
    """What it was given."""
    target: str
    """What it should say."""
    before: str | None
    """What the unedited model said; None if it was not asked."""
    after: str | None
    """What the edited model said."""
    holds: bool
    """Whether the edit is seen in `after`."""


@dataclass(frozen=True)
class Study(Stored):
    """A comparison: its question, its numbers, and what they can and cannot say."""

    name: str
    """Short, as on the command line."""
    title: str
    question: str
    """What it asks, one sentence."""
    scale: str
    """`small` (this machine), `paper` (the papers' sizes), or the name of a scale of one's own."""
    settings: Mapping[str, Any]
    """All that was set, plain data."""
    environment: tuple[Mapping[str, Any], ...]
    """Versions, machine and model, one for each time it was run."""
    seconds: Mapping[str, float]
    """`wall` and `cpu`."""
    shows: str
    """What the numbers show."""
    cannot_show: str
    notices: tuple[str, ...] = ()
    """What a reader must know of this run."""
    tables: tuple[StudyTable, ...] = ()
    figures: tuple[FigureSpec, ...] = ()
    examples: tuple[Example, ...] = ()
    """Generated text; a page shows the first five that hold and that fail."""
    nulledit: str = __version__
    """Version that made it."""

    def __post_init__(self) -> None:
        for what in (self.tables, self.figures):
            names = [item.name for item in what]
            if len(set(names)) < len(names):
                raise ValueError(f"{self.name}: a table's or figure's name is used twice: {names}")

    def to_dict(self, *, points: bool = True) -> dict[str, Any]:
        """Plain data; without `points`, as in `study.json`."""
        plain = {"format": FORMAT, **asdict(self)}
        for figure in plain["figures"]:
            if not points:
                del figure["points"]
        return plain


def check_name(name: str) -> None:
    """ValueError if a table or figure can't be called so: names become files and links."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: expected letters, digits, '.', '_' and '-'")


def _one_of(what: str, found: Any, known: Sequence[Any]) -> None:
    if found not in known:
        raise ValueError(f"{what} {found!r}: expected one of {', '.join(map(str, known))}")


class Status(str):
    """A text in a cell that says how something went, or has more to say."""

    tone: str
    """`good`, `weak` or `bad`: what it is coloured by."""
    more: str
    """What a page of HTML says below it."""

    def __new__(cls, text: str, tone: str = "", more: str = "") -> Status:
        """`text` in a tone, with `more` below it."""
        made = super().__new__(cls, text)
        made.tone, made.more = tone, more
        return made


@dataclass(frozen=True)
class Choice:
    """Rows of a listing that are shown together."""

    title: str
    rows: tuple[int, ...] | None = None
    """Which, from 0; None: all."""


@dataclass(frozen=True)
class Listing:
    """A table of any length, of which the reader of a page of HTML chooses what is shown."""

    table: StudyTable
    choices: tuple[tuple[str, tuple[Choice, ...]], ...]
    """What is chosen by, and from what, the first of which holds at the start; a row is shown that
    every choice has."""

    @property
    def items(self) -> tuple[Mapping[str, Cell], ...]:
        """The rows."""
        return self.table.rows

    def only(self, title: str) -> StudyTable:
        """The table with the rows of one choice."""
        found = next(c for _, choices in self.choices for c in choices if c.title == title)
        rows = self.items if found.rows is None else tuple(self.items[i] for i in found.rows)
        return replace(self.table, rows=rows)


@dataclass(frozen=True)
class Heading:
    """What the parts after it are of."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: str = ""
    """`strong`, `question` or `quiet`."""


@dataclass(frozen=True)
class Items:
    """Short texts, or names and what is said of them, below each other."""

    items: tuple[str | tuple[str, str], ...]
    title: str = ""
    tone: str = ""
    """`note` for what must be seen, `limits` for what numbers show and can't."""
    most: int | None = None
    """Shown of them."""
    more: str = ""
    """Where the others are."""

    def shown(self) -> list[tuple[str, str]]:
        """Names (or nothing) and texts, and how many are left out."""
        pairs = [item if isinstance(item, tuple) else ("", item) for item in self.items]
        left = len(pairs) - (self.most or len(pairs))
        if left > 0:
            pairs = [*pairs[: self.most], ("", f"and {left} more{self.more and f', {self.more}'}")]
        return pairs


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str
    language: str = "yaml"


@dataclass(frozen=True)
class Picture:
    """An image in the page's folder."""

    file: str
    text: str


@dataclass(frozen=True)
class Examples:
    """Generated texts before and after."""

    title: str
    items: tuple[Example, ...]


@dataclass(frozen=True)
class Details:
    """Names and values of one or more runs; folded, and only where nothing else holds them."""

    title: str
    items: tuple[Mapping[str, str], ...]


Part = (
    Heading | Text | Items | Code | Picture | Examples | Details | StudyTable | Listing | FigureSpec
)


@dataclass(frozen=True)
class Document:
    """What a terminal, a page of Markdown and one of HTML show alike."""

    title: str
    parts: tuple[Part, ...]
    """In their order; those without content are left out."""

    def __post_init__(self) -> None:
        full = tuple(
            p for p in self.parts if getattr(p, "text", True) and getattr(p, "items", True)
        )
        object.__setattr__(self, "parts", full)
