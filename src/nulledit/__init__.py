"""Knowledge editing of Hugging Face causal language models, in the null space of what must stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulledit._lazy import lazily
from nulledit._version import __version__

if TYPE_CHECKING:
    from nulledit.api.editor import Editor
    from nulledit.api.run import Run
    from nulledit.config import Recipe, load_recipe
    from nulledit.data.facts import Fact, Probe
    from nulledit.data.readers import read_facts
    from nulledit.editing.reports import ChangeReport, EditReport
    from nulledit.errors import NullEditError
    from nulledit.evaluation.runner import Evaluation, evaluate
    from nulledit.models.editable_model import EditableModel
    from nulledit.models.load import load_model
    from nulledit.runs.limits import load_limits
    from nulledit.statistics.spectra import Statistics

_HOME = {
    "ChangeReport": "nulledit.editing.reports",
    "EditReport": "nulledit.editing.reports",
    "EditableModel": "nulledit.models.editable_model",
    "Editor": "nulledit.api.editor",
    "Evaluation": "nulledit.evaluation.runner",
    "Fact": "nulledit.data.facts",
    "NullEditError": "nulledit.errors",
    "Probe": "nulledit.data.facts",
    "Recipe": "nulledit.config",
    "Run": "nulledit.api.run",
    "Statistics": "nulledit.statistics.spectra",
    "evaluate": "nulledit.evaluation.runner",
    "load_limits": "nulledit.runs.limits",
    "load_model": "nulledit.models.load",
    "load_recipe": "nulledit.config",
    "read_facts": "nulledit.data.readers",
}
__all__ = [
    "ChangeReport",
    "EditReport",
    "EditableModel",
    "Editor",
    "Evaluation",
    "Fact",
    "NullEditError",
    "Probe",
    "Recipe",
    "Run",
    "Statistics",
    "__version__",
    "evaluate",
    "load_limits",
    "load_model",
    "load_recipe",
    "read_facts",
]
__getattr__, __dir__ = lazily(__name__, _HOME)  # so `nulledit --help` stays without torch
