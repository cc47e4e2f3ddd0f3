"""HTML from parts; text in it is escaped, so that nothing a model said can be markup."""

from __future__ import annotations

import html

from nulledit.io.text import plain


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *parts: str | None, **attributes: str | None) -> Markup:
    """`<name ...>parts</name>`. Attributes and every part but Markup are escaped, None left out.

    Control and direction characters are written out. `class_` and `for_` stand for the words that
    Python keeps to itself; underscores become hyphens.
    """
    head = name
    for key, value in attributes.items():
        if value is not None:
            head += f' {key.strip("_").replace("_", "-")}="{escape(value)}"'
    if name in ("meta", "img", "br", "source"):
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{join(*parts)}</{name}>")


def join(*parts: str | None) -> Markup:
    """Parts after each other, escaped unless they are Markup."""
    return Markup("".join(p if isinstance(p, Markup) else escape(p) for p in parts if p))


def escape(text: str) -> str:
    """`text` as it can stand between tags and in quoted attributes."""
    return html.escape(plain(text))
