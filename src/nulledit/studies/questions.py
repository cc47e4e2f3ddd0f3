"""What models are asked in studies; every answer is kept by a hash of all that decides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor
from nulledit.evaluation.capability import capability
from nulledit.evaluation.drift import drift, read_states
from nulledit.evaluation.fluency import write_texts
from nulledit.evaluation.reading import Reading
from nulledit.evaluation.runner import evaluate
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.stream import Stream, StreamPlan

Facts = Sequence[Fact]
Decides = Callable[[Lab, StreamPlan, Facts], Mapping[str, Any]]
Ask = Callable[[Lab, StreamPlan, Facts, Editor], Any]


@dataclass(frozen=True)
class Question:
    """One thing that a model is asked at checkpoints, and that is kept beside its stream."""

    name: str
    """Of the answer, in a spot's `found`."""
    decides: Decides
    """Everything that decides the answer besides stream and checkpoint."""
    ask: Ask
    """The answer, plain data, of the editor's model as it is."""
    about: Callable[[Lab, Facts], Facts] = lambda lab, facts: facts
    """Which of the facts so far it is about; not asked where they are none."""
    kept_as: str = ""
    """Name of its files, if it is not its own."""
    of_base: bool = True
    """Whether the unedited model is asked, too."""
    last: bool = False
    """Whether it is asked at the last checkpoint only."""
    before: bool = False
    """Whether the stream's model is asked before its edits, at the last checkpoint."""
    source: str = ""
    """File without which it is not asked."""
    work: Callable[[int], Mapping[str, float]] = lambda facts: {}
    """Facts that it is about -> what one answer adds to the fields of `Work`."""

    def facts(self, lab: Lab, so_far: Facts) -> Facts:
        """The facts that it is about; none if it is not asked here."""
        asked = not self.source or getattr(lab.sources, self.source) is not None
        return self.about(lab, so_far) if asked else ()

    def answer(self, lab: Lab, plan: StreamPlan, at: int, stream: Stream | None = None) -> Any:
        """What the stream's model at checkpoint `at`, without a stream the unedited one, answers.

        None if it is not asked. The unedited model is asked about all that the stream's first
        `at` facts are.
        """
        facts = self.facts(lab, plan.facts[:at])
        if not facts:
            return None
        name, settings = self.kept_as or self.name, self.decides(lab, plan, facts)

        def ask(editor: Editor) -> Any:
            return self.ask(lab, plan, facts, editor)

        if stream is None:
            return lab.of_unedited(name, settings, ask)
        lab.tell(f"{plan.label}: {name} at {at}")
        return stream.measure(0 if self.before else at, name, settings, ask)


def _hashed(lab: Lab, plan: StreamPlan, facts: Facts) -> dict[str, Any]:
    return {"facts": hash_of([fact.to_dict() for fact in facts])}


def _evaluation(generate: bool) -> dict[str, Any]:
    def decides(lab: Lab, plan: StreamPlan, facts: Facts) -> Mapping[str, Any]:
        return {**_hashed(lab, plan, facts), "generate": generate}

    def ask(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
        return evaluate(editor.editable, facts, generate=generate).rows()

    return {"decides": decides, "ask": ask, "kept_as": "facts"}


def first(setting: str) -> Callable[[Lab, Facts], Facts]:
    """As many of the facts as a setting says; none without it."""
    return lambda lab, facts: facts[: lab.settings.get(setting, 0)]


def _bare(lab: Lab, facts: Facts) -> Facts:
    return [replace(f, paraphrases=(), neighbours=(), portability=()) for f in facts]


def _write(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
    said = write_texts(editor.editable, facts, seed=lab.seed)
    return {"fluency": said.fluency, "texts": {k: list(v) for k, v in said.texts.items()}}


def told(reading: Reading) -> dict[str, Any]:
    """Perplexity and KL of a reading as plain data."""
    kl = reading.kl
    return {"perplexity": asdict(reading.perplexity), "kl": kl and asdict(kl)}


def _read(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
    base = lab.base_reading(editor)
    return told(base if editor is lab.bench.base else lab.read(editor, base))


def _update_shares(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
    """‖Δ‖/‖W₀‖ by layer."""
    weights, shares = editor.weights, {}
    for layer in editor.recipe.layers:
        base = weights.base(layer)
        shares[str(layer)] = float((weights.exact(layer).cpu() - base).norm() / base.norm())
    return shares


def _items(lab: Lab, plan: StreamPlan, facts: Facts) -> Mapping[str, Any]:
    return {"items": hash_of([[item.id, dict(item.record)] for item in lab.items()])}


def _tasks(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
    found = capability(editor.editable, lab.items())
    return {task: result.to_dict() for task, result in found.items()}


def _drift_layers(lab: Lab) -> list[int]:
    """The base recipe's last layer, wherever arms edit, the middle one and the final one."""
    depth = lab.bench.model.depth
    return sorted({lab.recipe.layers[-1], depth // 2, depth - 1})


def _drift_rows(lab: Lab, plan: StreamPlan, facts: Facts) -> Mapping[str, Any]:
    rows = lab.prompts(facts)
    return {"rows": hash_of([list(row) for row in rows]), "layers": _drift_layers(lab)}


def _drift(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
    rows, layers = lab.prompts(facts), _drift_layers(lab)
    with editor.base_weights():
        base = read_states(editor.editable, rows, layers)
    found = drift(base, read_states(editor.editable, rows, layers))
    return {**found.to_dict(), "points": list(found.rows())}


FACTS = Question("facts", **_evaluation(False), work=lambda n: {"asked": n})
"""Every measure of the facts so far."""
OWN_PROMPTS = replace(FACTS, about=_bare, work=lambda n: {"asked": n / 4})
"""The same of the facts' own prompts only."""
SPOKEN = Question(
    "spoken", **_evaluation(True), about=first("answers"), last=True, work=lambda n: {"written": n}
)
"""What the model says by itself, of the first `answers` facts."""
FLUENCY = Question(
    "fluency",
    decides=lambda lab, plan, facts: {**_hashed(lab, plan, facts), "seed": lab.seed},
    ask=_write,
    about=first("fluency"),
    last=True,
    work=lambda n: {"written": 8 * n},
)
"""Longer texts about the first `fluency` facts."""
TEXT = Question(
    "text",
    decides=lambda lab, plan, facts: {"windows": hash_of(lab.windows())},
    ask=_read,
    source="text",
    work=lambda n: {"perplexities": 1},
)
"""Perplexity of the text, and KL from the unedited model."""
NORMS = Question("norms", lambda lab, plan, facts: {}, _update_shares, of_base=False)
"""‖Δ‖/‖W₀‖ by layer."""
TASKS = Question("capability", _items, _tasks, work=lambda n: {"capabilities": 1})
"""Task -> its result, with items."""
DRIFT = Question(
    "drift", _drift_rows, _drift, of_base=False, last=True, work=lambda n: {"drifts": 1}
)
"""How far hidden states of other text moved, and the points of its picture."""
EVERYTHING = (FACTS, SPOKEN, FLUENCY, TEXT, NORMS)
"""What most studies ask."""
