"""What an undo, a redo or another change moved, in words."""

from __future__ import annotations

from statistics import median

from nulledit.editing.reports import ChangeReport
from nulledit.editing.session import some
from nulledit.io.text import percent

MOVED = 5  # facts whose movement is shown
SHOWN = 10  # facts named that came or went


def change_lines(report: ChangeReport) -> list[str]:
    """Which facts came and went, which are on nearly their keys, and how the others moved."""
    came_or_went = {
        "out": report.removed,
        "back as it was": report.restored,
        "written anew": report.rebuilt,
    }
    lines = [f"{label}: {some(ids, SHOWN)}" for label, ids in came_or_went.items() if ids]
    if report.near:
        near = ", ".join(f"{i} ({cosine:.3f})" for i, cosine in report.near[:MOVED])
        lines.append(f"on nearly the same key (cosine): {near}")
    moved = [pair for pair in report.moved if pair[1] > 0]
    if moved:
        most = ", ".join(f"{i} ({percent(value)})" for i, value in moved[:MOVED])
        lines.append(
            f"the others moved by {percent(median(v for _, v in moved))} (median of what was "
            f"written at their keys); most: {most}"
        )
    return lines
