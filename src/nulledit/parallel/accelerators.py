"""Which accelerators this machine has."""

from __future__ import annotations

import torch


def accelerators() -> tuple[str, int] | None:
    """Their kind ("cuda", "mps", ...) and their number; None where there is none."""
    kind = getattr(torch, "accelerator", None)  # from torch 2.6
    if kind is None:
        return ("cuda", torch.cuda.device_count()) if torch.cuda.is_available() else None
    if not kind.is_available():
        return None
    return kind.current_accelerator().type, kind.device_count()


def default_device() -> str:
    """Where a model works if nobody says: an accelerator if there is one, else the processor."""
    found = accelerators()
    return "cpu" if found is None else found[0]
