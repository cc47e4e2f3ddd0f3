"""What every study works with: a model, data, and measures that are asked once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.data.readers import read_facts
from nulledit.editing.editor import Editor
from nulledit.errors import ConfigError
from nulledit.evaluation.capability import capability
from nulledit.evaluation.drift import drift, edited_token_norm, read_states, read_texts
from nulledit.evaluation.fluency import write_texts
from nulledit.evaluation.reading import Reading, read, read_windows
from nulledit.evaluation.runner import evaluate
from nulledit.evaluation.tasks import Item, read_tasks
from nulledit.io.files import write_text
from nulledit.io.jsonfiles import as_json
from nulledit.studies.scale import Scale
from nulledit.studies.stream import MEASURES, Progress, Stream, StreamPlan, Workbench, shuffled

WINDOW = 256


@dataclass(frozen=True)
class Sources:
    """Files that a user gave; a study says which it needs."""

    facts: str | None = None
    """CounterFact, or any facts with old answers, paraphrases and neighbours."""
    zsre: str | None = None
    """zsRE."""
    text: str | None = None
    """For perplexity; statistics should not have seen it."""
    corpus: str | None = None
    """Preserved text to make statistics of (study corpus)."""
    capability: str | None = None
    """Folder of the six tasks."""
    prompts: str | None = None
    """Prompts or text for the drift of hidden states."""

    def need(self, name: str) -> str:
        """The file called `name`; ConfigError with the option to give if there is none."""
        found = getattr(self, name)
        if found is None:
            raise ConfigError(f"this study needs --{name}: {SOURCE_HELP[name]}")
        if not Path(found).exists():
            raise ConfigError(f"--{name} {found}: no such file or folder")
        return str(found)


SOURCE_HELP = {
    "facts": "facts with old answers, paraphrases and neighbours, such as CounterFact",
    "zsre": "zsRE records",
    "text": "a text for perplexity that the statistics have not seen",
    "corpus": "a corpus to make statistics of preserved keys from",
    "capability": "a folder with sst2, mrpc, cola, rte, mmlu and nli, each a .jsonl file",
    "prompts": "prompts that no edit touches (known_1000's format), or any text",
}


@dataclass
class Lab:
    """One model and its data, for all arms of a study."""

    bench: Workbench
    """The model."""
    recipe: Recipe
    """What arms are changes of."""
    scale: Scale
    """Arms."""
    settings: dict[str, Any]
    """The study's own."""
    sources: Sources
    """Data."""
    seed: int = 0
    """Of queues, contexts and draws."""
    skip_bad: bool = False
    """Records that can't be read are left out, with a notice."""
    progress: Progress | None = None
    """Told of stages."""
    notices: list[str] = field(default_factory=list)
    """What a reader of the results must know."""
    _base: Reading | None = field(default=None, init=False, repr=False)
    """The text as the unedited model reads it."""

    # -- queues ------------------------------------------------------------------------------

    def facts(self, count: int, *, source: str = "facts", skip: int = 0) -> list[Fact]:
        """A queue of `count` facts in the seed's order; ConfigError if the file has fewer."""
        file = self.sources.need(source)
        read = read_facts(file, on_conflict="first", skip=skip, skip_bad=self.skip_bad)
        if read.bad:
            left_out = f"{Path(file).name}: {len(read.bad)} records could not be read: left out"
            self.notices += [left_out] if left_out not in self.notices else []
        found = read.facts
        # One question per subject and relation can be in the model, so a queue has each once.
        unique = list({fact.key: fact for fact in reversed(found)}.values())[::-1]
        if len(unique) < count:
            raise ConfigError(
                f"{file}: has {len(unique)} facts behind record {skip}; the stream needs {count}"
            )
        return shuffled(unique[:count], self.seed)

    def plan(self, arm: str, facts: Sequence[Fact], **given: Any) -> StreamPlan:
        """The stream of an arm; `given` replaces fields of the plan."""
        plan = StreamPlan(
            arm,
            self.scale.recipe(self.recipe, arm),
            tuple(facts),
            self.settings["batch_size"],
            self.seed,
        )
        return replace(plan, **given)

    def edited(self, plan: StreamPlan) -> Stream:
        """The stream of `plan`, edited to its end."""
        stream = self.bench.stream(plan)
        if self.progress:
            self.progress(f"{plan.label}: edits", 0, len(plan.facts))
        stream.edit(self._staged(plan.label))
        return stream

    # -- measures ----------------------------------------------------------------------------

    def asked(
        self,
        stream: Stream | None,
        done: int,
        facts: Sequence[Fact],
        *,
        generate: bool = False,
        fluency: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Fact id -> one value per measure, at a checkpoint; no stream: of the unedited model."""
        settings = {"facts": hash_of([f.to_dict() for f in facts]), "generate": generate}

        def ask(editor: Editor) -> Any:
            return evaluate(editor.editable, facts, generate=generate).rows()

        found: dict[str, dict[str, Any]] = self._measure(stream, done, "facts", settings, ask)
        if fluency:
            settings = {"facts": settings["facts"], "seed": self.seed}

            def write(editor: Editor) -> Any:
                said = write_texts(editor.editable, facts, seed=self.seed)
                return {
                    "fluency": said.fluency,
                    "texts": {k: list(v) for k, v in said.texts.items()},
                }

            varied = self._measure(stream, done, "fluency", settings, write)["fluency"]
            found = {key: {**row, "fluency": varied.get(key)} for key, row in found.items()}
        return found

    def text(self, stream: Stream | None, done: int) -> dict[str, Any] | None:
        """Perplexity of the text, and KL from the unedited model; None if none was given."""
        if self.sources.text is None:
            return None

        def ask(editor: Editor) -> Any:
            base = self.base_reading(editor)
            return told(base if stream is None else self.read(editor, base))

        settings = {"windows": hash_of(self.windows())}
        found: dict[str, Any] = self._measure(stream, done, "text", settings, ask)
        return found

    def read(self, editor: Editor, base: Reading | None = None) -> Reading:
        """The text with the editor's model as it is, compared with `base` if there is one."""
        return read(editor.editable, self.windows(), base=base, keep=base is None)

    def base_reading(self, editor: Editor) -> Reading:
        """The text with the model of every stream before its edits; read once."""
        if self._base is None:
            with editor.base_weights():
                self._base = self.read(editor)
        return self._base

    def norms(self, stream: Stream, done: int, facts: Sequence[Fact]) -> dict[str, Any]:
        """‖Δ‖/‖W₀‖ by layer, and mean ‖h‖ at the edited token of `facts`."""

        def ask(editor: Editor) -> Any:
            weights = editor.weights
            return {
                "update_share": {
                    str(layer): float(
                        (weights.exact(layer).cpu() - weights.base(layer)).norm()
                        / weights.base(layer).norm()
                    )
                    for layer in editor.recipe.layers
                },
                "hidden_norm": asdict(edited_token_norm(editor, facts)),
            }

        settings = {"facts": hash_of([f.to_dict() for f in facts])}
        found: dict[str, Any] = self._measure(stream, done, "norms", settings, ask)
        return found

    def capability(self, stream: Stream | None, done: int) -> dict[str, Any]:
        """Task -> its result, with items."""
        items = self.items()
        settings = {"items": hash_of([[item.id, dict(item.record)] for item in items])}

        def ask(editor: Editor) -> Any:
            found = capability(editor.editable, items)
            return {task: result.to_dict() for task, result in found.items()}

        found: dict[str, Any] = self._measure(stream, done, "capability", settings, ask)
        return found

    def drift(self, stream: Stream, done: int, facts: Sequence[Fact]) -> dict[str, Any]:
        """How far hidden states of the prompts moved, and the points of its picture."""
        rows = read_texts(
            self.sources.need("prompts"),
            self.bench.model.encoder,
            limit=self.settings["prompts"],
            without={fact.subject for fact in facts},
        )
        depth = self.bench.model.depth
        last = self.recipe.layers[-1]  # of all arms, wherever they edit
        layers = sorted({last, depth // 2, depth - 1})

        def ask(editor: Editor) -> Any:
            with editor.base_weights():
                base = read_states(editor.editable, rows, layers)
            edited = read_states(editor.editable, rows, layers)
            found = drift(base, edited)
            return {**found.to_dict(), "points": list(found.rows())}

        settings = {"rows": hash_of([list(row) for row in rows]), "layers": layers}
        found: dict[str, Any] = self._measure(stream, done, "drift", settings, ask)
        return found

    def _measure(
        self,
        stream: Stream | None,
        done: int,
        name: str,
        settings: Mapping[str, Any],
        ask: Callable[[Editor], Any],
    ) -> Any:
        if stream is None:
            return self.of_unedited(name, settings, ask)
        if self.progress:
            self.progress(f"{stream.plan.label}: {name} at {done}", 0, 1)
        return stream.measure(done, name, settings, ask)

    def of_unedited(
        self, name: str, settings: Mapping[str, Any], ask: Callable[[Editor], Any]
    ) -> Any:
        """What `ask` says of the model without edits, from the work folder if it has it."""
        self.bench.clear()
        model = self.bench.base.history.base.hash[:16]
        digest = hash_of(settings if MEASURES == 1 else [settings, MEASURES])
        file = self.bench.folder / "unedited" / f"{model}-{name}-{digest}.json"
        if not file.is_file():
            if self.progress:
                self.progress(f"unedited: {name}", 0, 1)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, as_json(ask(self.bench.base)))
        return json.loads(file.read_text(encoding="utf-8"))

    def windows(self) -> list[list[int]]:
        """Of the perplexity text."""
        count = self.settings.get("windows", 20)
        window = min(WINDOW, self.bench.model.encoder.max_length)
        file = self.sources.need("text")
        return read_windows(file, self.bench.model.tokenizer, windows=count, window=window)

    def items(self) -> list[Item]:
        """Questions of the six tasks."""
        return read_tasks(
            self.sources.need("capability"), limit=self.settings["items"], seed=self.seed
        )

    def _staged(self, label: str) -> Progress | None:
        if self.progress is None:
            return None
        tell = self.progress

        def staged(stage: str, done: int, total: int) -> None:
            if stage == "edited":
                tell(f"{label}: edits", done, total)

        return staged


def told(reading: Reading) -> dict[str, Any]:
    """Perplexity and KL of a reading as plain data."""
    kl = reading.kl
    return {"perplexity": asdict(reading.perplexity), "kl": kl and asdict(kl)}


def hash_of(content: Any) -> str:
    """16 hex digits that name plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
