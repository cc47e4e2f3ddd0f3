"""Base and edited model on the facts of a run, and on other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from nulledit.data.corpus import Corpus
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.errors import FactError
from nulledit.evaluation.comparison import Comparison
from nulledit.evaluation.forms import form_name
from nulledit.evaluation.generation import answer_room
from nulledit.evaluation.kept_reading import base_reading, edited_reading
from nulledit.evaluation.opening import gates_of
from nulledit.evaluation.preservation import preservation_report, shipped_corpus
from nulledit.evaluation.queries import Kind, queries_of
from nulledit.evaluation.reading import read_windows
from nulledit.evaluation.runner import evaluate
from nulledit.io.text import count
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder
from nulledit.runs.talk import Talk

WINDOW = 256  # tokens
SPOKEN: tuple[Kind, ...] = ("efficacy", "forgotten")  # the fact's own prompt is answered freely


@dataclass(frozen=True)
class Text:
    """Token windows for perplexity and preservation."""

    name: str
    """What they are of."""
    windows: list[list[int]]
    """[windows, tokens]."""


def read_text(editor: EditEngine, file: str | Path | None) -> Text:
    """Windows of `file`, or of the text that comes with the package, for the editor's model."""
    return windows_of(editor.editable.encoder, file)


def windows_of(encoder: RowEncoder, file: str | Path | None) -> Text:
    """The first 40 windows of 256 tokens (or of the model's context) of a text."""
    window = min(WINDOW, encoder.max_length)
    corpus: str | Path | Corpus = file or shipped_corpus()
    return Text(text_name(file), read_windows(corpus, encoder.tokenizer, window=window))


def text_name(file: str | Path | None) -> str:
    """What a text is called where numbers on it are shown."""
    return Path(file).name if file else "the text that comes with nulledit"


def check_lengths(editor: EditEngine, facts: Sequence[Fact]) -> None:
    """Refuse what will not fit the context when it is asked, before anything is edited."""
    for fact, whole in product(facts, editor.editable.encoder.forms):
        room = answer_room(whole, fact)
        for probe in fact.other_relations:
            try:
                whole.encode(probe.prompt)
            except FactError as error:
                raise FactError(f"fact {fact.id}, other_relations: {error}") from error
        for query in queries_of(fact):
            answer = max(query.said, key=len)
            size = len(f"{query.prompt} {answer}".encode())
            if not whole.chat and size < whole.max_length - room:
                continue  # tokens are at least a byte long
            try:
                whole.encode(query.prompt, target=answer)
                if query.kind in SPOKEN:
                    whole.leaving(room).encode(query.prompt)
            except FactError as error:
                raise FactError(f"fact {fact.id}, {query.kind}: {error}") from error


def evaluate_given(
    editor: EditEngine,
    facts: Sequence[Fact],
    talk: Talk,
    *,
    text: str | Path | None = None,
    **asked: Any,
) -> Comparison:
    """`evaluate_both` on facts and on the text of a file, once all of them are known to fit.

    `text`: left out, the one that comes with nulledit.
    """
    windows = read_text(editor, text)
    check_lengths(editor, facts)
    talk.say(f"Evaluating {count(len(facts), 'fact')}, perplexity on {windows.name}")
    return evaluate_both(editor, facts, windows, talk, **asked)


def evaluate_both(
    editor: EditEngine,
    facts: Sequence[Fact],
    text: Text | None,
    talk: Talk,
    *,
    model: EditableModel | None = None,
    base: bool = True,
    **asked: Any,
) -> Comparison:
    """The base model and the edited one on the same facts, and on `text` where there is one.

    `model`: the editor's, asked in another form. `base=False`: only the edited one. `asked`: what
    else is, as for `evaluation.evaluate`.
    """
    windows, model = text.windows if text else None, model or editor.editable
    before = None
    if base:
        with talk.progress("before: ") as tell:
            stage = partial(tell, "perplexity") if tell else None
            read = base_reading(editor, windows, progress=stage) if windows else None
            with editor.base_weights():
                before = evaluate(
                    model, facts, windows=windows, reading=read, progress=tell, **asked
                )
    gates = gates_of(editor.weights)
    with talk.progress("after: ") as tell:
        reading = None
        if windows and before and before.reading:
            stage = partial(tell, "perplexity") if tell else None
            reading = edited_reading(editor, windows, before.reading, gates=gates, progress=stage)
        after = evaluate(
            model,
            facts,
            windows=windows,
            reading=reading,
            base=before,
            gates=gates,
            progress=tell,
            **asked,
        )
    kept = preservation_report(editor, windows) if windows and editor.history.epochs else []
    return Comparison(before, after, text.name if text else "", tuple(kept))


def in_chat_as_well(editor: EditEngine, both: Comparison) -> dict[str, dict[str, Any]]:
    """What `in_other_forms` gives of the form beside the editor's own, which is asked anyway."""
    beside, sides = editor.editable.encoder.beside, {"before": both.before, "after": both.after}
    if beside is None:
        return {}
    told = {n: side.beside.summary() for n, side in sides.items() if side and side.beside}
    return {form_name(beside): told}


def in_other_forms(
    editor: EditEngine,
    facts: Sequence[Fact],
    asked: Mapping[str, EditableModel],
    talk: Talk,
    *,
    base: bool = True,
) -> dict[str, dict[str, Any]]:
    """Name of a form -> "before" and "after": summaries of the same facts asked in it.

    `base=False`: only "after".
    """
    found = {}
    for name, model in asked.items():
        talk.say(f"Asking {name}")
        found[name] = evaluate_both(editor, facts, None, talk, model=model, base=base).summary()
    return found
