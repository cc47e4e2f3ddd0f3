"""What a change would do to a model, in memory alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor
from nulledit.editing.weights import LayerReport
from nulledit.evaluation.reading import read
from nulledit.evaluation.runner import Evaluation, evaluate
from nulledit.runs.measure import check_lengths, read_text
from nulledit.runs.talk import Talk

HELD = 20  # facts in the model that are asked again


@dataclass(frozen=True)
class Side:
    """What was measured before a change, or after it."""

    asked: Evaluation
    """Of the facts that would come or go."""
    held: Evaluation | None
    """Of facts that would stay; None if there are none."""
    layers: tuple[LayerReport, ...]
    """Edited matrices."""


@dataclass(frozen=True)
class Preview:
    """What a change would do."""

    facts: Sequence[Fact]
    """That would come or go."""
    held: Sequence[Fact]
    """The last of those in the model that would stay."""
    text: str
    """What perplexity and KL are of."""
    sides: dict[str, Side]
    """"before" and "after"."""
    notices: tuple[str, ...]
    """One line for each thing that the change would have said."""

    def summaries(self, of: str = "asked") -> dict[str, dict[str, Any]]:
        """Rates of each side, of the facts `asked` or `held`."""
        found = {name: getattr(side, of) for name, side in self.sides.items()}
        return {name: e.summary() for name, e in found.items() if e is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "asked": self.summaries(),
            "held": self.summaries("held"),
            "answers": [
                {"id": f.id, "prompt": f.render(f.prompt), "target": f.target}
                | {name: side.asked.answers.get(f.id) for name, side in self.sides.items()}
                for f in self.facts
            ],
            "layers": {name: [*map(vars, side.layers)] for name, side in self.sides.items()},
            "notices": list(self.notices),
        }


def preview(
    editor: Editor, facts: Sequence[Fact], undone: Sequence[str], text: str | None, talk: Talk
) -> Preview:
    """Undo the ids `undone`, edit `facts`, measure, and take both back.

    `text`: a file for perplexity and KL, by default the one that comes along.
    """
    check_lengths(editor, facts)
    windows = read_text(editor, text)
    asked = [*facts, *(f for f in editor.facts if f.id in undone)]
    keys = {f.key for f in asked}
    held = [f for f in editor.facts if f.key not in keys][-HELD:]
    with editor.base_weights():
        base = read(editor.editable, windows.windows, keep=True)

    def measure(name: str) -> Side:
        model = editor.editable
        with talk.progress(f"{name}: ") as tell:
            mine = evaluate(model, asked, windows=windows.windows, base=base, progress=tell)
            others = evaluate(model, held, generate=False, progress=tell) if held else None
        return Side(mine, others, editor.weights.reports())

    notices: list[str] = []
    sides = {"before": measure("before")}
    with editor.trial(writing=False), talk.progress() as tell:
        if undone:
            notices += editor.undo(*undone).notices
        if facts:
            notices += editor.edit(facts, progress=tell).notices
        sides["after"] = measure("after")
    return Preview(asked, held, windows.name, sides, tuple(notices))
