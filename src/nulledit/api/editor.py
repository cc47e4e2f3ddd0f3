"""`Editor`: the engine of `editing`, with what evaluation, runs and exports do with its edits.

Each method is the command of the same name, by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nulledit.config import ChatSettings
from nulledit.data.readers import Facts, as_facts
from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.editing.reports import EditReport
from nulledit.errors import LedgerError
from nulledit.evaluation.asking import MOST_TOKENS, Answer, Heard
from nulledit.evaluation.asking import ask as ask_both
from nulledit.evaluation.comparison import Comparison
from nulledit.evaluation.forgetting import with_answers
from nulledit.evaluation.runner import Judge
from nulledit.export.updates import Export
from nulledit.export.write import DEFAULT, Experts, Kind, write_export
from nulledit.ledger.records import History
from nulledit.ledger.store import Store
from nulledit.runs.diff import Difference, columns_at, difference, read_state
from nulledit.runs.gate import check as check_limits
from nulledit.runs.gate_report import GateReport
from nulledit.runs.history import events_of, facts_in, story_of
from nulledit.runs.limits import Limits, load_limits
from nulledit.runs.measure import evaluate_given, read_text
from nulledit.runs.preview import Preview
from nulledit.runs.preview import preview as preview_of
from nulledit.runs.talk import Told
from nulledit.runs.verify import Verification
from nulledit.runs.verify import verify as verify_folder


class Editor(EditEngine):
    """Edits a causal language model in place, remembers how, and answers for it."""

    def ask(
        self,
        prompt: str,
        target: str | None = None,
        *,
        max_tokens: int = MOST_TOKENS,
        chat: bool | ChatSettings | None = None,
        heard: Heard | None = None,
    ) -> Answer:
        """Ask `prompt` of the base and of the edited model, greedily, up to a newline.

        `target`: a text whose probability per token is asked for as well. `chat`: asked in the chat
        template (True, or its settings) or as plain text (False); left out, as facts are edited.
        `heard` receives a side (`edited`, then `base`) and its answer so far, after every token.
        """
        settings = self.recipe.chat if chat is None else chat
        if isinstance(settings, bool):
            settings = ChatSettings() if settings else None
        model = self.editable.in_chat(settings)
        return ask_both(
            self, prompt, target=target, max_tokens=max_tokens, model=model, heard=heard
        )

    def forget(
        self,
        facts: Facts,
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> EditReport:
        """Suppress the targets of `facts`, with nothing in their place (docs/forget.md).

        The answer of a mapping without a target is what an edit in the model wrote, else what the
        base says. An edit like any other: an earlier answer to the same question leaves, undo takes
        it back.
        """
        asked = with_answers(self, facts)
        return super().forget(asked, batch_size=batch_size, progress=progress)

    def evaluate(
        self,
        facts: Facts | None = None,
        *,
        text: str | Path | None = None,
        base: bool = True,
        distract: bool = False,
        fluency: bool = False,
        references: Mapping[str, Sequence[str]] | None = None,
        judge: Judge | None = None,
        progress: Progress | None = None,
    ) -> Comparison:
        """Evaluate the base and the edited model: rates, answers, perplexity and KL, with errors.

        `facts`: as for `edit`; left out, those in the model. `text`: a file for perplexity, KL and
        preservation; left out, the one that comes with nulledit. `base=False`: only the edited
        model. The others are as for `nulledit.evaluate`. Nothing is changed.
        """
        asked = self.facts if facts is None else as_facts(facts).facts
        return evaluate_given(
            self,
            asked,
            Told(progress),
            text=text,
            base=base,
            distract=distract,
            fluency=fluency,
            references=references,
            judge=judge,
        )

    def check(
        self,
        limits: Limits | str | Path = "default",
        *,
        text: str | Path | None = None,
        tasks: str | Path | None = None,
        progress: Progress | None = None,
    ) -> GateReport:
        """Compare the edited model with its base against `limits`; `report.passed` if all hold.

        `limits`: as `load_limits` gives them, a file, or the shipped "default". `text`: a file for
        perplexity and KL; left out, the one that comes with nulledit. `tasks`: the folder of the
        six tasks. Only what the limits ask for is measured.
        """
        asked = limits if isinstance(limits, Limits) else load_limits(limits)
        windows = read_text(self, text).windows if asked.needs("text") else None
        return check_limits(self, asked, windows=windows, tasks=tasks, progress=progress)

    def preview(
        self,
        facts: Facts = (),
        *,
        undo: Sequence[str] = (),
        text: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Preview:
        """Edit in memory and measure what would change; model, ledger and folder stay as they are.

        `facts`: to write, as for `edit`. `undo`: ids to take out. `text`: a file for perplexity and
        KL; left out, the one that comes with nulledit. ConfigError where neither is given.
        """
        return preview_of(self, facts, undo, text=text, talk=Told(progress))

    def export(
        self,
        folder: str | Path,
        kind: Kind = DEFAULT,
        *,
        rank: int | None = None,
        dtype: str | None = None,
        max_shard_size: str | int | None = None,
        same_shape: bool | None = None,
        text: str | Path | None = None,
        gguf: str | Path | None = None,
        tensor_type: str | None = None,
        experts: Experts | None = None,
        progress: Progress | None = None,
    ) -> Export:
        """Write the edits to `folder` for others: `kind` delta, lora (PEFT), checkpoint, gguf or
        gguf-lora.

        `rank` cuts the factors of adapters and delta, `dtype` is theirs (of an adapter float32, of
        a delta what makes it exact);
        `max_shard_size` is of a checkpoint ("50GB"). Gated edits: `same_shape` has a checkpoint or
        GGUF file keep the base's shape, as an adapter does in any case; `text` is the file that
        chooses the units which neurons then stand in the place of. GGUF: `gguf` is a file of the
        base (the one that the run was begun from), `tensor_type` what edited matrices (f16) or
        factors (f32) are stored in. `experts`: whether an adapter of a mixture of experts is in
        PEFT's form ("fused") or has a pair for each expert by its name ("each"). LedgerError if
        nothing is edited or `folder` exists, ConfigError for a setting of another kind.
        """
        return write_export(
            self,
            folder,
            kind,
            rank=rank,
            dtype=dtype,
            max_shard_size=max_shard_size,
            same_shape=same_shape,
            text=text,
            gguf=gguf,
            tensor_type=tensor_type,
            experts=experts,
            run=self.folder,
            progress=progress,
        )

    def log(self) -> list[dict[str, Any]]:
        """Every event of the ledger, oldest first: what came in, what went out, when, by what."""
        return events_of(self.history)

    def show(self, id_: str | None = None) -> Any:
        """What the ledger knows of the fact `id_`, as a dict; without it, records of all facts.

        LedgerError if the ledger has no such fact.
        """
        return facts_in(self.history) if id_ is None else story_of(self.history, id_)

    def diff(
        self, other: int | str | Path | EditEngine | History, *, at: int | None = None
    ) -> Difference:
        """Compare this model with another state of the same base: facts, probabilities, norms.

        `other`: the number of an event of this ledger (0: the base), another editor or its history,
        or a run's folder (`"run@3"`: after its event 3). `at`: an event of this ledger to compare
        in the place of now. LedgerError for another base, ConfigError for no such event.
        """
        event: int | None = None
        if isinstance(other, str | Path):
            folder, event = read_state(str(other))
            theirs, name = Store(folder / "ledger").load(), str(other)
        elif isinstance(other, int):
            theirs, event, name = self.history, other, "this editor"
        else:
            theirs = other.history if isinstance(other, EditEngine) else other
            name = "the other"
        return difference(
            self,
            theirs,
            first=columns_at(self.history, at, "this editor"),
            second=columns_at(theirs, event, name),
        )

    def verify(self) -> Verification:
        """Check the folder that this editor is kept in: every hash, and the weights once more.

        The model is loaded and its weights are computed again. LedgerError for an editor that is in
        memory alone.
        """
        if self.folder is None:
            raise LedgerError("the ledger is in memory alone: save(folder) before verify()")
        return verify_folder(self.folder)
