"""The driver: facts in batches, through keys, values and solves, into weights and ledger."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import Placement, Recipe, ValueSettings, check_whole, read_recipe
from nulledit.data.facts import Fact
from nulledit.data.readers import Facts, as_facts
from nulledit.editing.batch import CallLog, Progress
from nulledit.editing.batching import admitted, batches
from nulledit.editing.merge import Decide, conflicts, decided, with_own_ids
from nulledit.editing.recipes import resolve_recipe
from nulledit.editing.replay import replay
from nulledit.editing.reports import ChangeReport, EditReport, by_fact
from nulledit.editing.session import EditSession, check_in_model, some
from nulledit.editing.stronger import stronger
from nulledit.editing.undo import by_group, facts_of, last_undone, newest, plan_redo, plan_undo
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.weights import EditedWeights
from nulledit.errors import ConfigError, FactError, LedgerError, ModelError
from nulledit.io.files import recover_folder
from nulledit.ledger.journal import Journal, Trial
from nulledit.ledger.model_folder import as_listed, write_model
from nulledit.ledger.records import Base, Column, History
from nulledit.ledger.store import Store
from nulledit.methods import find_method
from nulledit.models.accepted import check_model, check_tokenizer
from nulledit.models.dense import Dense
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import (
    check_layout,
    find_layout,
    frozen,
    mlp_out,
    write_weight,
)
from nulledit.models.load import QUANTIZE, load_model, model_hash
from nulledit.models.quantized import has_dense, make_editable
from nulledit.parallel.ranks import Ranks
from nulledit.statistics.spectra import Statistics

logger = logging.getLogger(__name__)

NEAR_KEY = 0.9  # cosine of keys above which an undo names an edit as near


class Editor:
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
        ranks: Ranks | None = None,
    ):
        """Take a `model` as the base of edits; its weights are changed in place.

        `recipe`: a Recipe, a file, or a shipped recipe's name; left out, the shipped one called
        `name`, else the published settings on five layers chosen by depth. `statistics`: of this
        model's keys; left out, shipped or cached ones are looked for at the first edit.
        `value_cache`: a folder that keeps optimised values for any editor that asks for the same.
        `quantize`: 4bit or 8bit if `load_model` quantised it, so that it can be loaded so again.
        `ranks`: processes that edit together, each with an editor of its own; all must make the
        same calls, only rank 0's may attach or save.

        Of a quantised model the edited matrices are made dense in memory; the others stay as they
        are. Offloaded ones are brought to where they work.
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
        device: str | Placement | None = None,
        dtype: str | None = None,
        quantize: str = "",
        seed: int = 0,
        value_cache: str | Path | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks | None = None,
    ) -> Self:
        """Load a model by name (`smollm2-135m`), folder or Hub id and make an editor of it.

        `device`, `dtype` and `quantize` are as for `load_model`.
        """
        check_whole("seed", seed)
        model, tokenizer = load_model(
            name,
            device=device,
            dtype=dtype,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
        )
        return cls(
            model,
            tokenizer,
            recipe=recipe,
            statistics=statistics,
            name=name,
            seed=seed,
            value_cache=value_cache,
            quantize=quantize,
            ranks=ranks,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | Placement | None = None,
        value_cache: str | Path | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks | None = None,
    ) -> Self:
        """Take up what `save` (or `nulledit edit`) left in `folder`; later edits are written there.

        The base comes from the folder's own model with W₀ from the ledger put back; if there is no
        model in it (an interrupted first run, or a quantised base), from where it was first loaded.
        Either must have the recorded hash.
        """
        folder = Path(folder)
        store = Store(folder / "ledger")
        history = store.load()
        saved = folder / "model"
        recover_folder(saved)
        quantized = history.base.quantized
        source = str(saved) if (saved / "config.json").is_file() else history.base.model
        if not source:
            raise LedgerError(f"{folder}: has no model, and its base was an object in memory")
        try:
            model, tokenizer = load_model(
                source,
                device=device,
                dtype=history.base.dtype,
                quantize=quantized if quantized in QUANTIZE else "",
                trust_remote_code=trust_remote_code,
            )
            return cls._resumed(store, history, model, tokenizer, source, value_cache, ranks)
        except (ModelError, LedgerError) as error:
            if source != str(saved) or not history.base.model or as_listed(saved):
                raise
            raise type(error)(
                f"{error}; move {saved} away to have it written anew from the base "
                f"({history.base.model}) and the ledger"
            ) from error

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
        return cls._resumed(
            store, store.load(), model, tokenizer, "the given model", value_cache, None, statistics
        )

    @classmethod
    def _resumed(
        cls,
        store: Store,
        history: History,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        value_cache: str | Path | None,
        ranks: Ranks | None = None,
        statistics: Statistics | str | Path | None = None,
    ) -> Self:
        layout = history.base.recipe.layout
        layout = find_layout(model) if layout is None else check_layout(model, layout)
        packed = model_hash(model) if history.base.quantized else ""
        make_editable(model, layout, history.layers, packed)
        for layer in history.layers:
            module = mlp_out(model, layout, layer)
            if not isinstance(module, Dense):
                write_weight(module, history.original(layer))
            elif not module.begin_from(history.original(layer)):
                raise LedgerError(
                    f"{source}: its matrix of layer {layer} is not the ledger's W₀: this is "
                    "another model, or one changed by hand"
                )
        editor = cls.__new__(cls)
        recipe = editor._take(model, tokenizer, history.base.recipe, history.base.model, ranks)
        if editor._hash != history.base.hash:
            raise LedgerError(
                f"{source}: its weights without the edits have hash {editor._hash[:12]}, the "
                f"ledger's base has {history.base.hash[:12]}: this is another model, or one "
                "changed by hand"
            )
        if history.epochs:
            recipe = editor._with_template(history.epochs[-1].recipe)
        kept = store if editor.ranks.first else None
        editor._work(Journal(history, kept), recipe, statistics, value_cache)
        return editor

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
        target = Store(Path(folder) / "ledger")
        store = self._journal.store
        if store is None:
            self.attach(folder)
        elif store.folder.resolve() != target.folder.resolve():
            self._journal.copy_to(target)
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
            write_model(
                self.model,
                self.tokenizer,
                Path(folder),
                state_id=self.history.state_id,
                base_hash=self.history.base.hash,
                edited=[self._plain.parameter_name(layer) for layer in self.weights.layers],
            )

    @contextmanager
    def base_weights(self) -> Iterator[PreTrainedModel]:
        """The model without its edits inside; as before afterwards."""
        with self.weights.holding([]):
            yield self.model

    @contextmanager
    def as_of(self, event: int) -> Iterator[PreTrainedModel]:
        """The model behind event number `event` of the ledger inside; as before afterwards."""
        with self.weights.holding(self.history.active_as_of(event)):
            yield self.model

    def edit(
        self,
        facts: Facts,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        progress: Progress | None = None,
    ) -> EditReport:
        """Write `facts` into the model, in batches of `batch_size` (the recipe's by default).

        One or several, as `Fact`s, as mappings of the same fields, or as `read_facts` returns them.
        A queue is put in an order of its own, fixed by the seed, since order decides what survives
        (`shuffle=False`: the given one). Every fact is checked before the first batch. After an
        error or an interruption the model and the ledger are as after the last finished batch, and
        the same call goes on from there with the same result.
        """
        size = self.recipe.batch_size if batch_size is None else batch_size
        check_whole("batch_size", size, least=1)
        run, given = CallLog(progress), as_facts(facts)
        run.notices += given.notices
        queue, notices = admitted(self.history, given.facts)
        run.notices += notices
        self._agree(queue)
        if queue:
            session = self._session
            with frozen(self.model), session.transaction():
                session.open_epoch(self.seed)
                session.check_rows(queue, run)
                done = 0
                if session.method.one_by_one:
                    size = 1
                for batch in batches(queue, size, seed=self.seed if shuffle else None):
                    run.tell("batches", done, len(queue))
                    session.batch(
                        batch, run, kind="forget" if all(f.forget for f in batch) else "edit"
                    )
                    done += len(batch)
        asked = {fact.id for fact in queue}
        columns = tuple(c for c in self.history.present if c.fact.id in asked)
        layers = self.weights.reports()
        return EditReport(columns, layers, tuple(run.notices), run.seconds, run.optimised)

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
        check_in_model(ids, self.history)
        facts = {fact.id: fact for fact in self.facts}
        for id_ in ids:
            if facts[id_].forget:
                raise FactError(f"fact {id_!r} is to be forgotten: there is no answer to write")
        if not ids:
            raise LedgerError("no fact to write again was named")
        run, session = CallLog(progress), self._session
        queue = [facts[id_] for id_ in dict.fromkeys(ids)]
        self._agree(queue)
        with frozen(self.model), session.current_epoch(), session.transaction():
            if session.method.by_gradient:
                raise ConfigError(f"{session.method.name} optimises no values: retry can't help")
            found = values or stronger(self.recipe.values)
            if session.method.rewinds:
                found = replace(found, rounds=1)  # its values are of the unedited model
            session.batch(queue, run, kind="retry", values=found)
        columns = tuple(c for c in self.history.present if c.fact.id in ids)
        layers = self.weights.reports()
        return EditReport(columns, layers, tuple(run.notices), run.seconds, run.optimised)

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
        rebuilt without it. A batch by gradient is taken out whole, and the rest of it descended
        anew. LedgerError if an id is not in the model.
        """
        check_in_model(ids, self.history)
        if not ids:
            raise LedgerError("no fact to undo was named")
        gone = [c for c in self.history.active if c.fact.id in ids]
        with self._changed(gone) as (report, run), self._session.transaction():
            plan = plan_undo(self.history, gone, self._session.near)
            self._session.carry_out(plan, "undo", run)
            whole = {c.batch for c in gone if self._by_gradient(c)}
            if plan.remade and whole:
                names = some(f"batch {number}" for number in sorted(whole))
                run.notices.append(f"{names}: one update by gradient, undone as a whole")
            left = [f.id for f in self.facts if f.id in ids]
            if left:
                run.notices.append(
                    f"{some(left)}: an earlier answer or wording of this id is back in the model; "
                    "undo again to take it out as well"
                )
        return report()

    def redo(self, *ids: str) -> ChangeReport:
        """Bring facts back that were taken out; without ids, all that the last undo took.

        The last undo is reversed exactly, as long as nothing else happened since. Named facts come
        back with their stored columns, unless other facts on their keys ask for a new value.
        LedgerError if there is nothing to redo, or an id is unknown or in the model.
        """
        session, history = self._session, self.history
        with self._changed([]) as (report, run), session.transaction():
            if not ids:
                event = last_undone(history)
                by_id = {c.id: c for c in history.columns}
                session.activate(
                    "redo",
                    on=[by_id[i] for i in event.deactivated],
                    off=[by_id[i] for i in event.activated],
                )
                return report()
            wanted = [column for id_ in dict.fromkeys(ids) for column in newest(history, id_)]
            with session.transaction("redo") as trial:
                for group in by_group(wanted):
                    session.carry_out(plan_redo(self.history, group, session.near), "redo", run)
                trial.keep()
        return report()

    def restore(self) -> ChangeReport:
        """Take out everything: the base, bit for bit. `redo` brings it all back."""
        if not self.history.active:
            raise LedgerError("no fact is in the model: it is the base already")
        with self._changed(self.history.active) as (report, _), self._session.transaction():
            self._session.activate("restore", on=(), off=self.history.active)
        return report()

    def rebuild(self, *, values: bool = False, progress: Progress | None = None) -> ChangeReport:
        """Write the facts in the model anew, batch by batch, as if the others had never been.

        Keys and residuals are taken again, so that no trace of undone facts is left in them; the
        stored values stay, or with `values` are optimised again. A batch by gradient descends anew.
        """
        columns = self.history.active
        if not columns:
            raise LedgerError("no fact is in the model: there is nothing to rebuild")
        together = self._session.transaction("rebuild")
        with self._changed([], progress) as (report, run), together as trial:
            self._journal.commit("rebuild", [], deactivated=columns)
            self.weights.refresh()
            replay(self._session, self.history, columns, run, values=values)
            trial.keep()
        return report()

    def merge(
        self,
        other: History,
        *,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> ChangeReport:
        """Take over the facts of another ledger on the same base: one model with both.

        This ledger's facts first, then the other's, each batch in its epoch: keys and residuals are
        taken again, stored values stay but where two facts share a key. `decide`: what to do about
        each of `conflicts(other)`: first, second or neither. LedgerError if one is not decided.
        """
        choice = decided(conflicts(self.history, other), decide)
        held = self.history.active
        mine = [c for c in held if choice.get(c.fact.key, "first") == "first"]
        here = {c.fact.key for c in held}
        theirs = [
            c
            for c in other.active
            if choice.get(c.fact.key, "first" if c.fact.key in here else "second") == "second"
        ]
        with (
            self._changed([], progress) as (report, run),
            self._session.transaction("merge") as trial,
        ):
            names = with_own_ids(self.history, facts_of(theirs))
            run.notices += [f"{a.id}: named {b.id}, the id is taken" for a, b in names.items()]
            self._journal.commit("merge", [], deactivated=held)
            self.weights.refresh()
            replay(self._session, self.history, mine, run)
            replay(self._session, other, theirs, run, renamed=names)
            trial.keep()
        return report()

    @contextmanager
    def trial(self, *, writing: bool = True) -> Iterator[Trial]:
        """Changes inside are kept, all at once, only if `trial.keep()` is called.

        Else model, history and ledger are as before: edit, look, decide. `writing=False` for a mere
        look, which no other process at work on the ledger need hinder.
        """
        with self._session.transaction("", writing=writing) as trial:
            yield trial

    @contextmanager
    def writing(self) -> Iterator[None]:
        """No other process writes to the ledger inside; LedgerError if one does already."""
        with self._journal.writing():
            yield

    @contextmanager
    def _changed(
        self, gone: Sequence[Column], progress: Progress | None = None
    ) -> Iterator[tuple[Callable[[], ChangeReport], CallLog]]:
        """Watch a change; the report is asked for when it is made."""
        history, run = self.history, CallLog(progress)
        before = {c.id: c for c in history.active}
        known = len(history.columns)
        layer = max(self.weights.layers, default=-1)
        exact = self.weights.exact(layer) if layer >= 0 else None
        out = {c.id for c in gone}
        staying = [c for c in history.active if c.id not in out]
        near = self.weights.near(gone, staying, cosine=NEAR_KEY) if gone and staying else []

        def report() -> ChangeReport:
            now = {c.id: c for c in self.history.active}
            lost = facts_of(c for i, c in before.items() if i not in now)
            there = {c.fact.id for c in now.values()}
            fresh = facts_of(c for i, c in now.items() if i > known)
            moved = self.weights.moved(exact) if exact is not None else []
            back = facts_of(c for i, c in now.items() if i not in before and i <= known)
            return ChangeReport(
                removed=tuple(f.id for f in lost if f.id not in there),
                restored=tuple(f.id for f in back),
                rebuilt=tuple(f.id for f in fresh),
                near=by_fact(near),
                moved=by_fact(pair for pair in moved if pair[0].id in before),
                notices=tuple(run.notices),
            )

        with frozen(self.model), self._session.current_epoch():
            yield report, run

    def _agree(self, queue: Sequence[Fact]) -> None:
        """RankError unless all ranks are to do the same to the same."""
        if self.ranks.alone:
            return
        recipe = json.dumps(self.recipe.to_dict(), sort_keys=True)
        self.ranks.agree(
            {
                "model": self.history.base.hash,
                "recipe": sha256(recipe.encode()).hexdigest(),
                "seed": str(self.seed),
                "ledger": self.history.state_id,
                "list of facts": sha256(repr(queue).encode()).hexdigest(),
            }
        )

    def _by_gradient(self, column: Column) -> bool:
        epoch = self.history.epochs[self.history.epoch_of(column) - 1]
        return find_method(epoch.recipe.method.name).by_gradient
