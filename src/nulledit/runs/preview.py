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
class Preview:
    """What was measured before a change and, each in second place, after it."""

    facts: Sequence[Fact]
    """That would come or go."""
    held: Sequence[Fact]
    """The last of those in the model that would stay."""
    text: str
    """What perplexity and KL are of."""
    asked: tuple[Evaluation, Evaluation]
    """Of `facts`."""
    others: tuple[Evaluation, Evaluation] | None
    """Of `held`; None if there are none."""
    layers: tuple[list[LayerReport], list[LayerReport]]
    """Edited matrices."""
    notices: tuple[str, ...]
    """One line for each thing that the change would have said."""

    @property
    def sides(self) -> dict[str, dict[str, Any]]:
        """Summaries of `asked`."""
        return _sides(self.asked)

    @property
    def held_sides(self) -> dict[str, dict[str, Any]]:
        """Summaries of `others`; empty if there are none."""
        return _sides(self.others) if self.others else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        before, after = (side.answers for side in self.asked)
        return {
            "asked": self.sides,
            "held": self.held_sides,
            "answers": [
                {
                    "id": f.id,
                    "prompt": f.render(f.prompt),
                    "target": f.target,
                    "before": before.get(f.id),
                    "after": after.get(f.id),
                }
                for f in self.facts
            ],
            "layers": {
                side: [vars(report) for report in reports]
                for side, reports in zip(("before", "after"), self.layers, strict=True)
            },
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

    def measure(name: str) -> tuple[Evaluation, Evaluation | None, list[LayerReport]]:
        model = editor.editable
        with talk.progress(f"{name}: ") as tell:
            mine = evaluate(model, asked, windows=windows.windows, base=base, progress=tell)
            others = evaluate(model, held, generate=False, progress=tell) if held else None
        return mine, others, list(editor.weights.reports())

    notices: list[str] = []
    before = measure("before")
    with editor.trial(writing=False), talk.progress() as tell:
        if undone:
            notices += editor.undo(*undone).notices
        if facts:
            notices += editor.edit(facts, progress=tell).notices
        after = measure("after")
    both = (before[1], after[1]) if before[1] and after[1] else None
    return Preview(
        asked,
        held,
        windows.name,
        (before[0], after[0]),
        both,
        (before[2], after[2]),
        tuple(notices),
    )


def _sides(both: tuple[Evaluation, Evaluation]) -> dict[str, dict[str, Any]]:
    return {name: e.summary() for name, e in zip(("before", "after"), both, strict=True)}
