"""How results are written: each file whole or not at all, JSON and CSV without nan."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nulledit.io.files import replacing


def write(file: Path, content: str | bytes) -> None:
    """Write whole or not at all; what UTF-8 can't hold is escaped."""
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(file) as partial:
        partial.write_bytes(raw)


# What JSON itself leaves as it is and a terminal may obey: C1 codes, directions, invisible tags.
_STEERING = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text in one document or line; numbers that are not finite are null.

    It can be shown on a terminal: characters that would steer it are escaped, as JSON allows.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _STEERING.sub(lambda found: json.dumps(found.group())[1:-1], text) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]], head: Sequence[str] = ()) -> str:
    """A line for each row below `head` (left out: the first row's keys); empty for nan and None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(head or rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: v for k, v in _finite(row).items() if v is not None} for row in rows])
    return text.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value
