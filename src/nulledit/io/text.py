"""Text from facts and models, made fit to show in a terminal or in Markdown."""

from __future__ import annotations

import re
import unicodedata

MARKS = 4  # characters in a column, at most
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
# Joiners that Indic scripts, Persian and emoji need; other format characters can reorder a line.
_HARMLESS = "\u200c\u200d"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~&!$]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
# Absolute, and more than a word after a slash: /no_think is no path. One alone may have spaces.
_WHOLE_PATH = re.compile(r"(?:~|[A-Za-z]:)?(?:[\\/][^\\/\n]+){2,}[\\/]?")
_PATH = re.compile(
    r"(?<![\w.:/\\<>-])(?:~|[A-Za-z]:)?(?:[\\/][^\s\\/'\"`,;:()]+)+[\\/]([^\s\\/'\"`,;:()]+)[\\/]?"
)
# What begins a list, a heading or a rule.
_MARK = re.compile(r"([-+=](?=[-+=\s]|$)|\d{1,9}[.)](?=\s|$))")


def plain(text: object) -> str:
    """`text` on one line; control and direction characters are written out (`\\x1b`, `\\u202e`)."""
    said = str(text)
    return said if said.isprintable() else "".join(map(_visible, said))


def markdown(text: object) -> str:
    """`plain` text in which nothing has a meaning in Markdown: paragraphs, cells and list items.

    Nor in GitHub's, where addresses become links and dollars formulas.
    """
    shown = _MARKDOWN.sub(r"\\\1", plain(text).lstrip())
    mark = _MARK.match(shown)
    return shown if mark is None else f"{shown[: mark.end(1) - 1]}\\{shown[mark.end(1) - 1 :]}"


def without_folders(text: str) -> str:
    """`text` in which absolute paths are their last parts: a page says nothing of whose it was."""
    if _WHOLE_PATH.fullmatch(text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _PATH.sub(r"\1", text)


def count(n: int, noun: str) -> str:
    """`1 batch`, `2 batches`."""
    return f"{n} {noun}" + ("" if n == 1 else "es" if noun.endswith(("ch", "s")) else "s")


def percent(share: float) -> str:
    """A share in %, in two digits, or whole where it has three or more before the point."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 99.5 else f"{value:.2g} %"


def width(text: str) -> int:
    """Columns that `text` takes in a terminal: two for wide characters, none for combining ones."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def shorten(text: str, most: int) -> str:
    """`text` cut to `most` columns, with an ellipsis where something is left out.

    A column has room for a few marks that take none: combining ones pile up without an end.
    """
    if len(text) <= MARKS * most and width(text) <= most:
        return text
    kept, taken = "", 0
    for c in text:
        taken += _columns(c)
        if taken > most - 1 or len(kept) >= MARKS * most:
            break
        kept += c
    return kept.rstrip() + "…"


def _visible(c: str) -> str:
    if c in _NAMED:
        return _NAMED[c]
    kind = unicodedata.category(c)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and c not in _HARMLESS):
        point = ord(c)
        if point > 0xFFFF:
            return f"\\U{point:08x}"
        return f"\\x{point:02x}" if point < 256 else f"\\u{point:04x}"
    return c


def _columns(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1
