"""Results as tables, for a terminal and for Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nulledit.io.text import markdown, plain, shorten, width

ABSENT = "absent"
METRICS = ("efficacy", "generalization", "specificity")
Table = tuple[Sequence[str], list[Sequence[str]]]
"""Column heads and rows."""


def as_text(table: Table, *, left: int = 1, most: int = 60) -> str:
    """Aligned columns for a terminal; the first `left` stand left, the others right.

    Cells are made plain and cut to `most` columns; wide (East Asian) characters count as two.
    """
    head, rows = table
    cells = [[shorten(plain(c), most) for c in row] for row in (head, *rows)]
    widths = [max(width(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        padded = [
            c + " " * (w - width(c)) if i < left else " " * (w - width(c)) + c
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(lines)


def as_markdown(table: Table, *, left: int | Collection[int] = 1) -> str:
    """The same table in Markdown; the first `left` columns, or those given, stand left."""
    head, rows = table
    at_left = range(left) if isinstance(left, int) else left
    rule = ["---" if i in at_left else "---:" for i in range(len(head))]
    lines = [[markdown(c) for c in head], rule, *([markdown(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(rate: Mapping[str, Any] | None) -> str:
    """A rate with its standard error, in percent; what the data lacks is absent."""
    if not rate or not rate["n"]:
        return ABSENT
    mean, error = rate["mean"], rate["standard_error"]
    return _plus_minus(None if mean is None else 100 * mean, error and 100 * error, 1)


def number(value: float | None) -> str:
    """A share or error in three digits."""
    return ABSENT if value is None or value != value else f"{value:.3g}"


def rates_table(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """Evaluations by name (`before`, `after`) as columns, one row per metric, n behind."""
    rows: list[Sequence[str]] = []
    for name in METRICS:
        for key, label in ((name, "preference"), (f"{name}_strict", "strict")):
            rates = [side["rates"].get(key) for side in sides.values()]
            rows.append([f"{name}, {label} (%)", *map(percent, rates), _count(rates)])
    for key in _others(sides):
        rates = [side["rates"].get(key) for side in sides.values()]
        rows.append([f"{_label(key)} (%)", *map(percent, rates), _count(rates)])
    generation = [side.get("generation") for side in sides.values()]
    rows.append(["answer contains the target (%)", *map(percent, generation), _count(generation)])
    for key, label, unit in (("fluency", "fluency", "bits"), ("consistency", "consistency", "%")):
        found = [side.get(key) for side in sides.values()]
        if any(found):
            shown = [_bits(r) if unit == "bits" else percent(r) for r in found]
            rows.append([f"{label} ({unit})", *shown, _count(found)])
    texts = [side.get("perplexity") for side in sides.values()]
    said = [ABSENT if not p else _plus_minus(p["value"], p["standard_error"], 2) for p in texts]
    tokens = next((f"{p['tokens']} tokens" for p in texts if p), "")
    rows.append(["perplexity", *said, tokens])
    moved = [side.get("kl") for side in sides.values()]
    if any(moved):  # what the others are compared with has none
        rows.append(["KL per token (mnat)", *map(_moved, moved), tokens])
        shares = [k and k["worst_share"] for k in moved]
        held = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        rows.append(["KL, share of the worst 1 % (%)", *held, tokens])
    return ["", *sides, "n"], rows


def preservation_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Per layer: what the edits do to keys of other text, and how large they are."""
    head = ["layer", "‖ΔK₀‖/‖W₀K₀‖", "‖Δ‖/‖W₀‖", "edit keys free", "protected", "room left (%)"]
    rows: list[Sequence[str]] = [
        [
            str(row["layer"]),
            _number_plus_minus(row.get("error"), row.get("error_standard_error")),
            number(row["update_share"]),
            _number_plus_minus(row["free_share"], row.get("free_share_error")),
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
    return "not finite" if value is None else _number_plus_minus(value, error)


def _bits(rate: Mapping[str, Any] | None) -> str:
    """A rate that is no share."""
    return _plus_minus(rate["mean"], rate["standard_error"], 2) if rate else ABSENT


def _others(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Preference and strict rates of further kinds of prompts, where there are any."""
    known = {name + suffix for name in METRICS for suffix in ("", "_strict")}
    found = {k: None for side in sides.values() for k, rate in side["rates"].items() if rate}
    return [key for key in found if key not in known and not key.endswith("_tokens")]


def _label(key: str) -> str:
    kind = key.removesuffix("_strict")
    return f"{kind.replace('_', ' ')}, {'preference' if kind == key else 'strict'}"


def _number_plus_minus(value: float | None, error: float | None) -> str:
    """A number of any size with its standard error, where it has one."""
    known = error is not None and math.isfinite(error)
    return number(value) + (f" ± {number(error)}" if known else "")


def _plus_minus(value: float | None, error: float | None, digits: int) -> str:
    """A value with its standard error; one alone has none."""
    if value is None:
        return "not finite"
    known = error is not None and math.isfinite(error)
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")


def _count(rates: Sequence[Mapping[str, Any] | None]) -> str:
    return "/".join(dict.fromkeys(str(r["n"]) for r in rates if r and r["n"]))


def spoken(answer: str | None) -> str:
    """What a model said, in a table; None if it was not asked."""
    return ABSENT if answer is None else answer
