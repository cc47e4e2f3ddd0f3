"""What `nulledit edit` and `nulledit retry` print."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

from nulledit.cli.check import gate_table
from nulledit.cli.common import echo, emit
from nulledit.io.text import count
from nulledit.report.document import Heading, Part, StudyTable
from nulledit.runs.document import RunFolder, call_parts
from nulledit.runs.gate import GateReport
from nulledit.runs.pages import Result


def show(result: Result, *, as_json: bool) -> None:
    """A result on stdout."""
    if as_json:
        emit(result.to_dict())
    else:
        echo(*page_of(result))


def show_refusal(report: GateReport, *, as_json: bool) -> None:
    """What a gate found, on stdout."""
    if as_json:
        emit(report.to_dict())
    else:
        echo(gate_table(report))


def page_of(result: Result) -> Iterator[Part | str]:
    """What `edit` prints: the last call of the run without what stderr has said, and what next."""
    last = result.summary["runs"][-1]
    place = shlex.quote(str(result.folder))
    run = RunFolder("", result.summary, result.lines, {}, [])
    for part in call_parts(run, last, folder=place):
        if isinstance(part, StudyTable):
            yield part if part.name.startswith("answers") else replace(part, caption="")
        elif not isinstance(part, Heading) and getattr(part, "tone", "") not in ("quiet", "note"):
            yield part
    if last["text"]:
        yield f"Perplexity, KL and ‖ΔK₀‖ are on {last['text']}."
    spent = ", ".join(f"{stage} {value:.1f}" for stage, value in last["seconds"].items())
    yield (
        f"{count(last['facts'], 'fact')} in this run. Seconds: {spent}.\n"
        f"Report: {result.folder / 'report.md'}\n"
        f"Model:  {_place_of_model(result)}\n"
        f'Next:   nulledit ask {place} "..."\n'
        f"        nulledit edit MORE --continue {place}"
    )


def _place_of_model(result: Result) -> str:
    base = result.summary.get("base", {})
    if base.get("quantized"):
        return f"{base['model'] or 'the base'} with the ledger; nulledit export writes the edits"
    return str(result.folder / "model")
