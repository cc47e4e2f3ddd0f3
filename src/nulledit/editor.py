"""The driver: facts in batches, through keys, values and solves, into weights and ledger."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.batch import BatchWriter, Progress, Run, Written
from nulledit.config import Recipe, layers_by_depth, load_recipe, shipped_recipes
from nulledit.data.facts import Fact
from nulledit.editing.contexts import make_contexts
from nulledit.editing.queue import batches, merged
from nulledit.editing.statistics import Statistics, find_statistics
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import plan_rows
from nulledit.errors import ConfigError, FactError, LedgerError, ModelError, StatisticsError
from nulledit.ledger.checkpoint import write_model
from nulledit.ledger.entries import Base, Column, History
from nulledit.ledger.journal import Journal
from nulledit.ledger.opening import open_epoch
from nulledit.ledger.store import Store
from nulledit.ledger.weights import EditedWeights, LayerReport
from nulledit.methods import find_method
from nulledit.models.layouts import as_out_in, frozen, parameter_name, write_weight
from nulledit.models.load import load_model, model_hash
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import RowEncoder, context_length

logger = logging.getLogger(__name__)

NEAR_KEY = 0.9  # cosine of keys above which an undo names an edit as near


@dataclass(frozen=True)
class EditReport:
    """What `Editor.edit` did."""

    columns: tuple[Column, ...]
    """Those of the facts asked for, as they are now; `column.outcome` says how z was reached."""
    layers: tuple[LayerReport, ...]
    """The state after the last batch."""
    notices: tuple[str, ...]
    """Facts known, replaced, repeated, or joined with others on one key."""
    seconds: dict[str, float]
    """Wall time by stage: values, keys, solve."""
    optimised: int = 0
    """Values that were optimised in this call, not taken from a cache."""


@dataclass(frozen=True)
class UndoReport:
    """What `Editor.undo` did."""

    removed: tuple[str, ...]
    """Ids of the facts taken out."""
    restored: tuple[str, ...]
    """Ids of facts whose older columns came back."""
    rebuilt: tuple[str, ...]
    """Ids of facts on the same key whose values were optimised again."""
    near: tuple[tuple[str, float], ...]
    """Edits on nearly the same key: (id, cosine), nearest first."""
    moved: tuple[tuple[str, float], ...]
    """How the others moved: (id, ‖change at its key‖/‖what was written there‖), largest first."""


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
    ):
        """Take a `model` as the base of edits; its weights are changed in place.

        `recipe`: a Recipe, a file, or a shipped recipe's name; left out, the shipped one called
        `name`, else the published settings on five layers chosen by depth. `statistics`: of this
        model's keys; left out, shipped or cached ones are looked for at the first edit.
        `value_cache`: a folder that keeps optimised values for any editor that asks for the same.
        """
        self.model, self.tokenizer = model, tokenizer
        self.partial = PartialModel(model)
        self.encoder = RowEncoder(tokenizer, max_length=context_length(model.config))
        self.recipe = resolve_recipe(recipe, name, self.partial)
        self.seed = seed
        self._statistics = statistics
        self.value_cache = None if value_cache is None else ValueCache(Path(value_cache))
        base = Base(
            model=name,
            hash=model_hash(model),
            dtype=str(model.dtype).removeprefix("torch."),
            recipe=self.recipe.to_dict(),
            seed=seed,
        )
        self._journal = Journal(History(base))
        self.weights = EditedWeights(self.partial, self.history)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        recipe: Recipe | str | Path | None = None,
        statistics: Statistics | str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        seed: int = 0,
        value_cache: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a model by name (`smollm2-135m`), folder or Hub id and make an editor of it."""
        model, tokenizer = load_model(
            name, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return cls(
            model,
            tokenizer,
            recipe=recipe,
            statistics=statistics,
            name=name,
            seed=seed,
            value_cache=value_cache,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        value_cache: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Take up what `save` (or `nulledit edit`) left in `folder`; later edits are written there.

        The base comes from the folder's own model with W₀ from the ledger put back; if there is no
        model in it (an interrupted first run), from where it was first loaded. Either must have the
        recorded hash.
        """
        folder = Path(folder)
        store = Store(folder / "ledger")
        history = store.load()
        saved = folder / "model"
        source = str(saved) if (saved / "config.json").is_file() else history.base.model
        if not source:
            raise LedgerError(f"{folder}: has no model, and its base was an object in memory")
        model, tokenizer = load_model(
            source,
            device=device,
            dtype=history.base.dtype,
            trust_remote_code=trust_remote_code,
        )
        return cls._resumed(store, history, model, tokenizer, source, value_cache)

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
        store = Store(Path(folder) / "ledger")
        editor = cls._resumed(store, store.load(), model, tokenizer, "the given model", value_cache)
        editor._statistics = statistics
        return editor

    @classmethod
    def _resumed(
        cls,
        store: Store,
        history: History,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        value_cache: str | Path | None,
    ) -> Self:
        recipe = Recipe.from_dict(history.base.recipe)
        if history.epochs:
            partial = PartialModel(model)
            for layer in recipe.layers:
                base = history.tensors[history.epoch.tensors][f"base.{layer}"]
                write_weight(partial.mlp_out(layer), base)
        editor = cls(
            model,
            tokenizer,
            recipe=recipe,
            name=history.base.model,
            seed=history.base.seed,
            value_cache=value_cache,
        )
        found = editor.history.base.hash
        if found != history.base.hash:
            raise LedgerError(
                f"{source}: its weights without the edits have hash {found[:12]}, the ledger's "
                f"base has {history.base.hash[:12]}: this is another model, or one changed by hand"
            )
        editor._journal = Journal(history, store)
        editor.weights = EditedWeights(editor.partial, history)
        return editor

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self._journal.history

    @property
    def facts(self) -> list[Fact]:
        """The facts that are in the model now, in the order they were edited."""
        return _facts_of(self.history.active)

    def attach(self, folder: str | Path) -> None:
        """Keep the ledger in `folder`/ledger from now on: every batch is committed as it ends."""
        self._journal.keep_in(Path(folder) / "ledger")

    def save(self, folder: str | Path) -> None:
        """Write the ledger (first) and the edited model, an ordinary Hugging Face folder."""
        target = Store(Path(folder) / "ledger")
        store = self._journal.store
        if store is None:
            self.attach(folder)
        elif store.folder.resolve() != target.folder.resolve():
            self._journal.copy_to(target)
        self.save_model(Path(folder) / "model")

    def save_model(self, folder: Path) -> None:
        """Bring the model in `folder` to the ledger's state; nothing is done if it is there."""
        write_model(
            self.model,
            self.tokenizer,
            folder,
            state_id=self.history.state_id,
            base_hash=self.history.base.hash,
            edited=[parameter_name(self.model, layer) for layer in self.weights.layers],
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
        facts: Iterable[Fact],
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        progress: Progress | None = None,
    ) -> EditReport:
        """Write `facts` into the model, in batches of `batch_size` (the recipe's by default).

        A queue is put in an order of its own, fixed by the seed, since order decides what survives
        (`shuffle=False`: the given one). Every fact is checked before the first batch. After an
        error or an interruption the model and the ledger are as after the last finished batch, and
        the same call goes on from there with the same result.
        """
        size = self.recipe.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch_size is {size}; expected 1 or more")
        run = Run(progress)
        queue = self._admit(facts, run)
        if queue:
            with frozen(self.model), self._restored_after_errors():
                self._begin_epoch()
                self._check_rows(queue, run)
                done = 0
                if find_method(self.recipe.method.name).one_by_one:
                    size = 1
                for batch in batches(queue, size, seed=self.seed if shuffle else None):
                    run.tell("batches", done, len(queue))
                    self._edit_batch(batch, run)
                    done += len(batch)
        asked = {fact.id for fact in queue}
        columns = tuple(c for c in self.history.present if c.fact.id in asked)
        layers = self.weights.reports()
        return EditReport(columns, layers, tuple(run.notices), run.seconds, run.optimised)

    def undo(self, *ids: str) -> UndoReport:
        """Take facts out again, exactly: the weights become the solve without their columns.

        An answer that an undone fact had replaced comes back; facts on the same key as it are
        rebuilt without it. LedgerError if an id is not in the model.
        """
        active = {c.fact.id: c for c in self.history.active}
        for id_ in ids:
            if id_ not in active:
                raise LedgerError(f"no fact {id_!r} in the model; in it are: {_some(active)}")
        if not ids:
            raise LedgerError("no fact to undo was named")
        before = self.weights.exact(self.weights.layers[-1])
        gone = [c for c in self.history.active if c.fact.id in ids]
        dropped = self._with_groups(gone)
        staying = [c for c in self.history.active if c not in dropped]
        near = self.weights.near(gone, staying, cosine=NEAR_KEY)
        restored: list[Column] = []
        rebuild: list[Column] = []  # columns of the facts to optimise again
        for group in _by_group(dropped):
            back = [c for c in group if c not in gone]
            back += self._journal.answers_behind([c for c in group if c in gone])
            version = self._journal.stored_version(_facts_of(back)) if back else []
            shared = self.weights.near(version or [], staying + restored, cosine=self._same)
            if version is None or shared:
                rebuild += back
            else:
                restored += version
        with frozen(self.model), self._restored_after_errors():
            if rebuild:
                self._edit_batch(
                    _facts_of(rebuild),
                    Run(None),
                    kind="undo",
                    dropped=dropped,
                    restored=restored,
                    behind={c.fact.key: c for c in rebuild},
                )
            else:
                self._journal.commit("undo", [], activated=restored, deactivated=dropped)
                self.weights.refresh()
        return UndoReport(
            removed=tuple(fact.id for fact in _facts_of(gone)),
            restored=tuple(fact.id for fact in _facts_of(restored)),
            rebuilt=tuple(fact.id for fact in _facts_of(rebuild)),
            near=_by_fact(near),
            moved=_by_fact(self.weights.moved(before)),
        )

    # -- one batch ---------------------------------------------------------------------------

    def _edit_batch(
        self,
        facts: Sequence[Fact],
        run: Run,
        *,
        kind: str = "edit",
        dropped: Sequence[Column] = (),
        restored: Sequence[Column] = (),
        behind: Mapping[tuple[str, str], Column] | None = None,
    ) -> None:
        """Edit `facts` together and commit; `dropped` columns leave first, `restored` come back.

        An older answer to the same question leaves as well. Facts that share a key with a new one,
        or a value with one that leaves, are optimised again, so that one value says all of them.
        `behind`: columns that new ones stand in for, by question, beside those that leave here.
        """
        asked = {fact.key: fact for fact in facts}
        present = [c for c in self.history.active if c not in dropped] + list(restored)
        present.sort(key=lambda c: c.id)
        older = [c for c in present if c.fact.key in asked]
        run.notices += [
            f"{asked[fact.key].id}: the older answer {fact.target!r} of {fact.id} is replaced"
            for fact in _facts_of(older)
        ]
        writer = self._writer(facts, run)
        near = self.weights.near_keys(writer.first_keys, present, cosine=self._same)
        if writer.method.by_gradient:
            near = []  # it shares no value between facts on one key
        touched = self._with_groups([*older, *(c for c, _ in near)], among=present)
        joined = _facts_of(c for c in touched if c.fact.key not in asked)
        if joined:
            names = _some(fact.id for fact in joined)
            run.notices.append(f"{names}: optimised again with a new fact on the same key")
            writer = self._writer([*joined, *facts], run)
        leaving = [*dropped, *touched]
        staying = [c for c in present if c not in touched]
        if leaving or restored:
            self.weights.refresh(staying)
        written = writer.write(staying)
        stand_in = {**(behind or {}), **{c.fact.key: c for c in touched}}
        made = self._columns(writer, written, stand_in)
        unknown = {c.fact.id for c in made if not c.outcome["known"]}
        known = _facts_of(c for c in made if c.fact.id not in unknown)
        if known:
            names = _some(fact.id for fact in known)
            run.notices.append(f"{names}: said by the model already; written all the same")
        back = [c for c in restored if c in staying]
        self._journal.commit(
            kind, made, deactivated=leaving, activated=back, tensors=written.tensors
        )

    def _writer(self, facts: Sequence[Fact], run: Run) -> BatchWriter:
        return BatchWriter(
            self.partial,
            self.tokenizer,
            self.encoder,
            self.recipe,
            self.weights,
            self.history.epoch.contexts,
            facts,
            run,
            base_hash=self.history.base.hash,
            cache=self.value_cache,
        )

    def _columns(
        self, writer: BatchWriter, written: Written, stand_in: dict[tuple[str, str], Column]
    ) -> list[Column]:
        first = len(self.history.columns) + 1
        columns = []
        for i, request in enumerate(writer.requests):
            fact = writer.facts[request.owner]
            columns.append(
                Column(
                    id=first + i,
                    batch=len(self.history.batches) + 1,
                    row=i,
                    group=first + written.groups[i],
                    fact=fact,
                    active=True,
                    outcome=written.outcomes[i],
                    replaces=stand_in[fact.key].id if fact.key in stand_in else 0,
                    part=request.part,
                )
            )
        return columns

    def _with_groups(
        self, columns: Sequence[Column], among: Sequence[Column] | None = None
    ) -> list[Column]:
        """All columns (active ones by default) that share a group with one of `columns`."""
        hit = {(c.batch, c.group) for c in columns}
        candidates = self.history.active if among is None else among
        return [c for c in candidates if (c.batch, c.group) in hit]

    # -- around a batch ----------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        if self.history.epochs:
            return
        refusal: StatisticsError | None = None
        for statistics in self._candidates():
            try:
                opening = open_epoch(self.partial, self.recipe, statistics)
            except StatisticsError as error:
                refusal = refusal or error  # full ones in the cache may serve what shipped don't
                continue
            contexts = make_contexts(
                self.model, self.tokenizer, self.recipe.contexts, seed=self.seed
            )
            epoch, tensors = opening(contexts, self.seed)
            self._journal.begin(epoch, tensors)
            self.weights.refresh()
            return
        base, layers = self.history.base, ",".join(map(str, self.recipe.layers))
        raise refusal or StatisticsError(
            "no statistics of this model's preserved keys: make them once with "
            f"`nulledit stats make {base.model or 'MODEL'} --text CORPUS --layers {layers}`"
        )

    @contextmanager
    def _restored_after_errors(self) -> Iterator[None]:
        """Whatever ends the inside early, the weights are those of the history again."""
        try:
            yield
        except BaseException:
            self.weights.refresh()
            raise

    def _admit(self, facts: Iterable[Fact], run: Run) -> list[Fact]:
        """Facts that are not in the model yet, one per question.

        Several wordings of one question with one answer become one fact with several prompts, also
        together with an active fact. FactError for contradictions and for an id used twice.
        """
        held = {c.fact.key: c.fact for c in self.history.active}
        owner = {c.fact.id: c.fact.key for c in self.history.columns}
        queue: dict[tuple[str, str], Fact] = {}
        for fact in facts:
            if owner.setdefault(fact.id, fact.key) != fact.key:
                raise FactError(
                    f"id {fact.id!r} names two facts, the second about {fact.subject!r}; "
                    "give another id"
                )
            other = queue.get(fact.key)
            if other is not None and other.target != fact.target:
                raise FactError(
                    f"{other.id} and {fact.id} contradict each other on {fact.subject!r}: "
                    f"{other.target!r} and {fact.target!r}; keep one of them"
                )
            known = other or held.get(fact.key)
            if known is None or known.target != fact.target:
                queue[fact.key] = fact
            elif set(fact.prompts) <= set(known.prompts):
                run.notices.append(f"{fact.id}: repeats {known.id}, left out")
            else:
                run.notices.append(f"{fact.id}: another wording of {known.id}, edited as one fact")
                queue[fact.key] = merged(known, fact)
        return list(queue.values())

    def _check_rows(self, facts: Sequence[Fact], run: Run) -> None:
        """Tokenise every row once, so that a prompt too long is refused before any work."""
        for fact in facts:
            try:
                bare = plan_rows(fact, self.encoder, self.history.epoch.contexts)[0]
                if bare.subject_last == 0:
                    run.notices.append(
                        f"{fact.id}: the subject is the text's first token, which models use as an "
                        "attention sink; the edit may not take hold: put words before it"
                    )
                self.encoder.encode_template(self.recipe.values.kl_prompt, fact.subject)
            except FactError as error:
                raise FactError(f"fact {fact.id}: {error}") from error

    def _candidates(self) -> Iterator[Statistics]:
        """The statistics given, or those found, that are of this model and cover its layers."""
        given = self._statistics
        if given is None:
            yield from find_statistics(self.history.base.hash, self.recipe.layers)
            return
        statistics = given if isinstance(given, Statistics) else Statistics.load(Path(given))
        statistics.check(self.history.base.hash, self.recipe.layers)
        yield statistics

    @property
    def _same(self) -> float:
        return self.recipe.same_key


def _facts_of(columns: Iterable[Column]) -> list[Fact]:
    """Their facts, each once."""
    return list(dict.fromkeys(column.fact for column in columns))


def _by_fact(found: Iterable[tuple[Column, float]]) -> tuple[tuple[str, float], ...]:
    """(id, number) with the first number of each fact."""
    first: dict[str, float] = {}
    for column, number in found:
        first.setdefault(column.fact.id, number)
    return tuple(first.items())


def _by_group(columns: Sequence[Column]) -> list[list[Column]]:
    groups: dict[tuple[int, int], list[Column]] = {}
    for column in columns:
        groups.setdefault((column.batch, column.group), []).append(column)
    return list(groups.values())


def resolve_recipe(recipe: Recipe | str | Path | None, name: str, model: PartialModel) -> Recipe:
    """The recipe to use on `model`, with layers; ModelError where they don't fit it."""
    if recipe is None:
        recipe = name if name in shipped_recipes() else Recipe()
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    top = model.depth - 1
    if not recipe.layers:
        chosen = layers_by_depth(model.depth)
        logger.warning("the recipe names no layers; chosen by depth: %s", list(chosen))
        recipe = replace(recipe, layers=chosen)
    last = recipe.layers[-1]
    if last > top:
        raise ModelError(f"layer {last} is out of range: the model has layers 0 to {top}")
    if last == top:
        raise ModelError(
            f"layer {top} is the model's last: nothing above it would read the edit; "
            f"choose layers up to {top - 1}"
        )
    find_method(recipe.method.name).check(recipe)
    for layer in recipe.layers:
        as_out_in(model.mlp_out(layer))
    return recipe


def _some(names: Iterable[Any], most: int = 5) -> str:
    shown = [str(n) for n in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
