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
    from nulledit.editing.weights import LayerReport
    from nulledit.errors import NullEditError
    from nulledit.evaluation.asking import Answer
    from nulledit.evaluation.comparison import Comparison
    from nulledit.evaluation.runner import Evaluation, evaluate
    from nulledit.export.updates import Export
    from nulledit.ledger.records import Column
    from nulledit.models.editable_model import EditableModel
    from nulledit.models.load import load_model
    from nulledit.runs.diff import Difference
    from nulledit.runs.gate import GateReport
    from nulledit.runs.limits import Limits, load_limits
    from nulledit.runs.preview import Preview
    from nulledit.runs.verify import Verification
    from nulledit.statistics.spectra import Statistics

_HOME = {
    "Answer": "nulledit.evaluation.asking",
    "ChangeReport": "nulledit.editing.reports",
    "Column": "nulledit.ledger.records",
    "Comparison": "nulledit.evaluation.comparison",
    "Difference": "nulledit.runs.diff",
    "EditReport": "nulledit.editing.reports",
    "EditableModel": "nulledit.models.editable_model",
    "Editor": "nulledit.api.editor",
    "Evaluation": "nulledit.evaluation.runner",
    "Export": "nulledit.export.updates",
    "Fact": "nulledit.data.facts",
    "GateReport": "nulledit.runs.gate",
    "LayerReport": "nulledit.editing.weights",
    "Limits": "nulledit.runs.limits",
    "NullEditError": "nulledit.errors",
    "Preview": "nulledit.runs.preview",
    "Probe": "nulledit.data.facts",
    "Recipe": "nulledit.config",
    "Run": "nulledit.api.run",
    "Statistics": "nulledit.statistics.spectra",
    "Verification": "nulledit.runs.verify",
    "evaluate": "nulledit.evaluation.runner",
    "load_limits": "nulledit.runs.limits",
    "load_model": "nulledit.models.load",
    "load_recipe": "nulledit.config",
    "read_facts": "nulledit.data.readers",
}
__all__ = [
    "Answer",
    "ChangeReport",
    "Column",
    "Comparison",
    "Difference",
    "EditReport",
    "EditableModel",
    "Editor",
    "Evaluation",
    "Export",
    "Fact",
    "GateReport",
    "LayerReport",
    "Limits",
    "NullEditError",
    "Preview",
    "Probe",
    "Recipe",
    "Run",
    "Statistics",
    "Verification",
    "__version__",
    "evaluate",
    "load_limits",
    "load_model",
    "load_recipe",
    "read_facts",
]
__getattr__, __dir__ = lazily(__name__, _HOME)  # so `nulledit --help` stays without torch
