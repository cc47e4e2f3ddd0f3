"""What `nulledit edit` and `nulledit retry` print."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from nulledit.api.run import Refused
from nulledit.cli.command import Call
from nulledit.io.text import count
from nulledit.report.document import Heading, Part, StudyTable
from nulledit.runs.document import RunFolder, call_parts
from nulledit.runs.gate_report import gate_table
from nulledit.runs.pages import Result


def show(call: Call, result: Result) -> None:
    """A result on stdout."""
    call.show(result.to_dict, lambda: list(page_of(result)))


@contextmanager
def refusal_shown(call: Call) -> Iterator[None]:
    """Where limits refuse what is inside, what they found is shown first."""
    try:
        yield
    except Refused as error:
        found = error.report
        call.show(found.to_dict(), lambda: gate_table(found))
        raise


def page_of(result: Result) -> Iterator[Part | str]:
    """What `edit` prints: the last call of the run without what stderr has said, and what next."""
    last = result.summary["runs"][-1]
    place = shlex.quote(str(result.folder))
    run = RunFolder("", result.summary, result.lines, {}, [])
    for part in call_parts(run, last, folder=place):
        if isinstance(part, StudyTable):
            answers = part.name.startswith("answers")
            if last["after"] or not answers:  # prompts without what the model says tell nothing new
                yield part if answers else replace(part, caption="")
        elif not isinstance(part, Heading) and getattr(part, "tone", "") not in ("quiet", "note"):
            yield part
    if last["text"]:
        yield f"Perplexity, KL and ‖ΔK₀‖ are on {last['text']}."
    spent = ", ".join(f"{stage} {value:.1f}" for stage, value in last["seconds"].items())
    yield (
        f"{_written(result.summary)} Seconds: {spent}.\n"
        f"Report: {result.folder / 'report.md'}\n"
        f"Model:  {_place_of_model(result)}\n"
        f'Next:   nulledit ask {place} "..."\n'
        f"        nulledit edit MORE --continue {place}"
    )


def _written(summary: dict[str, Any]) -> str:
    """How many facts the last call wrote, and how many the run has, if it was not the first."""
    facts = count(summary["runs"][-1]["facts"], "fact")
    if len(summary["runs"]) == 1:
        return f"{facts} in this run."
    return f"{facts} in this call, {summary['facts']} in the run."


def _place_of_model(result: Result) -> str:
    base = result.summary.get("base", {})
    if base.get("quantized"):
        return f"{base['model'] or 'the base'} with the ledger; nulledit export writes the edits"
    return str(result.folder / "model")
