"""Whether the JSON of a run's folder, which may come from anywhere, is what pages are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nulledit.reading import is_number

MAX_DEPTH = 20
"""Of nested values; what nulledit writes has six."""

Check = Callable[[Any], bool]


def is_shallow(value: Any) -> bool:
    """Whether lists and objects are nested at most MAX_DEPTH deep."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [v.values() if isinstance(v, Mapping) else v for v in level if _holds(v)]
        level, depth = [value for values in inner for value in values], depth + 1
    return not level


def is_summary(value: Any) -> bool:
    """The content of `summary.json`."""
    base = _with(model=_or_none(_is_text), hash=_is_text, dtype=_is_text)
    return is_shallow(value) and _with(
        version=_is_text,
        state=_is_text,
        base=base,
        facts=_is_whole,
        batches=_is_whole,
        runs=_list_of(_is_run),
    )(value)


def is_line(value: Any) -> bool:
    """One line of `results.jsonl`."""
    return (
        is_shallow(value)
        and _with(
            id=_is_text,
            run=_is_whole,
            column=_is_whole,
            prompt=_is_text,
            target=_is_text,
            before=_or_none(_is_row),
            after=_or_none(_is_row),
            says_target=_or_none(_is_bool),
        )(value)
        and _or_none(_is_diagnosis)(value.get("diagnosis"))
    )


def _is_diagnosis(value: Any) -> bool:
    """Why a fact does not hold; lines from before it was looked for have none."""
    return _with(line=_is_text, causes=_list_of(_with(name=_is_text)))(value)


def is_study(value: Any) -> bool:
    """The content of `study.json`, but for its names, which `Study` itself checks."""
    texts = ("name", "title", "question", "scale", "shows", "cannot_show", "nulledit")
    return is_shallow(value) and _with(
        **dict.fromkeys(texts, _is_text),
        settings=_is_object,
        environment=_list_of(_is_object),
        seconds=_named(is_number),
        notices=_list_of(_is_text),
        tables=_list_of(_is_table),
        figures=_list_of(_is_figure),
        examples=_list_of(_is_example),
    )(value)


def is_environment(value: Any) -> bool:
    """The content of `environment.json`."""
    return is_shallow(value) and _list_of(_is_object)(value)


def _is_run(value: Any) -> bool:
    return (
        _with(
            run=_is_whole,
            time=_is_text,
            facts=_is_whole,
            known=_or_none(_is_whole),
            batches=_list_of(_is_whole),
            before=_or_none(_is_side),
            after=_or_none(_is_side),
            text=_or_none(_is_text),
            layers=_list_of(_is_layer),
            seconds=_named(is_number),
            notices=_list_of(_is_text),
        )(value)
        and _are_others(value)
        and len(value["batches"]) in (0, 2)
        and (value["before"] is None) == (value["after"] is None)
    )


def _are_others(run: Mapping[str, Any]) -> bool:
    """What a run of chat prompts says of the same facts asked otherwise; nothing of plain text."""
    others = run.get("others", {})
    sides = _with(before=_is_side, after=_is_side)
    return _named(sides)(others) and (not others or _is_text(run.get("asked")))


def _is_side(value: Any) -> bool:
    """Summary of an evaluation. No measure is called as the answer of a fact's row is."""
    rates = _named(_or_none(_is_rate))
    text = _with(value=_is_measured, standard_error=_is_measured, tokens=_is_whole)
    shares = dict.fromkeys(("value", "standard_error", "worst_share"), _is_measured)
    kl = _with(**shares, tokens=_is_whole)
    names = ("generation", "fluency", "consistency")
    return (
        _with(rates=rates)(value)
        and "answer" not in value["rates"]
        and all(_or_none(_is_rate)(value.get(name)) for name in names)
        and _or_none(text)(value.get("perplexity"))
        and _or_none(kl)(value.get("kl"))
    )


def _is_rate(value: Any) -> bool:
    known = {"mean": _is_measured, "standard_error": _is_measured, "n": _is_whole}
    return _with(**known)(value) and set(value) == set(known)


def _is_layer(value: Any) -> bool:
    shares = ("update_share", "free_share", "rounding_share")
    rest = ("error", "error_standard_error", "free_share_error")
    return (
        _with(layer=_is_whole, protected=_is_whole, d_in=_is_whole)(value)
        and _with(**dict.fromkeys(shares, _is_measured))(value)
        and all(_is_measured(value.get(name)) for name in rest)
    )


def _is_row(value: Any) -> bool:
    """A fact's measures, and its answer."""
    return isinstance(value, Mapping) and all(
        _or_none(_is_text)(v) if name == "answer" else _is_bool(v) or _is_measured(v)
        for name, v in value.items()
    )


def _is_table(value: Any) -> bool:
    texts = dict.fromkeys(("name", "title", "caption"), _is_text)
    column = _with(key=_is_text, title=_is_text, unit=_is_text, digits=_is_digits)
    rows = _list_of(_named(_is_cell))
    return _with(**texts, columns=_list_of(column), rows=rows)(value)


def _is_cell(value: Any) -> bool:
    measured = _with(mean=_is_measured, standard_error=_is_measured, n=_or_none(_is_whole))
    return _is_text(value) or _is_measured(value) or measured(value)


def _is_figure(value: Any) -> bool:
    texts = dict.fromkeys(("name", "caption", "kind", "x", "y", "series"), _is_text)
    rest = {"panel": _or_none(_is_text), "labels": _named(_is_text), "log": _list_of(_is_text)}
    return _with(**texts, **rest)(value)


def _is_example(value: Any) -> bool:
    texts = dict.fromkeys(("arm", "prompt", "target"), _is_text)
    said = dict.fromkeys(("before", "after"), _or_none(_is_text))
    return _with(**texts, **said, holds=_is_bool)(value)


def _with(**checks: Check) -> Check:
    """An object that has these names, each with a value that passes."""
    return lambda value: (
        isinstance(value, Mapping)
        and all(name in value and check(value[name]) for name, check in checks.items())
    )


def _named(check: Check) -> Check:
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values()))


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_digits(value: Any) -> bool:
    return _is_whole(value) and value <= 20


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _is_measured(value: Any) -> bool:
    """A number; None is one that was not finite."""
    return value is None or is_number(value)
