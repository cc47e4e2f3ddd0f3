"""A run's model and its base, on facts, text and whatever else is asked; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nulledit.config import ChatSettings
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.capability import TaskResult, capability
from nulledit.evaluation.comparison import Comparison
from nulledit.evaluation.drift import Drift, drift_report, read_texts
from nulledit.evaluation.forms import form_name, forms
from nulledit.evaluation.groups import by_relation, rates_of_rows
from nulledit.evaluation.harness import check_tasks, harness_results
from nulledit.evaluation.runner import Evaluation
from nulledit.evaluation.tasks import Item
from nulledit.runs.measure import evaluate_given, in_chat_as_well, in_other_forms
from nulledit.runs.talk import Talk


@dataclass(frozen=True, repr=False)
class Evaluated(Comparison):
    """A comparison, and what else was asked of each side: "base" (if it was asked) and "edited"."""

    facts: Sequence[Fact] = ()
    """That were asked."""
    asked: str = ""
    """The form in which the facts were asked."""
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Summaries of the facts asked in other forms, by the form and its side."""
    tasks: dict[str, dict[str, TaskResult]] = field(default_factory=dict)
    """The six tasks, by side; empty if they were not asked."""
    harness: dict[str, dict[str, Any]] = field(default_factory=dict)
    """lm-evaluation-harness tasks, likewise."""
    drift: Drift | None = None
    """Of hidden states."""

    @property
    def sides(self) -> dict[str, Evaluation]:
        """Facts and text, by side."""
        return ({"base": self.before} if self.before else {}) | {"edited": self.after}

    def to_dict(self, *, relations: bool = False) -> dict[str, Any]:
        """Plain data for JSON; `relations`: with the edited side's rates by relation."""
        grouped = None
        if relations:
            rates = rates_of_rows(self.after.rows(), by_relation(self.facts))
            grouped = {
                name: {measure: rate and dict(vars(rate)) for measure, rate in found.items()}
                for name, found in rates.items()
            }
        return {
            "facts": len(self.facts),
            "text": self.text,
            "asked": self.asked,
            "others": self.others,
            **{side: found.summary() for side, found in self.sides.items()},
            "preservation": [asdict(p) for p in self.preservation],
            "capability": {
                side: {name: task.summary() for name, task in found.items()}
                for side, found in self.tasks.items()
            },
            "drift": self.drift.to_dict() if self.drift else None,
            "harness": self.harness,
            "relations": grouped,
            "results": {side: found.rows() for side, found in self.sides.items()},
        }


def evaluate_sides(
    editor: EditEngine,
    facts: Sequence[Fact],
    talk: Talk,
    *,
    text: str | None = None,
    base: bool = True,
    chat: ChatSettings | None = None,
    items: Sequence[Item] = (),
    prompts: str | None = None,
    harness: Sequence[str] = (),
    **asked: Any,
) -> Evaluated:
    """Evaluate the edited model, and unless `base` is False its base.

    `text`: a file for perplexity, KL and preservation. `chat`: a form in which the facts are asked,
    too. `items` are of the six tasks, `prompts` a file for the drift of hidden states, `harness`
    tasks of lm-evaluation-harness; `asked` is as for `evaluation.runner.evaluate`.
    """
    # What can't be is reported before minutes of asking.
    forms_of = forms(editor.editable, also=chat)
    subjects = {fact.subject for fact in facts}  # whose states are meant to move
    plain = editor.editable.plain.encoder
    texts = read_texts(prompts, plain, without=subjects) if prompts else []
    if harness:
        check_tasks(harness)
    both = evaluate_given(editor, facts, talk, text=text, base=base, **asked)
    found = Evaluated(**vars(both), facts=facts, asked=form_name(editor.editable.encoder))

    def more(side: str) -> None:
        if items:
            found.tasks[side] = capability(editor.editable.plain, items)
        if harness:
            found.harness[side] = harness_results(editor.model, editor.tokenizer, harness)

    if base:
        with editor.base_weights():
            more("base")
    more("edited")
    found.others.update(in_chat_as_well(editor, both))
    found.others.update(in_other_forms(editor, facts, forms_of, talk, base=base))
    return replace(found, drift=drift_report(editor, texts)) if prompts else found
