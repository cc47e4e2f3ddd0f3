"""Tokens and the characters that each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]
"""Indices of a first character and of the one after the last."""


@dataclass(frozen=True)
class Pieces:
    """Tokens of a text, and which of its characters they hold."""

    ids: list[int]
    """Of the tokens."""
    spans: list[Span]
    """The characters of each."""
    unknown: set[int]
    """Indices of those that only say that there is no piece for these characters."""

    def last_of(self, place: Span) -> int:
        """The last token of the last character at `place` that is in any; -1 if none is.

        Tokenizers that compose accents give a composed character the place of its first part.
        """
        for character in range(place[1] - 1, place[0] - 1, -1):
            covering = [i for i, (a, b) in enumerate(self.spans) if a <= character < b]
            if covering:
                return covering[-1]
        return -1

    def first_after(self, end: int) -> int:
        """The first token that reaches past `end`; -1 if none does."""
        return next((i for i, (a, b) in enumerate(self.spans) if b > end and a < b), -1)

    def after(self, count: int) -> Pieces:
        """Without the first `count` tokens."""
        unknown = {i - count for i in self.unknown if i >= count}
        return Pieces(self.ids[count:], self.spans[count:], unknown)


def overlaps(a: Span, b: Span) -> bool:
    """Whether two spans have a character in common."""
    return a[0] < b[1] and b[0] < a[1]


def untrimmed(text: str, spans: Sequence[Span], added: Sequence[int]) -> list[Span]:
    """`spans` with the spaces that some tokenizers leave out of them (`trim_offsets`) back in.

    A space belongs to the token it begins, or is: without its place, a lone space in front of a
    target would count as the prompt's.
    """
    found, end = [], 0
    for (a, b), special in zip(spans, added, strict=True):
        if not special:
            if text[end:a].isspace():
                a = end
            end = max(end, b)
        found.append((a, b))
    return found
