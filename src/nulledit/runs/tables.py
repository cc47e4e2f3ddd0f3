"""Evaluations and layers as tables, for a terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nulledit.evaluation.measures import OF_FACTS, PREFERENCE, STRICT, find
from nulledit.report.tables import ABSENT, Table, number, number_plus_minus, percent, plus_minus


def rates_table(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """Evaluations by name (`before`, `after`) as columns, one row per measure, n last."""
    rows: list[Sequence[str]] = []
    for name in [*(n for kind in PREFERENCE for n in (kind, f"{kind}_strict")), *_others(sides)]:
        rows.append(_row(name, [side["rates"].get(name) for side in sides.values()]))
    for measure in OF_FACTS:
        found = [side.get(measure.name) for side in sides.values()]
        if any(found) or measure.name == "generation":
            rows.append(_row(measure.name, found))
    texts = [side.get("perplexity") for side in sides.values()]
    said = [ABSENT if not p else plus_minus(p["value"], p["standard_error"], 2) for p in texts]
    tokens = next((f"{p['tokens']} tokens" for p in texts if p), "")
    rows.append([find("perplexity").label, *said, tokens])
    moved = [side.get("kl") for side in sides.values()]
    if any(moved):  # what the others are compared with has none
        rows.append([find("kl").label, *map(_moved, moved), tokens])
        shares = [k and k["worst_share"] for k in moved]
        held = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        rows.append([find("kl_worst").label, *held, tokens])
    return ["", *sides, "n"], rows


def _row(name: str, rates: Sequence[Mapping[str, Any] | None]) -> list[str]:
    measure = find(name)
    shown = [percent(r) if measure.unit == "%" else _value(r, measure.digits) for r in rates]
    return [measure.label, *shown, _count(rates)]


def _value(rate: Mapping[str, Any] | None, digits: int) -> str:
    """A rate that is no share."""
    return plus_minus(rate["mean"], rate["standard_error"], digits) if rate else ABSENT


def preservation_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Per layer: what the edits do to keys of other text, and how large they are."""
    head = ["layer", "‖ΔK₀‖/‖W₀K₀‖", "‖Δ‖/‖W₀‖", "edit keys free", "protected", "room left (%)"]
    rows: list[Sequence[str]] = [
        [
            str(row["layer"]),
            number_plus_minus(row.get("error"), row.get("error_standard_error")),
            number(row["update_share"]),
            number_plus_minus(row["free_share"], row.get("free_share_error")),
            f"{row['protected']} of {row['d_in']}",
            number(None if row.get("room") is None else 100 * row["room"]),
        ]
        for row in layers
    ]
    if any(row["rounding_share"] for row in layers):
        head.append("rounding/‖Δ‖")
        rows = [[*r, number(x["rounding_share"])] for r, x in zip(rows, layers, strict=True)]
    return head, rows


def _moved(kl: Mapping[str, Any] | None) -> str:
    """KL from the base, of any size; the base itself has none."""
    if kl is None:
        return "0"
    value, error = kl["value"], kl["standard_error"]
    return "not finite" if value is None else number_plus_minus(value, error)


def _others(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Preference and strict rates of further kinds of prompts, where there are any."""
    found = {k: None for side in sides.values() for k, rate in side["rates"].items() if rate}
    known = (*PREFERENCE, *STRICT)
    return [key for key in found if key not in known and not key.endswith("_tokens")]


def _count(rates: Sequence[Mapping[str, Any] | None]) -> str:
    return "/".join(dict.fromkeys(str(r["n"]) for r in rates if r and r["n"]))
