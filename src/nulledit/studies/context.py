"""What every study works with: a model, data, and answers that are asked for once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.data.readers import read_facts
from nulledit.editing.engine import EditEngine
from nulledit.editing.recipes import resolve_recipe, with_layers
from nulledit.errors import ConfigError, NullEditError
from nulledit.evaluation.drift import read_texts
from nulledit.evaluation.kept_reading import base_reading
from nulledit.evaluation.reading import Reading, read, read_windows
from nulledit.evaluation.tasks import Item, read_tasks
from nulledit.io.files import write_text
from nulledit.io.jsonfiles import as_json
from nulledit.studies.scale import Scale
from nulledit.studies.stream import MEASURES, Progress, Stream, StreamPlan, Workbench, shuffled

WINDOW = 256
BENCHMARKS = {"counterfact": "CounterFact", "zsre": "zsRE"}
"""Shape of a file's records -> what tables call the data; others are called by their file."""


@dataclass(frozen=True)
class Sources:
    """Files that a user gave, as `SOURCE_HELP` says; a study says which it needs."""

    facts: str | None = None
    zsre: str | None = None
    text: str | None = None
    corpus: str | None = None
    capability: str | None = None
    prompts: str | None = None

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
    """The base recipe that each arm changes."""
    scale: Scale
    """Arms by name."""
    settings: dict[str, Any]
    sources: Sources
    seed: int = 0
    """Of queues, contexts and draws."""
    skip_bad: bool = False
    """Records that can't be read are left out, with a notice."""
    progress: Progress | None = None
    """Called with (stage, done, total)."""
    statistics: Path | None = None
    """Of all arms that name none; None: those found for the model."""
    notices: list[str] = field(default_factory=list)
    """What a reader of the results must know."""
    _base: Reading | None = field(default=None, init=False, repr=False)
    """The text as the unedited model reads it."""
    _titles: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    """Source -> what tables call its data."""

    # -- data ------------------------------------------------------------------------------------

    def facts(self, count: int, *, source: str = "facts", skip: int = 0) -> list[Fact]:
        """A queue of `count` facts in the seed's order; ConfigError if the file has fewer."""
        file = self.sources.need(source)
        read = read_facts(file, on_conflict="first", skip=skip, skip_bad=self.skip_bad)
        if read.bad:
            left_out = f"{Path(file).name}: {len(read.bad)} records could not be read: left out"
            self.notices += [left_out] if left_out not in self.notices else []
        self._titles[source] = BENCHMARKS.get(read.format.partition("-")[0], Path(file).name)
        # One question per subject and relation can be in the model, so a queue has each once.
        unique = list({fact.key: fact for fact in reversed(read.facts)}.values())[::-1]
        if len(unique) < count:
            raise ConfigError(
                f"{file}: has {len(unique)} facts after record {skip}; the stream needs {count}: "
                f"give more facts, or a shorter stream with --set {source}={max(len(unique), 1)}"
            )
        return shuffled(unique[:count], self.seed)

    def title(self, source: str) -> str:
        """What tables call the data that `facts` read last: a benchmark's name or the file's."""
        return self._titles[source]

    def windows(self) -> list[list[int]]:
        """Token ids of the perplexity text."""
        count = self.settings.get("windows", 20)
        window = min(WINDOW, self.bench.model.encoder.max_length)
        file = self.sources.need("text")
        return read_windows(file, self.bench.model.tokenizer, windows=count, window=window)

    def items(self) -> list[Item]:
        """Questions of the six tasks."""
        return read_tasks(
            self.sources.need("capability"), limit=self.settings["items"], seed=self.seed
        )

    def prompts(self, facts: Sequence[Fact]) -> list[tuple[int, ...]]:
        """Token ids of the prompts for the drift of hidden states, without those on `facts`."""
        return read_texts(
            self.sources.need("prompts"),
            self.bench.model.encoder,
            limit=self.settings["prompts"],
            without={fact.subject for fact in facts},
        )

    # -- streams ---------------------------------------------------------------------------------

    def fit(self, arms: Iterable[str]) -> None:
        """Give the base recipe layers by depth if it names none, and try all recipes on the model.

        An error names the arm whose recipe the model can't take.
        """
        base, model = self.bench.base, self.bench.model
        if self.recipe.chat and self.recipe.chat.optional:
            self.recipe = replace(self.recipe, chat=None)
        if not self.recipe.layers:
            self.recipe = with_layers(self.recipe, model)
            self.notices.append(f"Layers were chosen by depth: {list(self.recipe.layers)}.")
        for arm in ("", *arms):
            try:
                recipe = self.scale.recipe(self.recipe, arm) if arm else self.recipe
                if recipe.chat:
                    raise ConfigError("studies ask plain text: give a recipe without chat")
                resolve_recipe(recipe, self.bench.name, model, base.history.base.hash)
            except NullEditError as error:
                raise type(error)(f"arm {arm}: {error}" if arm else str(error)) from error

    def plan(self, arm: str | Mapping[str, Any], facts: Sequence[Fact], **given: Any) -> StreamPlan:
        """The stream of an arm of the scale, or of changes of the base recipe.

        `given` replaces fields of the plan. ConfigError for a recipe that can't be.
        """
        if isinstance(arm, str):
            label, recipe = arm, self.scale.recipe(self.recipe, arm)
        else:
            label = ", ".join(f"{name}={value}" for name, value in arm.items()) or "the recipe"
            recipe = self.recipe.with_fields(arm)
        size = given.pop("batch_size", None) or self.settings["batch_size"]
        plan = StreamPlan(label, recipe, tuple(facts), size, self.seed, statistics=self.statistics)
        return replace(plan, **given)

    def edited(self, plan: StreamPlan) -> Stream:
        """The stream of `plan`, edited to its end."""
        stream = self.bench.stream(plan)
        self.tell(f"{plan.label}: edits", 0, len(plan.facts))
        stream.edit(self.staged(plan.label))
        return stream

    def tell(self, stage: str, done: int = 0, total: int = 1) -> None:
        """Report progress, if anyone listens."""
        if self.progress:
            self.progress(stage, done, total)

    def staged(self, label: str) -> Progress:
        """Progress of a stream's edits: the finished batches only."""

        def staged(stage: str, done: int, total: int) -> None:
            if stage == "edited":
                self.tell(f"{label}: edits", done, total)

        return staged

    # -- the unedited model ----------------------------------------------------------------------

    def of_unedited(
        self, name: str, settings: Mapping[str, Any], ask: Callable[[EditEngine], Any]
    ) -> Any:
        """What `ask` says of the model without edits, from the work folder if it has it."""
        self.bench.clear()
        model = self.bench.base.history.base.hash[:16]
        digest = hash_of(settings if MEASURES == 1 else [settings, MEASURES])
        file = self.bench.folder / "unedited" / f"{model}-{name}-{digest}.json"
        if not file.is_file():
            self.tell(f"unedited: {name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, as_json(ask(self.bench.base)))
        return json.loads(file.read_text(encoding="utf-8"))

    def read(self, editor: EditEngine, base: Reading) -> Reading:
        """The text with the editor's model as it is, compared with `base`."""
        return read(editor.editable, self.windows(), base=base)

    def base_reading(self, editor: EditEngine) -> Reading:
        """The text with the model of every stream before its edits; read once."""
        if self._base is None:
            self._base = base_reading(editor, self.windows())
        return self._base


def hash_of(content: Any) -> str:
    """16 hex digits that name plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
