"""Settings for facts that did not take hold the time before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nulledit.config import ValueSettings

MORE_ROOM = 4 / 3  # of the clamp, each time
MORE_MARGIN = 1.0  # nats, each time: the solve writes only a part of a value


def stronger(settings: ValueSettings, times: int = 1) -> ValueSettings:
    """`settings` made stronger `times` times: twice the steps, more room, a wider margin, a round.

    What was optimised to be just likelier than its rival may fall behind it once written, and what
    ran out of steps or met the clamp needs more of them. A norm anchor allows one round only.
    """
    for _ in range(times):
        settings = replace(
            settings,
            steps=2 * settings.steps,
            clamp=MORE_ROOM * settings.clamp,
            stop_loss=settings.stop_loss / 2,
            stop_margin=(settings.stop_margin or 0.0) + MORE_MARGIN,
            patience=2 * settings.patience,
            rounds=settings.rounds + (not settings.norm_anchor),
        )
    return settings


def differences(old: ValueSettings, new: ValueSettings) -> dict[str, Any]:
    """Fields of `new` that differ from `old`, by the names that a recipe has for them."""
    return {
        f"values.{name}": value for name, value in vars(new).items() if value != vars(old)[name]
    }
