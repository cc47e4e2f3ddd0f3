"""What a change of a model would do, written nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nulledit.data.facts import Fact
from nulledit.data.readers import Facts, as_facts
from nulledit.editing.engine import EditEngine
from nulledit.editing.session import check_in_model
from nulledit.editing.weights import LayerReport
from nulledit.errors import ConfigError
from nulledit.evaluation.comparison import Comparison
from nulledit.evaluation.kept_reading import base_reading, edited_reading
from nulledit.evaluation.opening import gates_of
from nulledit.evaluation.runner import Evaluation, evaluate
from nulledit.io.text import count
from nulledit.report.document import Items, StudyTable
from nulledit.report.tables import number
from nulledit.runs.history import answer_of
from nulledit.runs.measure import check_lengths, read_text
from nulledit.runs.tables import rates_tables
from nulledit.runs.talk import Talk

SHOWN = 25  # neighbours that are named
HELD = 20  # facts in the model that are asked again


@dataclass(frozen=True)
class Preview:
    """The model as it is and as it would be."""

    facts: tuple[Fact, ...]
    """Those to write, then those to take out."""
    asked: Comparison
    """The model now and then on these facts; KL is from the base."""
    held: Comparison | None
    """The same on the last facts that are in the model and would stay; None if there are none."""
    before: tuple[LayerReport, ...]
    """The layers now."""
    after: tuple[LayerReport, ...]
    """The layers then."""
    notices: tuple[str, ...]
    """Records dropped; facts known, replaced, or joined with others on one key."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        now, then = self.asked.before, self.asked.after
        return {
            "asked": self.asked.summary(),
            "held": self.held.summary() if self.held else {},
            "answers": [
                {
                    "id": f.id,
                    "prompt": f.render(f.prompt),
                    "target": f.target,
                    "before": now.answers.get(f.id) if now else None,
                    "after": then.answers.get(f.id),
                }
                for f in self.facts
            ],
            "layers": {
                "before": [r.to_dict() for r in self.before],
                "after": [r.to_dict() for r in self.after],
            },
            "notices": list(self.notices),
        }

    def __repr__(self) -> str:
        return f"<Preview of {count(len(self.facts), 'fact')}: {self.asked!r}>"

    def _repr_html_(self) -> str:
        return self.asked._repr_html_()


def preview(
    editor: EditEngine,
    facts: Facts = (),
    undo: Sequence[str] = (),
    *,
    text: str | Path | None = None,
    talk: Talk | None = None,
) -> Preview:
    """Take the facts `undo` out and write `facts`, in memory; the editor is as before afterwards.

    `text`: a file for perplexity and KL, by default the one that comes along. ConfigError where
    nothing is asked for.
    """
    given, talk = as_facts(facts), talk or Talk()
    new = list(given.facts)
    if not new and not undo:
        raise ConfigError("nothing to preview: expected facts to write, or ids to take out")
    check_in_model(undo, editor.history)
    check_lengths(editor, new)
    found = read_text(editor, text)
    written = {f.id for f in new}  # what is taken out and written again is asked once
    asked = [*new, *(f for f in editor.facts if f.id in undo and f.id not in written)]
    keys = {f.key for f in asked}
    held = [f for f in editor.facts if f.key not in keys][-HELD:]
    windows = found.windows
    read = base_reading(editor, windows)
    with editor.base_weights():
        base = evaluate(
            editor.editable, asked, windows=windows, reading=read, generate=False, beside=False
        )

    def measure(name: str) -> tuple[Evaluation, Evaluation | None]:
        model, gates = editor.editable, gates_of(editor.weights)
        with talk.progress(f"{name}: ") as tell:
            one = partial(evaluate, model, progress=tell, beside=False)
            stage = partial(tell, "perplexity") if tell else None
            text = edited_reading(editor, windows, read, gates=gates, progress=stage)
            mine = one(asked, windows=windows, reading=text, base=base)
            others = one(held, generate=False) if held else None
        return mine, others

    now, layers = measure("before"), editor.weights.reports()
    notices = list(given.notices)
    with editor.trial(writing=False), talk.progress() as tell:
        if undo:
            notices += editor.undo(*undo).notices
        if new:
            notices += editor.edit(new, progress=tell).notices
        then, would_be = measure("after"), editor.weights.reports()
    return Preview(
        facts=tuple(asked),
        asked=Comparison(now[0], then[0], found.name),
        held=Comparison(now[1], then[1]) if then[1] else None,
        before=layers,
        after=would_be,
        notices=tuple(notices),
    )


def preview_page(found: Preview) -> list[Any]:
    """A preview as parts of a document: answers, rates, norms."""
    before, after, held = found.asked.before, found.asked.after, found.held
    then = before.answers if before else {}
    answers: list[Sequence[str]] = [
        [f.render(f.prompt), answer_of(f), then.get(f.id, ""), after.answers.get(f.id, "")]
        for f in found.facts
    ]
    return [
        StudyTable.of("answers", "", ["prompt", "target", "before", "after"], answers),
        *rates_tables(found.asked.summary()),
        f"The last {len(held.after.rows())} facts in the model:" if held else "",
        *(rates_tables(held.summary(), absent=False) if held else ()),
        *_neighbours(found),
        _norms(found),
        f"Perplexity and KL are on {found.asked.text}. Nothing was written.",
    ]


def _neighbours(found: Preview) -> list[Items | str]:
    """Which neighbours' answers change, of the facts asked and of those in the model."""
    both = [found.asked, *([found.held] if found.held else [])]
    asked = sum(s.query.kind == "specificity" for side in both for s in side.after.scores)
    moved = [pair for side in both for pair in side.moved()]
    if not moved:
        return [f"Of {count(asked, 'neighbour')} none changes its answer."] if asked else []
    said = tuple(
        (query.prompt, f"{query.answer} {'is said now' if now else 'is lost'}")
        for query, now in moved
    )
    return [Items(said, title="Neighbours whose answer changes", most=SHOWN)]


def _norms(found: Preview) -> StudyTable:
    then, rows = {r.layer: r for r in found.before}, []
    for now in found.after:
        old = then.get(now.layer)
        share, room = (old.update_share, old.room) if old else (0.0, 1.0)
        cells = (share, now.update_share, 100 * room, 100 * now.room)
        rows.append([str(now.layer), *map(number, cells)])
    head = ["layer", "‖Δ‖/‖W₀‖ before", "after", "room left before (%)", "after (%)"]
    return StudyTable.of("norms", "", head, rows)
