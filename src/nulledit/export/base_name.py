"""What others call the base of an export: no folder of the machine that wrote it."""

from __future__ import annotations

import re
from pathlib import Path

from nulledit.models.embedded import EMBEDDED
from nulledit.models.gguf import is_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def base_name(name: str) -> str:
    """What the base `name` of a run is loaded by; of a folder or file its last part alone."""
    return name if name in EMBEDDED or hub_id(name) else Path(name).name


def hub_id(name: str) -> str | None:
    """The id on the Hub of the model `name`; None for a folder or an object in memory."""
    if name in EMBEDDED:
        return EMBEDDED[name].hub
    local = Path(name).exists() or is_gguf(name)
    return name if _HUB_ID.fullmatch(name) and not local else None
