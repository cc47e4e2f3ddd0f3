"""The licence of a base model, as far as it is known here."""

from __future__ import annotations

import re
from pathlib import Path

from nulledit.errors import ConfigError
from nulledit.io.untrusted import MAX_SETTINGS, parse_yaml, read_text
from nulledit.models.embedded import EMBEDDED

_FRONT = re.compile(r"---\n(.*?)\n---\n", re.S)
_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}")


def licence_of(base: str) -> str | None:
    """The Hub's name of the licence of the model `base`; None where it is not known.

    Of an embedded model it is written down here; a folder's is in the front matter of its card.
    """
    if base in EMBEDDED:
        return EMBEDDED[base].licence
    card = Path(base) / "README.md"
    if not base or not card.is_file():
        return None
    try:
        text = read_text(card, most=MAX_SETTINGS, error=ConfigError)
        front = _FRONT.match(text)
        found = parse_yaml(front[1], source=card.name, error=ConfigError) if front else None
    except ConfigError:  # a card that can't be read names none
        return None
    named = found.get("license") if isinstance(found, dict) else None
    return named if isinstance(named, str) and _NAME.fullmatch(named) else None
