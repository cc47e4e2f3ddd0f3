"""What users would do instead of editing: facts in the prompt, or fine-tuning on them.

A protocol of its own: nothing here is a method that solves for an update, enters a ledger or can be
undone fact by fact. All are asked the same questions as an edited model.
"""

from nulledit.baselines.in_context import in_context
from nulledit.baselines.local import LocalBaseline, LocalSettings, local_finetune
from nulledit.baselines.lora import LoraBaseline, LoraSettings, lora_finetune
from nulledit.baselines.training import TrainingReport

__all__ = [
    "LocalBaseline",
    "LocalSettings",
    "LoraBaseline",
    "LoraSettings",
    "TrainingReport",
    "in_context",
    "local_finetune",
    "lora_finetune",
]
