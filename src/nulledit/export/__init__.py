"""Edits handed to others: a LoRA adapter, a delta on the base, or a whole checkpoint."""

from nulledit.export.apply import apply_delta, put_delta, remove_delta
from nulledit.export.checkpoint import write_checkpoint
from nulledit.export.delta import write_delta
from nulledit.export.lora import write_lora

__all__ = [
    "apply_delta",
    "put_delta",
    "remove_delta",
    "write_checkpoint",
    "write_delta",
    "write_lora",
]
