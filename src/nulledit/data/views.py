"""Other projects' records, read by name: what is there, what is empty, and what nobody read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nulledit.data.facts import clean_text, quote
from nulledit.errors import FactError

Names = tuple[str, ...]
"""Names under which a field may stand; the first that has something counts."""

PROMPTS: Names = ("prompt", "question", "loc", "New Question")
ANSWERS: Names = ("ground_truth", "answer", "answers", "target", "loc_ans", "New Answer")
IDS: Names = ("case_id", "id", "known_id")
MOST_NAMED = 20  # fields in one notice
MOST_DEPTH = 3  # of lists in lists


@dataclass(frozen=True)
class Row:
    """A record and where it stood."""

    number: int
    """Place among the file's records, from 0."""
    record: Any
    """What was found there, unchecked."""
    line: int | None = None
    """Line of the file it ends on, from 1, where the container tells."""
    problem: str = ""
    """Why nothing could be read there."""

    @property
    def id(self) -> str:
        """What the record calls itself, if it does."""
        if not isinstance(self.record, Mapping):
            return ""
        given = (self.record.get(name) for name in IDS)
        return next((str(x) for x in given if isinstance(x, str | int) and x != ""), "")


@dataclass
class Coverage:
    """Fields that the records of a file hold, those that were read, and what was left out."""

    found: Counter[str] = field(default_factory=Counter)
    """Field -> records (or parts of them) that have something there."""
    read: set[str] = field(default_factory=set)
    """Fields that were looked at."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> how often something was left out or changed for it."""

    def notices(self) -> Iterator[str]:
        """One line for all fields that nobody read, and one for each reason."""
        left = sorted((-n, name) for name, n in self.found.items() if name not in self.read)
        if unread := [f"{quote(name)[1:-1]} ({-n})" for n, name in left]:
            more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
            named = ", ".join(unread[:MOST_NAMED])
            yield f"fields not read (records that have them): {named}{more}"
        for reason, n in self.left_out.items():
            yield f"{n} {reason}"


class View:
    """A mapping of a record; it remembers in a file's coverage which of its fields were read."""

    def __init__(self, value: object, coverage: Coverage, *, where: str = "", kind: str = ""):
        """`where`: its place in the record, for messages; `kind`: the same without numbers."""
        if not isinstance(value, Mapping):
            raise FactError(
                f"{where} must be a mapping (found {type(value).__name__} {quote(value)})"
            )
        self.value, self.coverage, self.where, self.kind = value, coverage, where, kind
        coverage.found.update(self._kind(str(k)) for k, v in value.items() if not blank(v))

    def get(self, *names: str) -> tuple[str, Any]:
        """Place and value of the first of `names` that has something; None if none has."""
        for name in names:
            self.coverage.read.add(self._kind(name))
            if not blank(value := self.value.get(name)):
                return self.place(name), value
        return self.place(names[0]) if names else "", None

    def need(self, names: Names) -> tuple[str, Any]:
        """As `get`; FactError that says what is there instead if none of `names` is."""
        place, value = self.get(*names)
        if value is not None:
            return place, value
        given = next((name for name in names if name in self.value), None)
        if given is not None:
            raise FactError(f"{self.place(given)} is empty: expected text")
        raise FactError(f"{place} is missing (found {quote(list(self.value))})")

    def text(self, names: Names) -> str:
        """The text that must be there."""
        place, value = self.need(names)
        return clean_text(value, place)

    def answers(self, names: Names) -> list[str]:
        """All answers at the first of `names`; of lists in lists the texts."""
        place, value = self.get(*names)
        return flat(value, place)

    def all_texts(self, names: Names) -> list[str]:
        """The texts at all of `names`, each once."""
        found = (flat(value, place) for place, value in map(self.get, names))
        return list(dict.fromkeys(text for texts in found for text in texts))

    def inside(self, name: str) -> list[View]:
        """The mapping at `name`, or the mappings of a list there."""
        place, value = self.need((name,))
        kind = self._kind(name)
        if not isinstance(value, list | tuple):
            return [View(value, self.coverage, where=place, kind=kind)]
        return [
            View(item, self.coverage, where=f"{place}[{i}]", kind=kind)
            for i, item in enumerate(value)
        ]

    def blocks(self, name: str) -> Iterator[tuple[str, View]]:
        """The questions at `name`: one, a list of them, or either under names of blocks.

        Each with its block's name, empty for none.
        """
        place, value = self.get(name)
        if value is None:
            return
        parts = [("", place, value)]
        if isinstance(value, Mapping) and not any(key in PROMPTS for key in value):
            parts = [(str(k), f"{place}[{quote(k)}]", block) for k, block in value.items()]
        for block, where, part in parts:
            several = isinstance(part, list | tuple)
            for i, item in enumerate(part if several else [part]):
                if not blank(item):
                    at = f"{where}[{i}]" if several else where
                    yield block, View(item, self.coverage, where=at, kind=self._kind(name))

    def place(self, name: str) -> str:
        """A field's place in the record, for messages."""
        return f"{self.where}.{name}" if self.where else name

    def _kind(self, name: str) -> str:
        return f"{self.kind}.{name}" if self.kind else name


def blank(value: object, depth: int = 0) -> bool:
    """Whether a field says nothing: null, an empty text or list, pandas' NaN, or only such."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | tuple):
        return depth < MOST_DEPTH and all(blank(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return depth < MOST_DEPTH and all(blank(item, depth + 1) for item in value.values())
    return False


def flat(value: object, place: str) -> list[str]:
    """The texts of a text, a list of them, lists in a list, or an answer and its aliases."""
    return list(dict.fromkeys(_flat(value, place, depth=0)))


def _flat(value: object, place: str, *, depth: int) -> Iterator[str]:
    if blank(value):
        return
    if isinstance(value, list | tuple) and depth < MOST_DEPTH:
        for i, item in enumerate(value):
            yield from _flat(item, f"{place}[{i}]", depth=depth + 1)
    elif isinstance(value, Mapping) and set(value) & {"str", "value"}:
        for name in ("str", "value", "aliases"):
            yield from _flat(value.get(name), f"{place}.{name}", depth=depth + 1)
    else:
        yield clean_text(value, place)
