"""Text from facts and models, made fit to show in a terminal or in Markdown."""

from __future__ import annotations

import re
import unicodedata

_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
# Joiners that Indic scripts, Persian and emoji need; other format characters can reorder a line.
_HARMLESS = "\u200c\u200d"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~&!])")


def plain(text: object) -> str:
    """`text` on one line; control and direction characters are written out (`\\x1b`, `\\u202e`)."""
    return "".join(_visible(c) for c in str(text))


def markdown(text: object) -> str:
    """`plain` text in which nothing has a meaning in Markdown, for cells and list items."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def count(n: int, noun: str) -> str:
    """`1 batch`, `2 batches`."""
    return f"{n} {noun}" + ("" if n == 1 else "es" if noun.endswith(("ch", "s")) else "s")


def width(text: str) -> int:
    """Columns that `text` takes in a terminal: two for wide characters, none for combining ones."""
    return sum(_columns(c) for c in text)


def shorten(text: str, most: int) -> str:
    """`text` cut to `most` columns, with an ellipsis where something is left out."""
    if width(text) <= most:
        return text
    kept, taken = "", 0
    for c in text:
        taken += _columns(c)
        if taken > most - 1:
            break
        kept += c
    return kept.rstrip() + "…"


def _visible(c: str) -> str:
    if c in _NAMED:
        return _NAMED[c]
    kind = unicodedata.category(c)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and c not in _HARMLESS):
        point = ord(c)
        return f"\\x{point:02x}" if point < 256 else f"\\u{point:04x}"
    return c


def _columns(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1
