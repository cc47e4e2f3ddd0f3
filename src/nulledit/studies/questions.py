"""What models are asked in studies; every answer is kept by a hash of all that decides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.capability import capability
from nulledit.evaluation.drift import drift, read_states
from nulledit.evaluation.fluency import write_texts
from nulledit.evaluation.reading import Reading
from nulledit.evaluation.runner import evaluate
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.stream import Stream, StreamPlan

Facts = Sequence[Fact]
Asked = tuple[Mapping[str, Any], Callable[[EditEngine], Any]]
"""Everything that decides an answer besides stream and checkpoint, and what gives the answer, plain
data, of an editor's model as it is."""


@dataclass(frozen=True)
class Question:
    """One thing that a model is asked at checkpoints, and that is kept beside its stream."""

    name: str
    """Of the answer, in a spot's `found`, and of its files."""
    ask: Callable[[Lab, StreamPlan, Facts], Asked]
    """What is asked of a stream about facts."""
    about: Callable[[Lab, Facts], Facts] = lambda lab, facts: facts
    """Which of the facts so far it is about; not asked where they are none."""
    of_base: bool = True
    """Whether the unedited model is asked, too."""
    last: bool = False
    """Whether it is asked at the last checkpoint only."""
    work: Callable[[int], Mapping[str, int]] = lambda facts: {}
    """Facts that it is about -> what one answer adds to the fields of `Work`."""

    def answer(self, lab: Lab, plan: StreamPlan, at: int, stream: Stream | None = None) -> Any:
        """What the stream's model at checkpoint `at`, or without a stream the unedited one, says.

        None if it is not asked: there is nothing that it is about.
        """
        facts = self.about(lab, plan.facts[:at])
        if not facts:
            return None
        settings, ask = self.ask(lab, plan, facts)
        if stream is None:
            return lab.of_unedited(self.name, settings, ask)
        lab.tell(f"{plan.label}: {self.name} at {at}")
        return stream.measure(at, self.name, settings, ask)


def hashed(facts: Facts) -> dict[str, Any]:
    """What names facts among the things that decide an answer."""
    return {"facts": hash_of([fact.to_dict() for fact in facts])}


def told(reading: Reading) -> dict[str, Any]:
    """Perplexity and KL of a reading as plain data."""
    kl = reading.kl
    return {"perplexity": asdict(reading.perplexity), "kl": kl and asdict(kl)}


def _evaluate(lab: Lab, plan: StreamPlan, facts: Facts, generate: bool = False) -> Asked:
    def ask(editor: EditEngine) -> Any:
        base = None
        if any(fact.other_relations for fact in facts):
            with editor.base_weights():
                base = evaluate(editor.editable, facts, generate=False)
        return evaluate(editor.editable, facts, generate=generate, base=base).rows()

    return {**hashed(facts), "generate": generate}, ask


def _write(lab: Lab, plan: StreamPlan, facts: Facts) -> Asked:
    def write(editor: EditEngine) -> Any:
        said = write_texts(editor.editable, facts, seed=lab.seed)
        return {"fluency": said.fluency, "texts": {k: list(v) for k, v in said.texts.items()}}

    return {**hashed(facts), "seed": lab.seed}, write


def _read(lab: Lab, plan: StreamPlan, facts: Facts) -> Asked:
    def read(editor: EditEngine) -> Any:
        base = lab.base_reading(editor)
        return told(base if editor is lab.bench.base else lab.read(editor, base))

    return {"windows": hash_of(lab.windows())}, read


def _update_shares(editor: EditEngine) -> Any:
    weights, shares = editor.weights, {}
    for layer in editor.recipe.layers:
        shares[str(layer)] = weights.edit(layer).norm / float(weights.base(layer).norm())
    return shares


def _tasks(lab: Lab, plan: StreamPlan, facts: Facts) -> Asked:
    items = lab.items()
    settings = {"items": hash_of([[item.id, dict(item.record)] for item in items])}
    return settings, lambda e: {t: r.to_dict() for t, r in capability(e.editable, items).items()}


def _drift(lab: Lab, plan: StreamPlan, facts: Facts) -> Asked:
    """After the base recipe's last layer, wherever arms edit, the middle one and the final one."""
    rows, depth = lab.prompts(facts), lab.bench.model.depth
    layers = sorted({lab.recipe.layers[-1], depth // 2, depth - 1})

    def moved(editor: EditEngine) -> Any:
        with editor.base_weights():
            base = read_states(editor.editable, rows, layers)
        found = drift(base, read_states(editor.editable, rows, layers))
        return {**found.to_dict(), "points": list(found.rows())}

    return {"rows": hash_of([list(row) for row in rows]), "layers": layers}, moved


def _first(setting: str) -> Callable[[Lab, Facts], Facts]:
    return lambda lab, facts: facts[: lab.settings.get(setting, 0)]


def _bare(lab: Lab, facts: Facts) -> Facts:
    return [fact.bare for fact in facts]


def _with_text(lab: Lab, facts: Facts) -> Facts:
    return facts if lab.sources.text else ()


FACTS = Question("facts", _evaluate, work=lambda n: {"asked": n})
"""Every measure of the facts so far."""
OWN_PROMPTS = replace(FACTS, about=_bare, work=lambda n: {"asked": n // 4})
"""The same of the facts' own prompts only."""
_SPEAK = partial(_evaluate, generate=True)
SPOKEN = Question("spoken", _SPEAK, _first("answers"), last=True, work=lambda n: {"written": n})
"""What the model says by itself, of the first `answers` facts."""
FLUENCY = Question(
    "fluency", _write, _first("fluency"), last=True, work=lambda n: {"written": 8 * n}
)
"""Longer texts about the first `fluency` facts."""
TEXT = Question("text", _read, _with_text, work=lambda n: {"perplexities": 1})
"""Perplexity of the text, if there is one, and KL from the unedited model."""
NORMS = Question("norms", lambda lab, plan, facts: ({}, _update_shares), of_base=False)
"""‖Δ‖/‖W₀‖ by layer."""
TASKS = Question("capability", _tasks, work=lambda n: {"capabilities": 1})
"""Task -> its result, with items."""
DRIFT = Question("drift", _drift, of_base=False, last=True, work=lambda n: {"drifts": 1})
"""How far hidden states of other text moved, and the points of its picture."""
EVERYTHING = (FACTS, SPOKEN, FLUENCY, TEXT, NORMS)
"""What most studies ask."""
