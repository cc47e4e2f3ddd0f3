"""How many facts of a run hold, what each mark means, and why the others don't hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nulledit.io.text import count

MARKS = {
    "ok": ("good", "says the target by itself"),
    "loops": ("weak", "says the target, then repeats itself"),
    "by argmax": (
        "weak",
        "each token of the target is the likeliest, but its own words read otherwise",
    ),
    "plain only": ("weak", "holds as plain text and not in chat, where it is to hold as well"),
    "prefers": ("weak", "the target is only likelier than the old answer"),
    "missed": ("bad", "none of these"),
    "forgotten": ("good", "no longer says the answer to forget"),
    "leaks": ("bad", "still says the answer to forget"),
}
"""What the last column of an answers table says of a fact -> its tone, and in words."""


def mark(line: Mapping[str, Any]) -> str:
    """One of `MARKS` for a line of `results.jsonl`, or `not evaluated`."""
    after = line["after"]
    if after is None:
        return "not evaluated"
    to_forget = after.get("forgotten_strict") is not None
    if held(line):
        return "forgotten" if to_forget else "ok"
    if to_forget:
        return "leaks"
    if after.get("in_chat") is False and held({**line, "after": {**after, "in_chat": None}}):
        return "plain only"
    if "loops" in _causes(line):
        return "loops"
    if after.get("efficacy_strict"):
        return "by argmax"
    return "prefers" if after.get("efficacy") else "missed"


def tone(line: Mapping[str, Any]) -> str:
    """`good`, `weak` or `bad`; empty for a line that was not evaluated."""
    return MARKS.get(mark(line), ("", ""))[0]


def held(line: Mapping[str, Any]) -> bool:
    """Whether the fact of an evaluated line holds, by the rule that `retry` goes by."""
    from nulledit.evaluation.runner import holds  # with torch

    return holds(after_row(line))


def after_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """A fact's measures after the edit; older lines keep the judge's word apart."""
    return {"generation": line.get("says_target"), **line["after"]}


def headline(lines: Sequence[Mapping[str, Any]]) -> str:
    """ "18 of 20 facts hold." of the lines that were evaluated; empty if none was."""
    told = [line for line in lines if line["after"] is not None]
    good = sum(map(held, told))
    verb = "holds" if len(told) == 1 else "hold"
    return f"{good} of {count(len(told), 'fact')} {verb}." if told else ""


def neighbours_changed(lines: Sequence[Mapping[str, Any]]) -> int | None:
    """Facts of which a neighbour holds now and did not, or the other way; None if none has any."""
    asked = [moved for line in lines if (moved := neighbour_moved(line)) is not None]
    return sum(asked) if asked else None


def neighbour_moved(line: Mapping[str, Any]) -> bool | None:
    """Whether a neighbour of the fact holds now and did not, or the other way; None without any."""
    then, now = ((line[side] or {}).get("specificity_strict") for side in ("before", "after"))
    if then is None or now is None:
        return None
    named = line.get("neighbours") or {}  # lines of before they were named lack them
    return then != now or any(named.values())


def legend(lines: Sequence[Mapping[str, Any]]) -> str:
    """The marks that `lines` have, in words."""
    shown = {mark(line) for line in lines}
    return "; ".join(f"{name}: {text}" for name, (_, text) in MARKS.items() if name in shown)


def reasons(lines: Sequence[Mapping[str, Any]], run: str = "RUN") -> list[tuple[str, str]]:
    """Id, and in one line why the fact does not hold and what helps in the folder `run`."""
    return [
        (
            line["id"],
            line["diagnosis"]["line"].replace("nulledit retry RUN", f"nulledit retry {run}"),
        )
        for line in lines
        if line.get("diagnosis")
    ]


def _causes(line: Mapping[str, Any]) -> set[str]:
    return {cause["name"] for cause in (line.get("diagnosis") or {}).get("causes", ())}
