"""A model before and after its edits on the same facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nulledit.evaluation.preservation import Preservation
from nulledit.evaluation.runner import Evaluation


@dataclass(frozen=True)
class Comparison:
    """What the base and the edited model made of the same facts, and of the same text."""

    before: Evaluation | None
    """Of the base; None if it was not asked."""
    after: Evaluation
    """Of the edited model."""
    text: str = ""
    """What perplexity and KL are on; empty if on nothing."""
    preservation: tuple[Preservation, ...] = ()
    """What the edits do to keys of that text, by layer."""

    def summary(self) -> dict[str, Any]:
        """`Evaluation.summary` of each side, by its name."""
        sides = ({"before": self.before} if self.before else {}) | {"after": self.after}
        return {name: side.summary() for name, side in sides.items()}
