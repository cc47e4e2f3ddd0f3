"""Edits handed to others: a LoRA adapter, a delta on the base, or a whole checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulledit._lazy import lazily

if TYPE_CHECKING:
    from nulledit.export.apply import apply_delta, put_delta, remove_delta
    from nulledit.export.checkpoint import write_checkpoint
    from nulledit.export.delta import write_delta
    from nulledit.export.lora import write_lora

_HOME = {
    "apply_delta": "nulledit.export.apply",
    "put_delta": "nulledit.export.apply",
    "remove_delta": "nulledit.export.apply",
    "write_checkpoint": "nulledit.export.checkpoint",
    "write_delta": "nulledit.export.delta",
    "write_lora": "nulledit.export.lora",
}
__all__ = [
    "apply_delta",
    "put_delta",
    "remove_delta",
    "write_checkpoint",
    "write_delta",
    "write_lora",
]
__getattr__, __dir__ = lazily(__name__, _HOME)
