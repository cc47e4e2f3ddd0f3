"""Methods side by side on one's own facts: rates, other text, seconds, and every answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from nulledit.data.facts import Fact
from nulledit.errors import ConfigError, ModelError, StatisticsError
from nulledit.evaluation.measures import PREFERENCE, STRICT
from nulledit.evaluation.runner import holds
from nulledit.report.document import Column
from nulledit.report.points import Point
from nulledit.runs.tables import interval
from nulledit.studies.alternatives import TOKENS, in_the_prompt, local, lora
from nulledit.studies.build import head, intervals, labels, moved, usual
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Cells, Part, StudySpec, Table
from nulledit.studies.questions import FACTS, SPOKEN, TEXT
from nulledit.studies.results import OF_TEXT, Results, Spot, difference, short
from nulledit.studies.scale import chosen
from nulledit.studies.stream import StreamPlan

ALTERNATIVES: Mapping[str, Callable[[Lab, Sequence[Fact]], dict[str, Any]]] = {
    "prompt": lambda lab, queue: {"facts": in_the_prompt(lab, queue, speak=True)},
    "lora": lambda lab, queue: lora(lab, queue, speak=True),
    "local": lambda lab, queue: local(lab, queue, speak=True),
}
"""Methods that are no edit: a fact's statement in the prompt, a LoRA, fine-tuning of one W."""
COMPARED = (*PREFERENCE, *STRICT, "generation")


def methods_of(settings: Mapping[str, Any]) -> list[str]:
    """Names of the arms that edit; ConfigError if there are none."""
    named = list(chosen(settings))
    if twice := {name for name in named if named.count(name) > 1}:
        raise ConfigError(f"methods: {', '.join(sorted(twice))} is named twice")
    edits = [name for name in named if name not in ALTERNATIVES]
    if not edits:
        raise ConfigError(
            f"methods: {', '.join(named)} edit nothing; name one that does, too, such as gated"
        )
    return edits


def _arms(lab: Lab, queue: list[Fact]) -> list[StreamPlan]:
    """Streams of the methods that statistics serve; the others are absent, with a notice."""
    plans = list[StreamPlan]()
    absent = dict[str, list[str]]()  # why -> names
    for name in methods_of(lab.settings):
        plan = lab.plan(name, queue)
        try:
            lab.bench.check(plan)
        except StatisticsError as error:
            absent.setdefault(str(error), []).append(name)
        else:
            plans.append(plan)
    refused = [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} absent: {why}"
        for why, names in absent.items()
    ]
    if not plans:
        raise StatisticsError("; ".join(refused))
    lab.notices += [notice for notice in refused if notice not in lab.notices]
    return plans


def _others(lab: Lab, results: Results) -> Iterator[Spot]:
    for name in chosen(lab.settings):
        if name not in ALTERNATIVES:
            continue
        try:
            found = ALTERNATIVES[name](lab, results.queue)
        except (ConfigError, ModelError) as error:
            lab.notices.append(f"{name} is absent: {error}")
            continue
        seconds = found.pop("seconds", 0.0) / len(results.queue)
        yield Spot(name, 0, found, results.base, extra={"seconds": seconds})


def _work(lab: Lab) -> Mapping[str, int]:
    """Of what is no edit."""
    facts = lab.settings["facts"]
    others = [name for name in chosen(lab.settings) if name in ALTERNATIVES]
    read = sum(name in TOKENS for name in others) if lab.sources.text else 0
    return {
        "asked": facts * len(others),
        "written": facts * len(others),
        "perplexities": read,
        "other_tokens": facts * sum(TOKENS.get(name, 0) for name in others),
    }


def _compared(results: Results) -> list[Spot]:
    """The methods in the order in which they were named."""
    order = list(chosen(results.lab.settings))
    return sorted(results.rows[1:], key=lambda spot: order.index(spot.label))


def _seconds(results: Results) -> Iterable[Cells]:
    """Of editing or training, a fact."""
    known = [s.extra["values"] for s in results.ends if s.extra.get("values") is not None]
    shared = known[0] if known else 0.0

    def cell(spot: Spot) -> float | None:
        own = spot.extra.get("own")
        if own is None:
            return spot.extra.get("seconds")
        values = spot.extra.get("values")
        return float(own + (shared if values is None else values))

    return [Cells(head("seconds", "seconds", "s/fact", 2), cell)]


def _held(spot: Spot) -> str | None:
    if not spot.rows or spot.base is None:
        return None
    return f"{sum(map(holds, spot.rows.values()))} of {len(spot.rows)}"


def _answers(results: Results) -> Iterator[dict[str, Any]]:
    """A row a fact: what the unedited model and each method say, marked where the fact holds."""
    for fact in results.queue:
        said: dict[str, Any] = {"prompt": fact.render(fact.prompt), "target": fact.target}
        said["unedited"] = results.base.rows[fact.id].get("answer")
        for spot in _compared(results):
            row = spot.rows[fact.id]
            mark = "✓" if holds(row) else "✗"
            said[f"by {spot.label}"] = (
                f"{mark} {row['answer']}" if row.get("answer") is not None else mark
            )
        yield said


def _columns_of_answers(results: Results) -> Iterable[Column]:
    heads = [Column(name, name) for name in ("prompt", "target", "unedited")]
    return heads + [Column(f"by {spot.label}", spot.label) for spot in _compared(results)]


def _differences(results: Results) -> Iterator[dict[str, Any]]:
    first, *others = _compared(results)
    for spot in others:
        found = {name: difference(first.rows, spot.rows, name) for name in COMPARED}
        yield {"method": spot.label} | {
            name: interval(change[0]) for name, change in found.items() if change
        }


def _columns_of_differences(results: Results) -> Iterable[Column]:
    held = {name for row in _differences(results) for name in row}
    heads = [Column(name, short(name)) for name in COMPARED if name in held]
    return [Column("method", "method"), *heads] if heads else []


def _points(results: Results) -> Iterator[Point]:
    first, *others = _compared(results)
    for spot in others:
        for name in COMPARED:
            yield from moved(spot.label, short(name), first.rows, spot.rows, name)


def _shows(results: Results) -> str:
    held = [f"{spot.label}: {_held(spot)}" for spot in _compared(results)]
    return f"Facts that hold: {'; '.join(held)}."


COMPARE = StudySpec(
    name="compare",
    title="Methods compared on your facts",
    question="Which method makes these facts hold, and what does it cost other text?",
    needs=("facts",),
    cannot_show="What other facts, or another order of them, would do. Settings are each arm's "
    "own, not tuned on these facts; in the prompt, a fact is always found.",
    settings={
        "arms": ["gated", "alphaedit", "memit"],
        "facts": 20,
        "skip": 0,
        "batch_size": 100,
        "windows": 40,
        "answers": 1_000_000,
    },
    parts=(
        Part(
            _arms,
            asked=(FACTS, SPOKEN, TEXT),
            tables=(
                Table(
                    "methods",
                    "After {edits} edits of {data}",
                    "A fact holds if the model says it by itself. n counts facts, for perplexity "
                    "and KL (from the unedited model) tokens. Seconds are wall time of editing a "
                    "fact; values that a method shares with an earlier one count as they took "
                    "there.",
                    (
                        labels("method"),
                        Cells(head("held", "hold", ""), _held),
                        usual,
                        "generation",
                        *OF_TEXT,
                        _seconds,
                    ),
                    rows=lambda results: [results.base, *_compared(results)],
                ),
                Table(
                    "differences",
                    "Differences from the first method",
                    "Points of %, with the 95 % interval of a paired bootstrap over the facts.",
                    (_columns_of_differences,),
                    rows=_differences,
                ),
                Table(
                    "answers",
                    "What the models say",
                    "✓: the fact holds.",
                    (_columns_of_answers,),
                    rows=_answers,
                ),
            ),
            figures=(
                intervals(
                    "differences",
                    "Each method minus the first; 95 % intervals of a paired bootstrap.",
                    _points,
                ),
            ),
            shows=_shows,
            examples=False,
            others=_others,
            more=_work,
        ),
    ),
)
