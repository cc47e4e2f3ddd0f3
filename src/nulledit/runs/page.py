"""The page of a run, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nulledit.io.text import count, markdown
from nulledit.report.tables import ABSENT, Table, as_markdown, number, spoken
from nulledit.runs.holding import headline, legend, mark, reasons
from nulledit.runs.tables import preservation_table, rates_table

SHOWN = 25  # facts whose answers stand on the page


def report_page(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """`summary.json` and `results.jsonl` as a page; the last of the folder's runs comes first."""
    base = summary["base"]
    parts = [
        "# Edited facts",
        f"In the model: {count(summary['facts'], 'fact')} of {count(summary['batches'], 'batch')}. "
        f"Base: {markdown(base['model'] or 'a model in memory')} "
        f"({markdown(base['dtype'])}, weights {markdown(base['hash'][:12])}); "
        f"state {markdown(summary['state'][:12])}; nulledit {markdown(summary['version'])}. "
        "The settings are in `recipe.yaml`, every fact in `results.jsonl`.",
    ]
    for run in reversed(summary["runs"]):
        mine = [line for line in lines if line["run"] == run["run"]]
        parts += _run(run, mine, last=run is summary["runs"][-1])
    return "\n\n".join(parts) + "\n"


def answers_table(lines: Sequence[Mapping[str, Any]], most: int = SHOWN) -> Table:
    """What the model says by itself before and after; `answers` marks a target that is said."""
    rows: list[Sequence[str]] = []
    for line in lines[:most]:
        before, after = line["before"] or {}, line["after"] or {}
        rows.append(
            [
                line["prompt"],
                line["target"],
                spoken(before.get("answer")),
                spoken(after.get("answer")),
                mark(line),
            ]
        )
    return ["prompt", "target", "before", "after", ""], rows


def _run(run: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], *, last: bool) -> list[str]:
    first, final = run["batches"] if run["batches"] else (0, 0)
    which = f"batches {first} to {final}" if final > first else f"batch {first}"
    parts = [
        f"## Run {run['run']}: {count(run['facts'], 'fact')}, {which if final else 'no new batch'}",
        f"{markdown(run['time'])}. Seconds: "
        + ", ".join(f"{markdown(stage)} {spent:.1f}" for stage, spent in run["seconds"].items())
        + ".",
    ]
    if run["known"]:
        parts.append(
            f"The model said {run['known']} of them before; they were written all the same."
        )
    if headline(lines):
        parts.append(f"**{headline(lines)}**")
    if run["after"]:
        parts.append(as_markdown(rates_table({"before": run["before"], "after": run["after"]})))
        parts.append(
            "Mean over facts ± standard error, n facts. By preference: the answer is likelier than "
            "the other one. Strict: every token of it is the likeliest. KL per token: of the "
            "base's next token from the edited model's, in thousandths of a nat. It and perplexity "
            f"are on {markdown(run['text'] or ABSENT)}."
        )
        for name, sides in run.get("others", {}).items():
            asked = f"Above: asked {run['asked']}, as edited. Asked {name}:"
            parts += [markdown(asked), as_markdown(rates_table(sides))]
        if last:
            parts.append(
                "![Efficacy, generalization and specificity before and after](figure.png)\n\n"
                "Bars: mean over facts ± standard error. The numbers are in `figure.csv`."
            )
    else:
        parts.append("Not evaluated.")
    parts += _layers(run)
    if lines:
        shown = f" (the first {SHOWN} of {len(lines)})" if len(lines) > SHOWN else ""
        parts += [
            f"### What the model says{shown}",
            as_markdown(answers_table(lines), left=5),
            markdown(legend(lines[:SHOWN])),
        ]
        parts += _reasons(lines)
    if run["notices"]:
        notices = run["notices"][:SHOWN]
        parts += ["### Notices", "\n".join(f"- {markdown(n)}" for n in notices)]
        if len(run["notices"]) > SHOWN:
            parts.append(f"and {len(run['notices']) - SHOWN} more, in `summary.json`.")
    return parts


def _reasons(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why facts don't hold, a line each."""
    told = reasons(lines)
    if not told:
        return []
    more = f"\n- and {len(told) - SHOWN} more, in `results.jsonl`" if len(told) > SHOWN else ""
    listed = "\n".join(f"- {markdown(i)}: {markdown(why)}" for i, why in told[:SHOWN])
    return ["### What does not hold, and why", listed + more]


def _layers(run: Mapping[str, Any]) -> list[str]:
    if not run["layers"]:
        return []
    worst = [row["error"] for row in run["layers"] if row.get("error") is not None]
    said = f" The largest error is {number(max(worst))}." if worst else ""
    return [
        "### What is preserved, per layer",
        as_markdown(preservation_table(run["layers"])),
        "‖ΔK₀‖/‖W₀K₀‖: how far the layer's output moves on text that the statistics did not see "
        f"({markdown(run['text'] or ABSENT)}); the paper's claim is 0. Edit keys free: the share "
        "of the edited keys' energy outside the protected directions. Room left: the share of the "
        f"usable directions that no edit has taken yet.{said}",
    ]
