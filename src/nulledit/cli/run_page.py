"""What `nulledit edit` and `nulledit retry` print."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from nulledit.api.run import Refused
from nulledit.cli.check import gate_table
from nulledit.cli.command import Call
from nulledit.io.text import count
from nulledit.report.tables import as_text
from nulledit.runs.holding import headline, legend, reasons
from nulledit.runs.page import SHOWN, answers_table
from nulledit.runs.pages import Result
from nulledit.runs.tables import preservation_table, rates_table


def show(call: Call, result: Result) -> None:
    """A result on stdout."""
    call.show(result.to_dict, lambda: as_page(result))


@contextmanager
def refusal_shown(call: Call) -> Iterator[None]:
    """Where limits refuse what is inside, what they found is shown first."""
    try:
        yield
    except Refused as error:
        found = error.report
        call.show(found.to_dict(), lambda: as_text(gate_table(found), left=2, most=90))
        raise


def as_page(result: Result) -> str:
    """What `edit` prints."""
    last = result.summary["runs"][-1]
    parts = []
    if result.lines:
        parts.append(as_text(answers_table(result.lines), left=5, most=38))
        if len(result.lines) > SHOWN:
            more = len(result.lines) - SHOWN
            parts.append(f"and {more} more in {result.folder / 'results.jsonl'}")
        parts += _holding(result)
    if last["after"]:
        parts.append(as_text(rates_table({"before": last["before"], "after": last["after"]})))
    for name, sides in last.get("others", {}).items():
        parts.append(f"Above: asked {last['asked']}, as edited. Asked {name}:")
        parts.append(as_text(rates_table(sides)))
    if last["layers"]:
        parts.append(as_text(preservation_table(last["layers"])))
    if last["text"]:
        parts.append(f"Perplexity, KL and ‖ΔK₀‖ are on {last['text']}.")
    spent = ", ".join(f"{stage} {value:.1f}" for stage, value in last["seconds"].items())
    place = shlex.quote(str(result.folder))
    parts.append(
        f"{count(last['facts'], 'fact')} in this run. Seconds: {spent}.\n"
        f"Report: {result.folder / 'report.md'}\n"
        f"Model:  {_place_of_model(result)}\n"
        f'Next:   nulledit ask {place} "..."\n'
        f"        nulledit edit MORE --continue {place}"
    )
    return "\n\n".join(parts)


def _holding(result: Result) -> list[str]:
    """How many facts hold, why the others don't, and what the marks mean."""
    told = reasons(result.lines, shlex.quote(str(result.folder)))
    parts = [headline(result.lines), *(f"  {fact}: {why}" for fact, why in told[:SHOWN])]
    if len(told) > SHOWN:
        parts.append(f"  and {len(told) - SHOWN} more in {result.folder / 'results.jsonl'}")
    said = legend(result.lines[:SHOWN])
    return [part for part in ("\n".join(filter(None, parts)), said) if part]


def _place_of_model(result: Result) -> str:
    base = result.summary.get("base", {})
    if base.get("quantized"):
        return f"{base['model'] or 'the base'} with the ledger; nulledit export writes the edits"
    return str(result.folder / "model")
