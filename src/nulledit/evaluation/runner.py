"""One evaluation of a model on facts, and the comparison of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nulledit.data.facts import Fact, quote
from nulledit.editing.call_log import Progress
from nulledit.errors import FactError
from nulledit.evaluation.fluency import Writing, write_texts
from nulledit.evaluation.generation import fact_answers, says
from nulledit.evaluation.measures import entry, find, measured, shown
from nulledit.evaluation.opening import Gates, Opening
from nulledit.evaluation.queries import queries_of, shipped_sentences
from nulledit.evaluation.reading import Divergence, Perplexity, Reading, read
from nulledit.evaluation.relations import ByFact, kept_relations, relation_states
from nulledit.evaluation.scores import Score, per_fact, rates, score
from nulledit.evaluation.stats import Rate
from nulledit.io.notebook import frame, html_table
from nulledit.io.text import count
from nulledit.models.editable_model import EditableModel

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

CPU_POSITIONS = 512  # small chunks stay in a processor's cache
ACCELERATOR_POSITIONS = 8192
SEEN_OF_TEXT = ("perplexity", "kl", "opening_rate")
"""Entries of a summary on the text that a notebook shows."""

Judge = Callable[[str, str, str], bool]
"""Prompt, what the model said, an accepted answer -> whether that says it."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What a model, as it was, made of some facts."""

    scores: tuple[Score, ...]
    """One per query."""
    answers: dict[str, str]
    """Fact id -> what the model says by itself after the fact's prompt; empty if not asked for."""
    rates: dict[str, Rate | None]
    """Preference, strict and token rates; None where the facts lack what the measure needs."""
    generation: Rate | None
    """Share of facts of which the model says an accepted answer by itself; None if not asked."""
    perplexity: Perplexity | None
    """Of the given windows; None if there were none."""
    says_target: dict[str, bool] = field(default_factory=dict)
    """Fact id -> the judge's word on the answer; empty if not asked for. Facts to forget have
    nothing to say and are left out."""
    writing: Writing | None = None
    """Longer texts; None if not asked for."""
    kl: Divergence | None = None
    """From the base on the windows; None without windows or without a base to compare with."""
    opening: Opening | None = None
    """How often gates open on the windows; None without windows or where no gate was asked for."""
    reading: Reading | None = field(default=None, repr=False, compare=False)
    """Of the windows, by token."""
    relations: Mapping[str, ByFact] = field(default_factory=dict)
    """Measure -> fact id -> value at other relations of the subjects; empty without a base."""
    relation_states: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Prompt on another relation -> the state that predicts what follows it."""
    beside: Evaluation | None = None
    """Of the same facts in the chat template, where they are written in both forms; else None."""

    @property
    def fluency(self) -> Rate | None:
        """Entropy of longer texts, bits, over facts; None if not asked for."""
        return _rate(self.writing.fluency) if self.writing else None

    @property
    def consistency(self) -> Rate | None:
        """TF-IDF cosine of longer texts with references, over facts that have them."""
        return _rate(self.writing.consistency) if self.writing else None

    def by_fact(self) -> dict[str, Mapping[str, float]]:
        """Measure -> fact id -> value, of those that no query of an answer gives."""
        if self.writing is None:
            return dict(self.relations)
        written = {"fluency": self.writing.fluency, "consistency": self.writing.consistency}
        return {**self.relations, **written}

    def summary(self) -> dict[str, Any]:
        """Rates, generation, perplexity and KL as plain data for JSON; nan and infinity are None.

        Fluency and consistency are there if longer texts were asked for, what is kept at other
        relations if there was a base, how often gates open if there are gates.
        """
        told: dict[str, Any] = {
            "rates": {name: _plain(rate) for name, rate in self.rates.items()},
            "generation": _plain(self.generation),
            "perplexity": _plain(self.perplexity),
            "kl": _plain(self.kl),
        }
        if self.opening:
            told["opening_rate"] = _plain(self.opening)
        return told | {name: _plain(_rate(held)) for name, held in self.by_fact().items()}

    def to_dict(self) -> dict[str, Any]:
        """The summary, every answer, text and score as plain data for JSON."""
        texts = self.writing.texts if self.writing else {}
        return {
            **self.summary(),
            "answers": dict(self.answers),
            **({"texts": {i: list(found) for i, found in texts.items()}} if texts else {}),
            "scores": [_plain(item) for item in self.scores],
        }

    def values(self) -> dict[str, Mapping[str, float]]:
        """Measure -> fact id -> value, 0 to 1 but for fluency; what was not asked is left out."""
        said = {"generation": {i: float(x) for i, x in self.says_target.items()}}
        return dict(per_fact(self.scores)) | (said if self.says_target else {}) | self.by_fact()

    def rows(self) -> dict[str, dict[str, Any]]:
        """Fact id -> one value per measure, and "answer".

        Efficacy is True or False, the others are shares of the fact's prompts; None where the fact
        lacks what the measure needs. "answer", and the judge's "generation" of it, are None if
        generation was not asked for; "fluency" and "consistency" are there if they were. "in_chat"
        is there where facts are written in both forms: whether the fact holds in the template.
        """
        values: dict[str, Mapping[str, float]] = dict(per_fact(self.scores))
        values |= self.by_fact()
        rows: dict[str, dict[str, Any]] = {}
        for fact_id in dict.fromkeys(item.query.fact_id for item in self.scores):
            row: dict[str, Any] = {measure: held.get(fact_id) for measure, held in values.items()}
            for measure in ("efficacy", "efficacy_strict"):
                row[measure] = None if row[measure] is None else row[measure] == 1
            row["generation"] = self.says_target.get(fact_id)
            rows[fact_id] = {**row, "answer": self.answers.get(fact_id)}
        if self.beside:
            for fact_id, row in self.beside.rows().items():
                rows[fact_id]["in_chat"] = holds(row)
        return rows

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; ConfigError where pandas is missing."""
        return frame(self.rows(), "fact")

    def __repr__(self) -> str:
        facts = count(len({item.query.fact_id for item in self.scores}), "fact")
        return (
            f"<Evaluation of {facts}: {'; '.join(' '.join(row[:2]) for row in self._table()[:4])}>"
        )

    def _repr_html_(self) -> str:
        return html_table("Evaluation", ("measure", "", "± standard error", "n"), self._table())

    def _table(self) -> list[tuple[str, str, str, str]]:
        told = self.summary()
        names = [*measured([told]), *(n for n in SEEN_OF_TEXT if told.get(n))]
        return [(find(name).label, *shown(name, entry(told, name))) for name in names]


def evaluate(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    windows: Sequence[Sequence[int]] | None = None,
    reading: Reading | None = None,
    base: Evaluation | None = None,
    gates: Gates | None = None,
    generate: bool = True,
    judge: Judge | None = None,
    distract: bool = False,
    distractors: Sequence[str] | None = None,
    fluency: bool = False,
    references: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    beside: bool = True,
) -> Evaluation:
    """Evaluate `model`, as it is now, on `facts`.

    Facts are asked in the model's form, plain or in the chat template: `editor.editable` asks as
    they are edited, and where that is in both forms, asks plain text and, unless `beside` is False,
    the template, too. Longer texts and `windows` are plain text in any case.
    `windows` of token ids are for perplexity; `reading` is what the model makes of them, where that
    is known (`base_reading`). `base`, an evaluation of the model before its edits
    on the same windows and facts (or more facts), is what the model is compared with: KL per token
    of the windows, and what is kept at other relations of the facts' subjects. `gates` that the
    model has (`gates_of`) are watched on the windows. `judge` says
    whether an answer says the target or an alias; by default whether it contains it and does not
    loop. `distract` asks again after other texts (`queries_of`). With `fluency`, or `references`
    for consistency, the model writes longer texts, drawn by `seed` (`write_texts`). For the model
    before its edits, call this inside `with editor.base_weights():`. `progress` receives the stage
    ("scores", "answers", "texts", "perplexity"), what is done and what there is in all. Raises
    FactError for an id used twice.
    """
    _refuse_twins(facts)
    if distract and distractors is None:
        distractors = shipped_sentences()
    queries = [q for fact in facts for q in queries_of(fact, distract=distract, texts=distractors)]
    scores = score(
        model,
        queries,
        positions=model.positions(CPU_POSITIONS, ACCELERATOR_POSITIONS),
        progress=_stage(progress, "scores"),
    )
    said = fact_answers(model, facts, _stage(progress, "answers")) if generate else []
    answers = dict(zip((fact.id for fact in facts), said, strict=generate))
    says = _judged(facts, answers, judge or _contained)
    writing = None
    if fluency or references is not None:
        stage = _stage(progress, "texts")
        writing = write_texts(model, facts, references=references, seed=seed, progress=stage)
    if windows and reading is None:
        stage = _stage(progress, "perplexity")
        read_by_base = base.reading if base else None
        reading = read(
            model, windows, base=read_by_base, keep=base is None, gates=gates, progress=stage
        )
    at_relations = relation_states(model, facts)
    form = model.encoder.beside if beside else None
    in_chat = None
    if form:
        told = progress and (lambda stage, *done: progress(f"{stage} in chat", *done))
        asked = model.asked(form)
        in_chat = evaluate(asked, facts, generate=generate, judge=judge, progress=told)
    return Evaluation(
        scores=tuple(scores),
        answers=answers,
        rates=rates(scores),
        generation=_rate(says),
        perplexity=reading.perplexity if reading else None,
        says_target=says,
        writing=writing,
        kl=reading.kl if reading else None,
        opening=reading.opening if reading else None,
        reading=reading,
        relations=kept_relations(model, facts, base.relation_states, at_relations) if base else {},
        relation_states=at_relations,
        beside=in_chat,
    )


def holds(row: Mapping[str, Any]) -> bool:
    """Whether a fact holds, by its row of `Evaluation.rows`.

    The model says its target by itself, without looping; where it was not asked to speak, every
    token of the target is the likeliest one. A fact to forget holds if its answer is gone. A fact
    that is written in both forms has to hold in both.
    """
    if row.get("in_chat") is False:
        return False
    if row.get("forgotten_strict") is not None:
        return bool(row["forgotten_strict"] == 1)
    said = row.get("generation")
    return bool(row.get("efficacy_strict") if said is None else said)


def _refuse_twins(facts: Sequence[Fact]) -> None:
    ids = [fact.id for fact in facts]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise FactError(f"two facts have the id {quote(twice)}: results are kept by id")


def _judged(facts: Sequence[Fact], answers: Mapping[str, str], judge: Judge) -> dict[str, bool]:
    return {
        fact.id: any(
            judge(fact.render(fact.prompt), answers[fact.id], right) for right in fact.answers
        )
        for fact in facts
        if fact.id in answers and not fact.forget
    }


def _contained(prompt: str, answer: str, target: str) -> bool:
    return says(answer, target)


def _rate(values: Mapping[str, float]) -> Rate | None:
    return Rate.of([float(value) for value in values.values()]) if values else None


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return partial(progress, name) if progress else None


def _plain(value: Any) -> Any:
    """A result dataclass (or None) as plain data, with None for numbers that are not finite."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return None if value is None else clean(asdict(value))
