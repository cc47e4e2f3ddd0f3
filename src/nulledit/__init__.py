"""Knowledge editing of Hugging Face causal language models, in the null space of what must stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulledit._lazy import lazily
from nulledit._version import __version__

if TYPE_CHECKING:
    from nulledit.config import Recipe, load_recipe
    from nulledit.data.facts import Fact, Probe
    from nulledit.data.readers import read_facts
    from nulledit.editing.editor import Editor
    from nulledit.errors import NullEditError

_HOME = {
    "Editor": "nulledit.editing.editor",
    "Fact": "nulledit.data.facts",
    "NullEditError": "nulledit.errors",
    "Probe": "nulledit.data.facts",
    "Recipe": "nulledit.config",
    "load_recipe": "nulledit.config",
    "read_facts": "nulledit.data.readers",
}
__all__ = [
    "Editor",
    "Fact",
    "NullEditError",
    "Probe",
    "Recipe",
    "__version__",
    "load_recipe",
    "read_facts",
]


__getattr__, __dir__ = lazily(__name__, _HOME)  # so `nulledit --help` stays without torch
