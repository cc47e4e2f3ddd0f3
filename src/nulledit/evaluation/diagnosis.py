"""Why a fact does not hold, from what the run knows: one line a fact, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nulledit.data.facts import Fact, quote
from nulledit.editing.engine import EditEngine
from nulledit.editing.gates import TELL_APART, FactGate, fact_gates
from nulledit.evaluation.generation import contains, loops
from nulledit.evaluation.runner import Evaluation, holds
from nulledit.io.text import count
from nulledit.ledger.records import Column
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import Row

NEAR_KEY = 0.9  # cosine of keys above which one edit speaks at the other's subject
RETRY = "nulledit retry RUN"


@dataclass(frozen=True)
class Slip:
    """The first token of a target that is not the likeliest one."""

    place: int
    """Its number in the target, from 0."""
    wanted: str
    """The token's text."""
    said: str
    """The text of the token that is likeliest in its place."""
    rank: int
    """Of the wanted token, by likelihood; 1 is the likeliest."""
    short: float
    """Nats that it lacks to be the likeliest."""


@dataclass(frozen=True)
class Cause:
    """One reason why a fact does not hold."""

    name: str
    """chat, steps, clamp, patience, mean, solve, key, near key, gate, first token, silent, loops
    or wording."""
    text: str
    """In words."""


@dataclass(frozen=True)
class Diagnosis:
    """What is known about a fact that does not hold."""

    fact_id: str
    """Which one."""
    slip: Slip | None
    """Where its target breaks off; None where every token is the likeliest."""
    causes: tuple[Cause, ...]
    """Most likely first; empty where nothing that was recorded explains it."""
    remedy: str
    """What to do; RUN stands for the run's folder."""

    @property
    def line(self) -> str:
        """The whole in one line, without the id."""
        parts = [] if self.slip is None else [_broken(self.slip)]
        parts += [cause.text for cause in self.causes]
        return f"{'; '.join(parts) or 'not explained by what was recorded'}: {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"line": self.line}


def diagnose(
    editor: EditEngine,
    facts: Sequence[Fact],
    after: Evaluation,
    *,
    before: Evaluation | None = None,
) -> tuple[Diagnosis, ...]:
    """A diagnosis for each of `facts` that does not hold in the evaluation `after`.

    The editor's model must be as it was evaluated, with the facts in it. With the base's evaluation
    `before`, facts at which the base says nothing are told from others. Facts to forget are left
    out: `nulledit forget` says what leaks. What holds as plain text is looked into in chat.
    """
    rows = after.rows()
    failing = [f for f in facts if not f.forget and f.id in rows and not holds(rows[f.id])]
    columns: dict[str, list[Column]] = {}
    for column in editor.history.active:
        columns.setdefault(column.fact.id, []).append(column)
    gates = {gate.fact_id: gate for gate in fact_gates(editor.weights)} if failing else {}
    model, found = editor.editable, []
    for fact in failing:
        told = editor, fact, columns.get(fact.id, []), gates.get(fact.id)
        beside = model.encoder.beside
        if after.beside and beside and holds(rows[fact.id] | {"in_chat": None}):
            then = before.beside if before else None
            found.append(_diagnosis(*told, model.asked(beside), after.beside, then, beside=True))
        else:
            found.append(_diagnosis(*told, model, after, before))
    return tuple(found)


def _diagnosis(
    editor: EditEngine,
    fact: Fact,
    columns: Sequence[Column],
    gate: FactGate | None,
    model: EditableModel,
    after: Evaluation,
    before: Evaluation | None,
    *,
    beside: bool = False,
) -> Diagnosis:
    """Of a fact that does not hold in `model`'s form, evaluated so; `beside`: but in the other."""
    row = model.encoder.encode_template(fact.prompt, fact.subject, target=fact.target)
    slip = first_slip(model, row)
    causes: list[Cause] = []
    if beside:
        causes.append(Cause("chat", "holds as plain text; in chat this is what happens"))
    if row.subject_last == 0:
        causes.append(
            Cause("first token", "its subject is the text's first token, an attention sink")
        )
    if before is not None and before.answers.get(fact.id) == "":
        causes.append(Cause("silent", "the base says nothing after this prompt"))
    if slip is None:
        causes += _spoken(fact, after.answers.get(fact.id, ""))
    else:
        causes += _shared(editor, columns, gate)
        causes += _value(editor, columns)
    return Diagnosis(fact.id, slip, tuple(causes), _remedy({cause.name for cause in causes}))


def first_slip(model: EditableModel, row: Row) -> Slip | None:
    """Where the target of `row` breaks off in the model as it is; None if it does not."""
    batch = model.collate([row.ids[:-1]])
    with frozen(model.model), torch.no_grad():
        normed = model.run_normed(batch)[0, row.target_start - 1 :]
        logits = model.logits(normed).double().cpu()  # [target tokens, vocabulary]
    for place, (wanted, scores) in enumerate(zip(row.target_ids, logits, strict=True)):
        said = int(scores.argmax())
        if said != wanted:
            return Slip(
                place,
                _text(model, wanted),
                _text(model, said),
                rank=1 + int((scores > scores[wanted]).sum()),
                short=float(scores[said] - scores[wanted]),
            )
    return None


def _text(model: EditableModel, token: int) -> str:
    return str(model.tokenizer.decode([token])) or str(model.tokenizer.convert_ids_to_tokens(token))


def _broken(slip: Slip) -> str:
    """Where the target breaks off, in words."""
    where = "first token" if slip.place == 0 else f"token {slip.place + 1}"
    return (
        f"says {quote(slip.said)} where {quote(slip.wanted)} should stand ({where}, rank "
        f"{slip.rank}, {slip.short:.1f} nats short)"
    )


def _spoken(fact: Fact, answer: str) -> list[Cause]:
    """Why an answer whose every token is the likeliest does not count."""
    if any(contains(answer, said) and loops(answer, said) for said in fact.answers):
        return [Cause("loops", "says the target, then repeats itself")]
    return [
        Cause("wording", "every token of the target is likeliest, its own words read otherwise")
    ]


def _shared(editor: EditEngine, columns: Sequence[Column], gate: FactGate | None) -> list[Cause]:
    """Other facts on the same key, or nearly; of gated edits, on each other's gates."""
    mine = {c.id for c in columns}
    groups = {(c.batch, c.group) for c in columns}
    others = [c for c in editor.history.active if c.id not in mine]
    same = sorted({c.fact.id for c in others if (c.batch, c.group) in groups} - _ids(columns))
    if same:
        return [Cause("key", f"one value must say it and {_names(same)}, on the same key")]
    if gate is not None:
        return [_crowded(gate)] if gate.crowded else []
    found = editor.weights.near(columns, others, cosine=NEAR_KEY)
    if not found:
        return []
    column, cosine = found[0]
    return [Cause("near key", f"its key is nearly that of {column.fact.id} (cosine {cosine:.3f})")]


def _crowded(gate: FactGate) -> Cause:
    return Cause(
        "gate",
        f"its gate and that of {gate.rival} open on each other's facts (share {gate.share:.2f}), "
        f"so {100 * gate.missed:.0f} % of its value is missed",
    )


def _value(editor: EditEngine, columns: Sequence[Column]) -> list[Cause]:
    """What the value itself lacked, by the recorded outcome of the weakest of `columns`."""
    told = [c.outcome for c in columns if c.outcome.lead is not None]
    if not told:
        return []
    outcome = min(told, key=lambda o: o.lead or 0.0)
    lead, updates = outcome.lead or 0.0, count(outcome.steps or 0, "update")
    if lead > 0:
        return [Cause("solve", "its value says it, the weights took up too little of it")]
    short = f"its value is {-lead:.1f} nats short"
    if outcome.clamped:
        share = outcome.delta_share or 0.0
        return [Cause("clamp", f"{short} at the clamp (‖δ‖ = {share:.2f}‖h‖, {updates})")]
    reasons = {
        "steps": Cause("steps", f"{short} when its steps were used up ({updates})"),
        "patience": Cause("patience", f"{short} and gained too little to go on (values.patience)"),
        "done": Cause("mean", f"{short} though its mean loss was small (values.stop_margin)"),
    }
    return [reasons[outcome.ended]] if outcome.ended in reasons else []


def _remedy(causes: set[str]) -> str:
    """What helps, by the names of the causes."""
    if "first token" in causes:
        return "put words before the subject"
    if "silent" in causes:
        return "ask it in the chat template (--chat), or word the prompt as text that goes on"
    if "key" in causes or "near key" in causes:
        return f"{RETRY}, or a prompt in which the subject comes later"
    if "gate" in causes:
        return TELL_APART
    if "loops" in causes:
        return "end the target as a sentence ends, with a full stop"
    if "wording" in causes:
        return "compare the answer with the target"
    return RETRY


def _ids(columns: Sequence[Column]) -> set[str]:
    return {c.fact.id for c in columns}


def _names(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
