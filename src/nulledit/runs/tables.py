"""Evaluations, layers and answers of a run as tables, and its rates as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nulledit.evaluation.measures import OF_FACTS, PREFERENCE, STRICT, find, measured
from nulledit.evaluation.stats import paired_interval
from nulledit.report.cells import ABSENT
from nulledit.report.document import Cell, Column, FigureSpec, Status, StudyTable, Value
from nulledit.report.points import Point
from nulledit.runs.holding import after_row, legend, mark, tone

if TYPE_CHECKING:
    from nulledit.evaluation.outlook import Outlook  # with torch

SHOWN = 25  # facts whose answers are shown
PANELS = {"preference": "by preference", "strict": "strict: every token is the likeliest"}
Sides = Mapping[str, Mapping[str, Any]]
"""Evaluations by name, such as `before` and `after`."""
_ALWAYS = {
    "rates": {name: {"n": 1} for name in (*PREFERENCE, *STRICT)},
    OF_FACTS[0].name: {"n": 1},
}
RATES = (
    "Means over facts. Preference: the answer is likelier than the other one; strict: every token "
    "of it is the likeliest"
)
TOKENS = "; tokens: the share of its tokens that are"
DIFFERENCE = (
    ". Difference: after minus before, with the 95 % interval of a paired bootstrap over facts"
)
TEXT = (
    "On {}; n are its tokens. KL: of the base's next token from the edited model's, in thousandths "
    "of a nat"
)
OPENING = (
    "; tokens that open a gate: of 10,000, at which a neuron gives more than a tenth of what it "
    "gives on its own fact"
)
OPENINGS = ("opening_rate", "opening_worst", "opening_any")
OF_TEXT = ("perplexity", "kl", "kl_worst", *OPENINGS)
"""Measures of the other text, as they are shown."""
PARTS: Mapping[str, tuple[str, str, str | None]] = {
    "kl_worst": ("kl", "worst_share", None),
    "opening_worst": ("opening_rate", "worst", None),
    "opening_any": ("opening_rate", "any", "any_standard_error"),
}
"""Those that are a part of a summary's entry: its name, the value's, the error's."""
LAYERS = (
    "‖ΔK₀‖/‖W₀K₀‖: how far the layer's output moves on text that the statistics did not see (the "
    "paper's claim is 0). Edit keys free: the share of the edited keys' energy outside the "
    "protected directions. Room left: the share of the usable directions that no edit has taken yet"
)


def rates_tables(
    sides: Sides,
    *,
    name: str = "1",
    which: str = "",
    text: str | None = None,
    lines: Sequence[Mapping[str, Any]] | None = None,
    absent: bool = True,
) -> list[StudyTable]:
    """Rates by measure and, apart, what other text and fluency say; a column for each side.

    `which`: said in the titles; `text`: the name of the other text. `lines`: those of
    `results.jsonl`; with them come shares of tokens and after minus before, fact by fact. What the
    facts lack is absent, or left out.
    """
    rates: list[dict[str, Cell]] = []
    other: list[dict[str, Cell]] = []
    for key in measured((_ALWAYS if absent else None, *sides.values())):
        measure = find(key)
        if key.endswith("_tokens") and lines is None:
            continue
        row: dict[str, Cell] = {"measure": measure.label}
        row |= {side: _value(summary, key) for side, summary in sides.items()}
        if lines is not None:
            a, b = pairs([x["before"] for x in lines], [after_row(x) for x in lines], key)
            apart = paired_interval(a, b, measure.scale) if a else None
            row["difference"] = interval(apart, measure.digits) if apart else None
        (rates if measure.unit == "%" else other).append(row)
    for key in OF_TEXT:
        found = {side: of_text(summary, key) for side, summary in sides.items()}
        if any(cell is not None for cell in found.values()):
            if key == "kl":  # the model that the others are compared with has none
                n = next(cell.n for cell in found.values() if isinstance(cell, Value))
                found = {s: Value(0.0, None, n) if c is None else c for s, c in found.items()}
            other.append({"measure": find(key).label, **found})
    caption = RATES
    if any(str(row["measure"]).endswith("tokens (%)") for row in rates):
        caption += TOKENS
    if any(row.get("difference") for row in rates):
        caption += DIFFERENCE
    about = TEXT.format(text) if text else ""
    if about and any(summary.get("opening_rate") for summary in sides.values()):
        about += OPENING
    found_tables = [
        _by_measure(f"rates-{name}", f"Rates{which}", caption, sides, rates, 1),
        _by_measure(f"text-{name}", f"Other text{which}", about, sides, other, 2),
    ]
    return [table for table in found_tables if table.rows]


def layers_table(layers: Sequence[Mapping[str, Any]], name: str = "layers") -> StudyTable:
    """Per layer: what the edits do to keys of other text, and how large they are."""
    columns = [
        Column("layer", "layer"),
        Column("error", "‖ΔK₀‖/‖W₀K₀‖", digits=4),
        Column("update", "‖Δ‖/‖W₀‖", digits=3),
        Column("free", "edit keys free", digits=3),
        Column("protected", "protected"),
        Column("room", "room left", unit="%"),
    ]
    if any("neurons" in row for row in layers):
        columns.append(Column("neurons", "neurons"))
    if any(row["rounding_share"] for row in layers):
        columns.append(Column("rounding", "rounding/‖Δ‖", digits=3))
    rows: list[dict[str, Cell]] = []
    for row in layers:
        error, room = row.get("error"), row.get("room")
        cells: dict[str, Cell] = {
            "layer": str(row["layer"]),
            "error": None if error is None else Value(error, row.get("error_standard_error")),
            "update": row["update_share"],
            "free": Value(row["free_share"], row.get("free_share_error")),
            "protected": f"{row['protected']} of {row['d_in']}",
            "room": None if room is None else 100 * room,
            "neurons": f"{row['neurons']} beside {row['d_in']}" if "neurons" in row else None,
            "rounding": row["rounding_share"],
        }
        rows.append({column.key: cells[column.key] for column in columns})
    return StudyTable(name, "What is preserved, per layer", LAYERS, tuple(columns), tuple(rows))


def answers_table(lines: Sequence[Mapping[str, Any]], name: str = "answers") -> StudyTable:
    """What the model says by itself before and after, and how each fact holds."""
    few = f" (the first {SHOWN} of {len(lines)})" if len(lines) > SHOWN else ""
    rows: list[dict[str, Cell]] = [
        {
            "prompt": line["prompt"],
            "target": line["target"],
            **{side: _spoken(line[side]) for side in ("before", "after")},
            "mark": Status(mark(line), tone(line)),
        }
        for line in lines[:SHOWN]
    ]
    heads = ("prompt", "target", "before", "after")
    columns = (*(Column(head, head) for head in heads), Column("mark", ""))
    title = f"What the model says{few}"
    return StudyTable(name, title, legend(lines[:SHOWN]), columns, tuple(rows))


def outlook_table(seen: Sequence[Outlook]) -> StudyTable:
    """What a model makes of facts before they are edited."""
    rows: list[Sequence[str]] = [
        [item.fact.id, item.fact.target, str(item.tokens), item.says, item.remarks] for item in seen
    ]
    head = ["fact", "target", "tokens", "the model says", "remarks"]
    return StudyTable.of("facts", "", head, rows)


def rate_rows(sides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric, score and side (`before`, `after`) that the data has."""
    rows = []
    for metric in PREFERENCE:
        for score, key in (("preference", metric), ("strict", f"{metric}_strict")):
            for side, evaluation in sides.items():
                if rate := evaluation["rates"].get(key):
                    rows.append({"metric": metric, "score": score, "side": side, **rate})
    return rows


def rates_spec(sides: Mapping[str, Mapping[str, Any]]) -> FigureSpec:
    """Bars of efficacy, generalization and specificity, before and after."""
    points = tuple(
        Point(
            x=row["metric"],
            y=None if row["mean"] is None else 100 * row["mean"],
            error=row["standard_error"] and 100 * row["standard_error"],
            n=row["n"],
            series=row["side"],
            panel=PANELS[row["score"]],
        )
        for row in sorted(rate_rows(sides), key=lambda row: list(PANELS).index(row["score"]))
    )
    return FigureSpec(
        name="rates",
        caption="Efficacy, generalization and specificity. Bars: mean over facts ± standard error.",
        kind="bars",
        x="metric",
        y="mean over facts",
        series="model",
        panel="score",
        labels={"x": "", "y": "mean over facts (%)"},
        points=points,
    )


def of_text(summary: Mapping[str, Any] | None, key: str) -> Value | float | None:
    """One of `OF_TEXT` of a summary, in its unit; n are tokens."""
    entry, value, error = PARTS.get(key, (key, "value", "standard_error"))
    told = (summary or {}).get(entry)
    if not told:
        return None

    def scaled(name: str) -> float | None:
        return None if told[name] is None else find(key).scale * told[name]

    if error is None:
        return scaled(value)
    return Value(scaled(value), scaled(error), told["tokens"])


def pairs(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], measure: str
) -> tuple[list[float], list[float]]:
    """A measure of two rows per fact, in its column's unit, where both rows have it."""
    scale = find(measure).scale
    both = [
        (scale * float(one[measure]), scale * float(other[measure]))
        for one, other in zip(first, second, strict=True)
        if one.get(measure) is not None and other.get(measure) is not None
    ]
    return [a for a, _ in both], [b for _, b in both]


def interval(found: Iterable[float], digits: int = 1) -> str:
    """A mean difference, low and high end, as `+1.0 [−2.0, +4.0]`."""
    texts = (f"{value:+.{digits}f}" for value in found)
    signed = (text.replace("-", "−") if float(text) else text[1:] for text in texts)
    return "{} [{}, {}]".format(*signed)


def _spoken(row: Mapping[str, Any] | None) -> str:
    answer = (row or {}).get("answer")
    return ABSENT if answer is None else str(answer)


def _value(summary: Mapping[str, Any], name: str) -> Value | None:
    """The measure of a summary, in its unit; None where the data can't give it."""
    rate = summary["rates"].get(name) or summary.get(name)
    if not rate or not rate["n"]:
        return None
    return Value.percent(rate) if find(name).unit == "%" else Value(**rate)


def _by_measure(
    name: str, title: str, caption: str, sides: Sides, rows: list[dict[str, Cell]], digits: int
) -> StudyTable:
    names = [*sides]
    if any(row.get("difference") for row in rows):
        names.append("difference")
    kept = ["measure", *names]
    columns = (Column("measure", ""), *(Column(side, side, digits=digits) for side in names))
    own = tuple({key: row.get(key) for key in kept} for row in rows)
    return StudyTable(name, title, caption, columns, own)
