"""What `edit`, `evaluate` and `ask` do with a run: load it, and measure base and edited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.cli.common import Bars, say
from nulledit.cli.options import model_source
from nulledit.config import Placement
from nulledit.data.corpus import Corpus
from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor
from nulledit.errors import FactError, LedgerError
from nulledit.evaluation.generation import answer_room
from nulledit.evaluation.preservation import shipped_corpus
from nulledit.evaluation.queries import Kind, queries_of
from nulledit.evaluation.reading import read_windows
from nulledit.evaluation.runner import Evaluation, evaluate
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import load_model
from nulledit.models.tokens import RowEncoder
from nulledit.parallel.ranks import Ranks

WINDOW = 256  # tokens
SPOKEN: tuple[Kind, ...] = ("efficacy", "forgotten")  # the fact's own prompt is answered freely


@dataclass(frozen=True)
class Text:
    """Token windows for perplexity and preservation."""

    name: str
    """What they are of."""
    windows: list[list[int]]
    """[windows, tokens]."""


def load_asked(
    name: str, given: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, loaded as `MODEL_OPTIONS` say."""
    return load_model(
        model_source(name),
        device=given["device"],
        dtype=given["dtype"],
        quantize=given["quantize"] or "",
        trust_remote_code=given["trust_remote_code"],
    )


def load_run(
    folder: str | Path,
    device: str | Placement | None,
    *,
    quiet: bool,
    trust_remote_code: bool = False,
    ranks: Ranks | None = None,
) -> Editor:
    """The editor of a run folder; LedgerError if there is no run."""
    folder = Path(folder)
    if not (folder / "ledger" / "ledger.db").is_file():
        raise LedgerError(f"{folder}: no run here (expected {folder / 'ledger' / 'ledger.db'})")
    say(f"Loading the model of {folder}", quiet=quiet)
    return Editor.load(folder, device=device, trust_remote_code=trust_remote_code, ranks=ranks)


def read_text(editor: Editor, file: str | None) -> Text:
    """Windows of `file`, or of the text that comes with the package, for the editor's model."""
    return windows_of(editor.editable.encoder, file)


def windows_of(encoder: RowEncoder, file: str | None) -> Text:
    """The first 40 windows of 256 tokens (or of the model's context) of a text."""
    window = min(WINDOW, encoder.max_length)
    corpus: str | Corpus = file or shipped_corpus()
    name = Path(file).name if file else "the text that comes with nulledit"
    return Text(name, read_windows(corpus, encoder.tokenizer, window=window))


def check_lengths(editor: Editor, facts: Sequence[Fact]) -> None:
    """Refuse what will not fit the context when it is asked, before anything is edited."""
    whole = editor.editable.encoder
    for fact in facts:
        room = answer_room(whole, fact)
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


def evaluate_both(
    editor: Editor, facts: Sequence[Fact], text: Text | None, *, quiet: bool
) -> tuple[Evaluation, Evaluation]:
    """The base model and the edited one on the same facts."""
    windows = text.windows if text else None
    with Bars(quiet=quiet, prefix="before: ") as bars, editor.base_weights():
        before = evaluate(editor.editable, facts, windows=windows, progress=bars)
    with Bars(quiet=quiet, prefix="after: ") as bars:
        after = evaluate(
            editor.editable, facts, windows=windows, base=before.reading, progress=bars
        )
    return before, after


def in_other_forms(
    editor: Editor,
    facts: Sequence[Fact],
    asked: Mapping[str, EditableModel],
    *,
    base: bool = True,
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """Name of a form -> "before" and "after": summaries of the same facts asked in it.

    `base=False`: only "after".
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in asked}
    for name, model in asked.items():
        say(f"Asking {name}", quiet=quiet)
        if base:
            with Bars(quiet=quiet, prefix="before: ") as bars, editor.base_weights():
                before = evaluate(model, facts, progress=bars)
            found[name]["before"] = before.summary()
        with Bars(quiet=quiet, prefix="after: ") as bars:
            after = evaluate(model, facts, progress=bars)
        found[name]["after"] = after.summary()
    return found
