"""How results are written: each file whole or not at all, JSON without nan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nulledit.files import replacing


def write(file: Path, content: str | bytes) -> None:
    """Write whole or not at all; what UTF-8 can't hold is escaped."""
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(file) as partial:
        partial.write_bytes(raw)


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text in one document or line; numbers that are not finite are null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value
