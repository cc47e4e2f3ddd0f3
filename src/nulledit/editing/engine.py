"""A model, the ledger of its edits, and all changes of both: the engine of `nulledit.Editor`.

The rooms that look at edits take it; `Editor` (`nulledit.api`) adds what those rooms do to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import Recipe, ValueSettings, read_recipe
from nulledit.data.facts import Fact
from nulledit.data.readers import Facts, as_facts
from nulledit.editing import changes
from nulledit.editing.call_log import Progress
from nulledit.editing.merge import Decide
from nulledit.editing.recipes import resolve_recipe
from nulledit.editing.reports import ChangeReport, EditReport
from nulledit.editing.saved import SavedEdits, check_base, put_back, write_edited
from nulledit.editing.session import EditSession
from nulledit.editing.undo import facts_of
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.weights import EditedWeights
from nulledit.io.files import from_anywhere
from nulledit.io.settings import check_whole
from nulledit.io.text import count
from nulledit.ledger.journal import Journal, Trial
from nulledit.ledger.records import Base, History
from nulledit.ledger.store import Store
from nulledit.models.accepted import check_model, check_tokenizer
from nulledit.models.editable_model import EditableModel
from nulledit.models.gguf import file_sha256
from nulledit.models.load import load_model, model_hash
from nulledit.models.placement import Device
from nulledit.models.quantized import has_dense
from nulledit.parallel.ranks import Ranks
from nulledit.statistics.spectra import Statistics


class EditEngine:
    """Edits a causal language model in place and remembers how, exactly."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        recipe: Recipe | str | Path | None = None,
        statistics: Statistics | str | Path | None = None,
        name: str = "",
        seed: int = 0,
        value_cache: str | Path | None = None,
        quantize: str = "",
        revision: str = "",
        ranks: Ranks | None = None,
    ):
        """Take a `model` as the base of edits; its weights are changed in place.

        `recipe`: a Recipe, a file, or a shipped recipe's name; left out, the shipped one called
        `name`, else the one called `default`. `statistics`: of this model's keys or MLP inputs, as
        the method reads; left out, shipped or cached ones are looked for at the first edit.
        `value_cache`: a folder that keeps optimised values for any editor that asks for the same.
        `quantize`, `revision`: as given to `load_model`, for it to be loaded so again. `ranks`:
        processes that edit together, each with an editor of its own; all must make the same calls,
        only rank 0's may attach or save.

        Of a quantised model the edited matrices are made dense in memory, and no others.
        """
        check_whole("seed", seed)
        recipe = self._take(model, tokenizer, read_recipe(recipe, name), name, ranks)
        base = Base(
            model=name,
            hash=self._hash,
            dtype=str(model.dtype).removeprefix("torch."),
            stored=recipe.to_dict(),
            seed=seed,
            quantized=(quantize or "own") if has_dense(model) else "",
            revision=revision,
            file_sha256=file_sha256(model),
        )
        self._work(Journal(History(base)), recipe, statistics, value_cache)

    def _take(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        name: str,
        ranks: Ranks | None,
    ) -> Recipe:
        """Take up the base; the recipe to use on it."""
        check_model(model)
        check_tokenizer(tokenizer)
        self.ranks = ranks or Ranks()
        self.model, self.tokenizer = model, tokenizer
        self._hash = model_hash(model)  # first: some quantised matrices are packed as they work
        self._plain = EditableModel(model, tokenizer, recipe.layout)
        return self._with_template(resolve_recipe(recipe, name, self._plain, self._hash))

    def _work(
        self,
        journal: Journal,
        recipe: Recipe,
        statistics: Statistics | str | Path | None,
        value_cache: str | Path | None,
    ) -> None:
        self._journal = journal
        self._session = EditSession(
            self._plain,
            journal,
            recipe=recipe,
            statistics=statistics,
            cache=None if value_cache is None else ValueCache(Path(value_cache)),
            ranks=self.ranks,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        recipe: Recipe | str | Path | None = None,
        statistics: Statistics | str | Path | None = None,
        device: Device = None,
        device_map: str | Mapping[str, str | int] | None = None,
        dtype: str | None = None,
        quantize: str = "",
        revision: str | None = None,
        seed: int = 0,
        value_cache: str | Path | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks | None = None,
    ) -> Self:
        """Load a model by name (`smollm2-135m`), folder, GGUF file or Hub id; make an editor of it.

        `device`, `device_map`, `dtype`, `quantize` and `revision` are as for `load_model`.
        """
        check_whole("seed", seed)
        model, tokenizer = load_model(
            name,
            device=device,
            device_map=device_map,
            dtype=dtype,
            quantize=quantize,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return cls(
            model,
            tokenizer,
            recipe=recipe,
            statistics=statistics,
            name=from_anywhere(name),  # a run finds its base from anywhere
            seed=seed,
            value_cache=value_cache,
            quantize=quantize,
            revision=revision or "",
            ranks=ranks,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: Device = None,
        device_map: str | Mapping[str, str | int] | None = None,
        value_cache: str | Path | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks | None = None,
    ) -> Self:
        """Take up what `save` (or `nulledit edit`) left in `folder`; later edits are written there.

        The base comes from the folder's own model with W₀ from the ledger put back; if there is no
        model in it (an interrupted first run, or a quantised base), from where it was first loaded.
        Either must have the recorded hash.
        """
        saved = SavedEdits(Path(folder))
        with saved.explained():
            model, tokenizer = saved.load_model(
                device=device, device_map=device_map, trust_remote_code=trust_remote_code
            )
            known = saved.store, saved.history, saved.source
            return cls._resumed(*known, model, tokenizer, value_cache=value_cache, ranks=ranks)

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        statistics: Statistics | str | Path | None = None,
        value_cache: str | Path | None = None,
    ) -> Self:
        """Take up the ledger in `folder` with its base, or its edited model, in memory.

        `statistics` are for a ledger that has no batch yet.
        """
        check_model(model)
        store = Store(Path(folder) / "ledger")
        known = store, store.load(), "the given model"
        return cls._resumed(
            *known, model, tokenizer, value_cache=value_cache, statistics=statistics
        )

    @classmethod
    def _resumed(
        cls,
        store: Store,
        history: History,
        source: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        value_cache: str | Path | None,
        ranks: Ranks | None = None,
        statistics: Statistics | str | Path | None = None,
    ) -> Self:
        put_back(model, history, source)
        editor = cls.__new__(cls)
        recipe = editor._take(model, tokenizer, history.base.recipe, history.base.model, ranks)
        check_base(editor._hash, history, source)
        if history.epochs:
            recipe = editor._with_template(history.epochs[-1].recipe)
        kept = store if editor.ranks.first else None
        editor._work(Journal(history, kept), recipe, statistics, value_cache)
        return editor

    def __repr__(self) -> str:
        name = self.history.base.model or type(self.model).__name__
        method = self.recipe.method.name
        return f"<{type(self).__name__} of {name}: {count(len(self.facts), 'fact')} by {method}>"

    def _with_template(self, recipe: Recipe) -> Recipe:
        """The recipe with the hash of the tokenizer's chat template, if it asks for one.

        ModelError if there is none, or if the recipe was used with another one.
        """
        return replace(recipe, chat=self._plain.in_chat(recipe.chat).chat)

    @property
    def editable(self) -> EditableModel:
        """The model and its tokenizer, asked as facts are: plain or in chat, by the recipe."""
        return self._session.model

    @property
    def recipe(self) -> Recipe:
        """Of the current epoch, or of the next one to open."""
        return self._session.recipe

    @property
    def seed(self) -> int:
        """Of contexts and queues."""
        return self.history.base.seed

    @property
    def weights(self) -> EditedWeights:
        """The edited matrices."""
        return self._session.weights

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self._journal.history

    @property
    def facts(self) -> list[Fact]:
        """The facts that are in the model now, in the order they were edited."""
        return facts_of(self.history.active)

    @property
    def folder(self) -> Path | None:
        """Where the ledger is kept, as `attach`, `save` or `load` said; None: in memory alone."""
        store = self._journal.store
        return store.folder.parent if store else None

    def attach(self, folder: str | Path) -> None:
        """Keep the ledger in `folder`/ledger from now on: every batch is committed as it ends."""
        self._journal.keep_in(Path(folder) / "ledger")

    def detach(self) -> None:
        """Keep the ledger in memory alone from now on; what is on disk stays as it is."""
        self._journal.store = None

    def save(self, folder: str | Path) -> None:
        """Write the ledger (first) and the edited model, an ordinary Hugging Face folder.

        Of a quantised base only the ledger: it is loaded again from where it was. LedgerError where
        something else changed the model in memory: it is not what the ledger says.
        """
        self.weights.check_unchanged()
        store, place = self._journal.store, Path(folder) / "ledger"
        if store is None:
            self.attach(folder)
        elif store.folder.resolve() != place.resolve():
            self._journal.copy_to(Store(place))
        self.keep_model(folder)

    def keep_model(self, folder: str | Path) -> None:
        """Bring `folder`/model to the ledger's state; a quantised base has none."""
        if not self.history.base.quantized:
            self.save_model(Path(folder) / "model")

    def save_model(self, folder: str | Path) -> None:
        """Bring the model in `folder` to the ledger's state; nothing is done if it is there.

        ModelError where the base is quantised: edits can't be written into it. LedgerError where
        something else changed the model in memory: it is not what the ledger says.
        """
        self.weights.check_unchanged()
        with self._journal.writing():
            write_edited(self.weights, Path(folder))

    def base_weights(self) -> AbstractContextManager[PreTrainedModel]:
        """The model without its edits inside; as before afterwards."""
        return self.as_of(0)

    @contextmanager
    def as_of(self, event: int) -> Iterator[PreTrainedModel]:
        """The model after event number `event` of the ledger inside; as before afterwards."""
        with self.weights.holding(self.history.active_as_of(event)):
            yield self.model

    def check_statistics(self) -> None:
        """StatisticsError if there are none that serve the recipe, before anything is edited."""
        self._session.check_statistics()

    def edit(
        self,
        facts: Facts,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        progress: Progress | None = None,
    ) -> EditReport:
        """Write `facts` into the model, in batches of `batch_size` (the recipe's by default).

        `facts`: one or several, as `Fact`s or mappings of the same fields; a file's path; or what
        `read_facts` returns. They are put in an order fixed by the seed, since order decides what
        survives (`shuffle=False`: the given one). Every fact is checked before the first batch.
        After an error or an interruption model and ledger are as after the last finished batch, and
        the same call goes on from there with the same result.
        """
        return changes.edit(
            self._session, as_facts(facts), batch_size, shuffle=shuffle, progress=progress
        )

    def retry(
        self,
        *ids: str,
        values: ValueSettings | None = None,
        progress: Progress | None = None,
    ) -> EditReport:
        """Write facts that are in the model again, with stronger settings of their values.

        `values`: those settings; left out, `stronger` than the recipe's. The solve stays the
        epoch's. `column.outcome.settings` says what was changed; undo takes a retried fact out
        as a whole. LedgerError if an id is not in the model, FactError for one to forget.
        """
        return changes.retry(self._session, ids, values=values, progress=progress)

    def forget(
        self,
        facts: Facts,
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> EditReport:
        """Suppress the targets of `facts`, with nothing in their place (docs/forget.md).

        An edit like any other: an earlier answer to the same question leaves, undo takes it back.
        """
        given = as_facts(facts)
        asked = tuple(fact if fact.forget else fact.forgotten() for fact in given.facts)
        return self.edit(replace(given, facts=asked), batch_size=batch_size, progress=progress)

    def next_epoch(
        self,
        recipe: Recipe | str | Path,
        *,
        statistics: Statistics | str | Path | None = None,
    ) -> None:
        """Have the next `edit` begin an epoch with another recipe or other statistics.

        Its base is the weights so far; with a method that keeps history, the facts that are there
        enter with what their layers give at their keys now. Undo works across epochs.
        """
        found = read_recipe(recipe, "")
        layout = found.layout or self.history.base.recipe.layout
        recipe = self._with_template(
            resolve_recipe(replace(found, layout=layout), "", self._plain, self.history.base.hash)
        )
        self._session.next_epoch(recipe, statistics)

    def undo(self, *ids: str) -> ChangeReport:
        """Take facts out again, exactly: the weights become the solve without their columns.

        An answer that an undone fact had replaced comes back; facts on the same key as it are
        rebuilt without it. A batch by gradient is taken out whole, and the rest of it descends
        again. LedgerError if an id is not in the model.
        """
        return changes.undo(self._session, ids)

    def redo(self, *ids: str) -> ChangeReport:
        """Bring facts back that were taken out; without ids, all that the last undo took.

        The last undo is reversed exactly, as long as nothing else happened since. Named facts come
        back with their stored columns, unless other facts on their keys ask for a new value.
        LedgerError if there is nothing to redo, or an id is unknown or in the model.
        """
        return changes.redo(self._session, ids)

    def restore(self) -> ChangeReport:
        """Take out everything: the base, bit for bit. `redo` brings it all back."""
        return changes.restore(self._session)

    def rebuild(self, *, values: bool = False, progress: Progress | None = None) -> ChangeReport:
        """Write the facts in the model again, batch by batch, as if the others had never been.

        Keys and residuals are taken again, so that no trace of undone facts is left in them. Stored
        values stay, or with `values` are optimised again; a batch by gradient descends again.
        """
        return changes.rebuild(self._session, values=values, progress=progress)

    def merge(
        self, other: History, *, decide: Decide | None = None, progress: Progress | None = None
    ) -> ChangeReport:
        """Take over the facts of another ledger on the same base: one model with both.

        This ledger's facts first, then the other's, each batch in its epoch: keys and residuals are
        taken again, stored values stay but where two facts share a key. `decide`: what to do about
        each of `conflicts(other)`: first, second or neither. LedgerError if one is not decided.
        """
        return changes.merge(self._session, other, decide=decide, progress=progress)

    def trial(self, *, writing: bool = True) -> AbstractContextManager[Trial]:
        """Changes inside are kept, all at once, only if `trial.keep()` is called.

        Else model, history and ledger are as before: edit, look, decide. `writing=False` for a mere
        look, which no other process at work on the ledger need hinder.
        """
        return self._session.transaction("", writing=writing)

    def writing(self) -> AbstractContextManager[None]:
        """No other process writes to the ledger inside; LedgerError if one does already."""
        return self._journal.writing()
