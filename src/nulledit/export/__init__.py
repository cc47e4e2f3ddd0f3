"""Edits handed to others: a LoRA adapter, a delta on the base, a whole checkpoint, or GGUF."""

from nulledit._lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__, __file__)
