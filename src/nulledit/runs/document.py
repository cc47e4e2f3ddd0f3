"""A run's folder, read back, and as a study: so that one page shows both alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulledit.errors import ReportError
from nulledit.evaluation.measures import find, measured
from nulledit.evaluation.stats import paired_bootstrap
from nulledit.io.text import count
from nulledit.io.untrusted import MAX_SETTINGS, parse_yaml, read_text
from nulledit.report.document import Cell, Column, Example, FigureSpec, Study, StudyTable, Value
from nulledit.runs.folder import read_json, read_lines
from nulledit.runs.holding import after_row, held
from nulledit.runs.rates import rates_spec


@dataclass(frozen=True)
class RunFolder:
    """The files of one run that a page is made of."""

    name: str
    """As the page calls it."""
    summary: Mapping[str, Any]
    """`summary.json`."""
    lines: Sequence[Mapping[str, Any]]
    """`results.jsonl`."""
    recipe: Mapping[str, Any]
    """`recipe.yaml`."""
    environment: Sequence[Mapping[str, Any]]
    """`environment.json`."""

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """Those of its runs that were evaluated, oldest first."""
        return [run for run in self.summary["runs"] if run["after"]]


def read_run(folder: Path, name: str) -> RunFolder:
    """The run of a folder; ReportError if it lacks a file or one can't be read."""
    missing = [f for f in ("summary.json", "results.jsonl") if not (folder / f).is_file()]
    if missing:
        raise ReportError(f"{folder}: no run here (no {' and no '.join(missing)})")
    recipe, settings = folder / "recipe.yaml", {}
    if recipe.exists():
        text = read_text(recipe, most=MAX_SETTINGS, error=ReportError)
        settings = parse_yaml(text, source=str(recipe), error=ReportError)
    if not isinstance(settings, dict) or not isinstance(settings.get("method", {}), dict):
        raise ReportError(f"{recipe}: not a recipe; move the file away")
    summary = read_json(folder, "summary.json", {})
    if not isinstance(summary, dict) or not {"runs", "base", "version"} <= set(summary):
        raise ReportError(
            f"{folder / 'summary.json'}: not the summary of a run; edit again into a new folder"
        )
    environment = read_json(folder, "environment.json", [])
    return RunFolder(name, summary, read_lines(folder), settings, environment)


def run_study(run: RunFolder) -> Study:
    """The run as a study: rates, preservation, figure, what the model says."""
    seconds = [r["seconds"] for r in run.summary["runs"]]
    last = run.evaluated[-1] if run.evaluated else None
    notices = [n for r in run.summary["runs"] for n in r["notices"]]
    if last is None:
        notices.append("Not evaluated: `nulledit evaluate` measures it.")
    return Study(
        name="run",
        title=run.name,
        question="",
        scale="small",
        settings=run.recipe,
        environment=tuple(run.environment),
        seconds={"wall": sum(sum(s.values()) for s in seconds)} if seconds else {},
        shows="",
        cannot_show="",
        notices=tuple(notices),
        tables=_tables(run),
        figures=(_figure(last),) if last else (),
        examples=examples(run),
        nulledit=run.summary["version"],
    )


def run_sentence(run: RunFolder) -> str:
    """What was run, in one sentence."""
    summary = run.summary
    base, about = summary["base"], dict(run.environment[-1]) if run.environment else {}
    method = (run.recipe.get("method") or {}).get("name")
    words = [
        f"{count(summary['facts'], 'fact')} in {base['model'] or 'a model in memory'}",
        f"({base['dtype']})",
        f"written by {method}" if method else "written",
        f"in {count(summary['batches'], 'batch')}",
        f"on {about['device']}" if about.get("device") else "",
        f"with nulledit {summary['version']}",
    ]
    when = summary["runs"][-1]["time"][:10] if summary["runs"] else ""
    return " ".join(w for w in words if w) + (f", {when}." if when else ".")


def examples(run: RunFolder) -> tuple[Example, ...]:
    """Each evaluated fact that is in the model: its text before and after."""
    return tuple(
        Example(
            arm="",
            prompt=line["prompt"],
            target=line["target"],
            before=(line["before"] or {}).get("answer"),
            after=line["after"].get("answer"),
            holds=held(line),
        )
        for line in run.lines
        if line["after"] and line.get("active", True)
    )


def pairs(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], measure: str
) -> tuple[list[float], list[float]]:
    """A measure of two rows per fact, in its column's unit, where both rows have it."""
    a, b = [], []
    for one, other in zip(first, second, strict=True):
        left, right = one.get(measure), other.get(measure)
        if left is not None and right is not None:
            a.append(find(measure).scale * float(left))
            b.append(find(measure).scale * float(right))
    return a, b


def difference(a: Sequence[float], b: Sequence[float], digits: int = 1) -> str | None:
    """Mean of b − a with its 95 % paired-bootstrap interval, as `+1.0 [−2.0, +4.0]`."""
    if not a:
        return None
    mean, low, high = paired_bootstrap(a, b)
    return f"{signed(mean, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def signed(value: float, digits: int) -> str:
    """`+1.0`, `−2.0`, `0.0`."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def _tables(run: RunFolder) -> tuple[StudyTable, ...]:
    tables: list[StudyTable] = []
    several = len(run.evaluated) > 1
    for part in run.evaluated:
        which = f" of run {part['run']}" if several else ""
        lines = [line for line in run.lines if line["run"] == part["run"] and line["after"]]
        tables += _sides(part, lines, which)
    if run.evaluated and run.evaluated[-1]["layers"]:
        tables.append(_layers(run.evaluated[-1]))
    return tuple(tables)


def _sides(
    part: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], which: str
) -> list[StudyTable]:
    """Rates and, apart, what is not a share."""
    sides = (part["before"], part["after"])
    rates: list[dict[str, Cell]] = []
    text: list[dict[str, Cell]] = []
    for name in measured(sides):
        measure = find(name)
        a, b = pairs([x["before"] for x in lines], [after_row(x) for x in lines], name)
        rates_here = measure.unit == "%"
        row: dict[str, Cell] = {
            "measure": measure.title if rates_here else measure.label,
            "before": _value(sides[0], name),
            "after": _value(sides[1], name),
            "difference": difference(a, b, measure.digits),
        }
        (rates if rates_here else text).append(row)
    if any(side.get("perplexity") for side in sides):
        before, after = (perplexity(side) for side in sides)
        text.append({"measure": "perplexity", "before": before, "after": after})
    if moved := kl(sides[1]):
        zero = Value(0.0, None, moved[0].n)
        text.append({"measure": find("kl").label, "before": zero, "after": moved[0]})
        text.append({"measure": find("kl_worst").label, "after": moved[1]})
    caption = (
        "Means over facts. Preference: the answer is likelier than the other one; strict: every "
        "token of it is the likeliest"
    )
    if any(str(row["measure"]).endswith("tokens") for row in rates):
        caption += "; tokens: the share of its tokens that are"
    if any(row["difference"] for row in rates):
        caption += (
            ". Difference: after minus before, with the 95 % interval of a paired bootstrap over "
            "facts"
        )
    other = (
        f"On {part['text']}; n are its tokens. KL: of the base's next token from the edited "
        "model's, in thousandths of a nat"
        if part["text"]
        else ""
    )
    number = part["run"]
    found = [
        StudyTable(f"rates-{number}", f"Rates{which} (%)", caption, _columns(1, rates), _t(rates)),
        StudyTable(f"text-{number}", f"Other text{which}", other, _columns(2, text), _t(text)),
    ]
    return [table for table in found if table.rows]


def _value(summary: Mapping[str, Any], name: str) -> Value | None:
    """The measure of a summary, in its unit; None where the data can't give it."""
    rate = summary["rates"].get(name) or summary.get(name)
    if not rate or not rate["n"]:
        return None
    return Value.percent(rate) if find(name).unit == "%" else Value(**rate)


def perplexity(side: Mapping[str, Any] | None) -> Value | None:
    """The perplexity of a summary; n are tokens."""
    told = (side or {}).get("perplexity")
    return Value(told["value"], told["standard_error"], told["tokens"]) if told else None


def kl(side: Mapping[str, Any] | None) -> tuple[Value, float | None] | None:
    """KL per token of a summary, mnat, and the share of it in the worst 1 % of tokens, in %."""
    told = (side or {}).get("kl")
    if not told:
        return None
    share = told["worst_share"]
    value = Value(told["value"], told["standard_error"], told["tokens"])
    return value, None if share is None else 100 * share


def _columns(digits: int, rows: Sequence[Mapping[str, Cell]]) -> tuple[Column, ...]:
    names = ["before", "after"]
    if any(row.get("difference") for row in rows):
        names.append("difference")
    return (Column("measure", ""), *(Column(n, n, digits=digits) for n in names))


def _t(rows: Sequence[dict[str, Cell]]) -> tuple[dict[str, Cell], ...]:
    """Rows without an empty difference column."""
    told = any(row.get("difference") for row in rows)
    return tuple({k: v for k, v in row.items() if told or k != "difference"} for row in rows)


def _layers(part: Mapping[str, Any]) -> StudyTable:
    rows: list[dict[str, Cell]] = []
    for row in part["layers"]:
        rows.append(
            {
                "layer": str(row["layer"]),
                "error": Value(row.get("error"), row.get("error_standard_error"))
                if row.get("error") is not None
                else None,
                "update": row["update_share"],
                "free": Value(row["free_share"], row.get("free_share_error")),
                "protected": f"{row['protected']} of {row['d_in']}",
            }
        )
    return StudyTable(
        "layers",
        "What is preserved, per layer",
        "‖ΔK₀‖/‖W₀K₀‖: how far the layer's output moves on text that the statistics did not see "
        "(the paper's claim is 0). Edit keys free: the share of the edited keys' energy outside "
        "the protected directions",
        (
            Column("layer", "layer"),
            Column("error", "‖ΔK₀‖/‖W₀K₀‖", digits=4),
            Column("update", "‖Δ‖/‖W₀‖", digits=3),
            Column("free", "edit keys free", digits=3),
            Column("protected", "protected directions"),
        ),
        tuple(rows),
    )


def _figure(part: Mapping[str, Any]) -> FigureSpec:
    return rates_spec({side: part[side] for side in ("before", "after")})
