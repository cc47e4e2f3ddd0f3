"""Whether the JSON of a run's folder, which may come from anywhere, is what pages are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nulledit.evaluation.measures import OF_FACTS
from nulledit.io.shapes import (
    has,
    is_bool,
    is_measured,
    is_object,
    is_shallow,
    is_text,
    is_whole,
    list_of,
    named,
    or_none,
)
from nulledit.io.untrusted import is_number


def is_summary(value: Any) -> bool:
    """The content of `summary.json`."""
    base = has(model=or_none(is_text), hash=is_text, dtype=is_text)
    return is_shallow(value) and has(
        version=is_text,
        state=is_text,
        base=base,
        facts=is_whole,
        batches=is_whole,
        runs=list_of(_is_run),
    )(value)


def is_line(value: Any) -> bool:
    """One line of `results.jsonl`."""
    return (
        is_shallow(value)
        and has(
            id=is_text,
            run=is_whole,
            column=is_whole,
            prompt=is_text,
            target=is_text,
            before=or_none(_is_row),
            after=or_none(_is_row),
            says_target=or_none(is_bool),
        )(value)
        and or_none(_is_diagnosis)(value.get("diagnosis"))
    )


def _is_diagnosis(value: Any) -> bool:
    """Why a fact does not hold; lines from before it was looked for have none."""
    return has(line=is_text, causes=list_of(has(name=is_text)))(value)


def is_environment(value: Any) -> bool:
    """The content of `environment.json`."""
    return is_shallow(value) and list_of(is_object)(value)


def _is_run(value: Any) -> bool:
    return (
        has(
            run=is_whole,
            time=is_text,
            facts=is_whole,
            known=or_none(is_whole),
            batches=list_of(is_whole),
            before=or_none(_is_side),
            after=or_none(_is_side),
            text=or_none(is_text),
            layers=list_of(_is_layer),
            seconds=named(is_number),
            notices=list_of(is_text),
        )(value)
        and _are_others(value)
        and len(value["batches"]) in (0, 2)
        and (value["before"] is None) == (value["after"] is None)
    )


def _are_others(run: Mapping[str, Any]) -> bool:
    """What a run of chat prompts says of the same facts asked otherwise; nothing of plain text."""
    others = run.get("others", {})
    sides = has(before=_is_side, after=_is_side)
    return named(sides)(others) and (not others or is_text(run.get("asked")))


def _is_side(value: Any) -> bool:
    """Summary of an evaluation. No measure is called as the answer of a fact's row is."""
    rates = named(or_none(_is_rate))
    text = has(value=is_measured, standard_error=is_measured, tokens=is_whole)
    shares = dict.fromkeys(("value", "standard_error", "worst_share"), is_measured)
    kl = has(**shares, tokens=is_whole)
    names = [measure.name for measure in OF_FACTS]
    return (
        has(rates=rates)(value)
        and "answer" not in value["rates"]
        and all(or_none(_is_rate)(value.get(name)) for name in names)
        and or_none(text)(value.get("perplexity"))
        and or_none(kl)(value.get("kl"))
    )


def _is_rate(value: Any) -> bool:
    known = {"mean": is_measured, "standard_error": is_measured, "n": is_whole}
    return has(**known)(value) and set(value) == set(known)


def _is_layer(value: Any) -> bool:
    shares = ("update_share", "free_share", "rounding_share")
    rest = ("error", "error_standard_error", "free_share_error")
    return (
        has(layer=is_whole, protected=is_whole, d_in=is_whole)(value)
        and has(**dict.fromkeys(shares, is_measured))(value)
        and all(is_measured(value.get(name)) for name in rest)
    )


def _is_row(value: Any) -> bool:
    """A fact's measures, and its answer."""
    return isinstance(value, Mapping) and all(
        or_none(is_text)(v) if name == "answer" else is_bool(v) or is_measured(v)
        for name, v in value.items()
    )
