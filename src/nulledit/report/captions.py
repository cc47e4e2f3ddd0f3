"""Sentences and captions: what was run, n, time, which examples are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from nulledit.io.text import count, without_folders
from nulledit.report.document import Example, Examples, FigureSpec, Study

EXAMPLES = 5
"""Of each kind that a page shows."""


def sentence(study: Study) -> str:
    """What was run, in one sentence."""
    about = {key: value for run in study.environment for key, value in run.items()}
    words = ["A study at the papers' scale" if study.scale == "paper" else "A small-scale study"]
    if about.get("model"):
        words.append(f"on {without_folders(about['model'])}")
    if about.get("device"):
        words.append(f"on {about['device']}")
    words.append(f"by nulledit {study.nulledit}")
    spent = [
        f"{duration(study.seconds[key])} {what}"
        for key, what in (("wall", "of wall time"), ("cpu", "of CPU time"))
        if study.seconds.get(key) is not None
    ]
    return " ".join(words) + (": " + " and ".join(spent) if spent else "") + "."


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `11 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def figure_caption(spec: FigureSpec) -> str:
    """The caption with n: `n = 200`, or its range."""
    found = sorted({point.n for point in spec.points if point.n is not None})
    said = spec.caption.rstrip()
    said += "" if not said or said[-1] in ".!?。" else "."
    if found:
        said += f" n = {found[0]}" + (f" to {found[-1]}" if len(found) > 1 else "") + "."
    return said.strip()


def chosen_examples(examples: Sequence[Example], most: int = EXAMPLES) -> list[Examples]:
    """The first few examples that hold and that fail, in turn from each arm, with a title."""
    chosen = []
    for title, holds in (("hold", True), ("fail", False)):
        mine = [e for e in examples if e.holds is holds]
        if not mine:
            continue
        few = f"{most} of {len(mine)} edits" if len(mine) > most else count(len(mine), "edit")
        told = f"{few} that {title}{'s' if few == '1 edit' else ''}"
        chosen.append(Examples(told, tuple(_in_turn(mine)[:most])))
    return chosen


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text, files by their names."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            found[name] = ", ".join(map(_plain, value)) if value else "none"
        else:
            found[name] = _plain(value)
    return found


def _plain(value: object) -> str:
    if value is None:
        return "none"
    known = {"True": "yes", "False": "no", "{}": "none"}
    return known.get(str(value)) or without_folders(str(value))


def _in_turn(examples: Iterable[Example]) -> list[Example]:
    arms: dict[str, list[Example]] = {}
    for example in examples:
        arms.setdefault(example.arm, []).append(example)
    return [e for e in chain.from_iterable(zip_longest(*arms.values())) if e is not None]
