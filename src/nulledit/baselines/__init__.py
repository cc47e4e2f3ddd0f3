"""What users would do instead of editing: facts in the prompt, or a LoRA trained on them.

A protocol of its own: nothing here is a method that solves for an update, enters a ledger or can be
undone fact by fact. Both are asked the same questions as an edited model.
"""

from nulledit.baselines.in_context import in_context
from nulledit.baselines.lora import LoraBaseline, LoraReport, LoraSettings, lora_finetune

__all__ = ["LoraBaseline", "LoraReport", "LoraSettings", "in_context", "lora_finetune"]
