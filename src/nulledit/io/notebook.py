"""How results show where they are looked at: a table of a notebook, or a pandas frame."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nulledit.errors import ConfigError
from nulledit.io.text import plain, shorten

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 50
MOST_COLUMNS = 80
"""Columns of a terminal that a cell may take."""


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in HTML with its title; texts are made plain and escaped, long tables cut."""

    def line(cells: Sequence[object], tag: str) -> str:
        shown = (html.escape(shorten(plain(cell), MOST_COLUMNS)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

    body = "".join(line(row, "td") for row in rows[:MOST_ROWS])
    left = len(rows) - MOST_ROWS
    more = f"<p>and {left} more</p>" if left > 0 else ""
    return (
        f"<p>{html.escape(plain(title))}</p>"
        f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>{more}"
    )


def frame(rows: Mapping[str, Mapping[str, Any]], index: str) -> pd.DataFrame:
    """A pandas frame of `rows` by name; `index` is what the names are of.

    ConfigError where pandas is missing.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError(
            f"to_frame needs pandas: pip install 'nulledit[pandas]' ({error})"
        ) from error
    found = pd.DataFrame(list(rows.values()), index=list(rows))
    found.index.name = index
    return found
