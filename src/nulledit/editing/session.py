"""Changes of a model and its ledger: which batch is written on what, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from nulledit.config import Recipe, ValueSettings
from nulledit.data.facts import Fact, refuse_forgetting, suggest
from nulledit.editing.batch import BatchResult, BatchWriter, KnownValues
from nulledit.editing.call_log import CallLog
from nulledit.editing.contexts import make_contexts
from nulledit.editing.displacement import of_batch
from nulledit.editing.epochs import Opening, check_joins, open_epoch
from nulledit.editing.keys import Walk
from nulledit.editing.stronger import differences
from nulledit.editing.undo import Plan, check_id, facts_of, with_groups
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import plan_rows, wordings
from nulledit.editing.weights import EditedWeights
from nulledit.errors import FactError, LedgerError, StatisticsError
from nulledit.ledger.journal import Journal, Trial
from nulledit.ledger.records import Column, Epoch, History
from nulledit.ledger.store import tensor_bytes
from nulledit.ledger.tensors import read_spectrum
from nulledit.methods import Method, find_method
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import model_hash
from nulledit.parallel.ranks import Ranks
from nulledit.statistics.found import find_statistics, refuse_empty
from nulledit.statistics.manifest import INPUTS, KEYS, Manifest
from nulledit.statistics.spectra import Statistics


class EditSession:
    """Carries out changes of one model and keeps its ledger in step."""

    def __init__(
        self,
        model: EditableModel,
        journal: Journal,
        *,
        recipe: Recipe,
        statistics: Statistics | str | Path | None,
        cache: ValueCache | None,
        ranks: Ranks | None = None,
    ):
        """`recipe` and `statistics` are those of the current epoch, or of the next one to open."""
        self._plain = self._asked = model
        self.journal, self.recipe, self.cache = journal, recipe, cache
        self.statistics, self.ranks = _accepted(statistics), ranks or Ranks()
        self.weights = EditedWeights(model, journal)
        self._opens = not journal.history.epochs  # whether the next batch begins an epoch

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.journal.history

    @property
    def seed(self) -> int:
        """Of contexts and queues."""
        return self.history.base.seed

    @property
    def method(self) -> Method:
        """Of the recipe."""
        return find_method(self.recipe.method.name)

    @property
    def model(self) -> EditableModel:
        """The model, asked as the recipe asks it: in plain text, or in the chat template.

        ModelError where the tokenizer's template is not the recipe's.
        """
        if self._asked.chat != self.recipe.chat:
            self._asked = self._plain.in_chat(self.recipe.chat)
        return self._asked

    def next_epoch(self, recipe: Recipe, statistics: Statistics | str | Path | None) -> None:
        """Have the next batch begin an epoch with these."""
        self.recipe, self.statistics, self._opens = recipe, _accepted(statistics), True

    def near(self, columns: Sequence[Column], others: Sequence[Column]) -> list[Column]:
        """Those of `others` on the same key as one of `columns`, whose values must be one."""
        if self.method.by_gradient:
            return []  # it shares no value between facts on one key
        cosine = self.recipe.same_key
        return [c for c, _ in self.weights.near(columns, others, cosine=cosine)]

    @contextmanager
    def current_epoch(self) -> Iterator[None]:
        """The recipe of the epoch there is inside, though `next_epoch` asked for another one."""
        due = (self.recipe, self._opens) if self._opens and self.history.epochs else None
        if due:
            self.recipe, self._opens = self.history.epoch.recipe, False
        try:
            yield
        finally:
            if due:
                self.recipe, self._opens = due

    # -- whole or not at all -----------------------------------------------------------------

    @contextmanager
    def transaction(self, kind: str | None = None, *, writing: bool = True) -> Iterator[Trial]:
        """On any exit but success, model and history are as before.

        Without a `kind` each change inside reaches the ledger as it is made, and those that were
        made stay where a later one fails. With one all are one event of that kind, or, where it is
        empty, the events they are; they are made at the end, and only if the trial is kept.

        `writing`: no other process may write in the meantime. LedgerError, before anything is done,
        if something else wrote to the model.
        """
        self.weights.check_unchanged()
        before, states = self.history.counts, self.weights.states()
        settings = self.recipe, self.statistics, self._opens
        trial = Trial()
        with self.journal.writing() if writing else nullcontext():
            try:
                with nullcontext(trial) if kind is None else self.journal.together(kind) as trial:
                    yield trial
                    trial.kept = trial.kept or kind is None
            finally:
                if not trial.kept:
                    self.journal.drop_empty_epoch()
                    if self.history.counts == before:
                        self.weights.return_to(states)
                        self.recipe, self.statistics, self._opens = settings
                    else:  # changes that were made stay
                        self.weights.refresh()

    # -- epochs ------------------------------------------------------------------------------

    def open_epoch(self) -> None:
        """Begin the epoch that is due, if one is; StatisticsError where statistics are missing."""
        if not self._opens:
            return
        statistics, opening = self._opening()
        with self.weights.holding([]):  # the base's own words, whatever was edited
            contexts = make_contexts(self.model, self.recipe.contexts, seed=self.seed)
        manifest = json.dumps(asdict(statistics.manifest), sort_keys=True)
        self.ranks.agree({"set of statistics": sha256(manifest.encode()).hexdigest()})
        contexts = tuple(self.ranks.from_first(contexts)[0])
        self._begin(*opening(contexts, self.seed))

    def check_statistics(self) -> None:
        """StatisticsError if an epoch is due that no statistics serve."""
        if self._opens:
            self._opening()

    def _opening(self) -> tuple[Statistics, Opening]:
        """The first statistics that serve the recipe, and what makes the epoch with them."""
        refusal: StatisticsError | None = None
        for statistics in self._candidates():
            try:
                return statistics, open_epoch(self.model, self.recipe, statistics, self.history)
            except StatisticsError as error:
                refusal = refusal or error  # full ones in the cache may serve what shipped don't
        base, layers = self.history.base, ",".join(map(str, self.recipe.layers))
        dtype = "" if base.dtype == "float64" else f" --dtype {base.dtype}"  # part of its hash
        kind, what = ("inputs", "MLP inputs") if self.method.apart else ("keys", "preserved keys")
        raise refusal or StatisticsError(
            f"no statistics of this model's {what}: make them once with "
            f"`nulledit stats make {base.model or 'MODEL'} --text CORPUS --layers {layers}{dtype}"
            f" --{kind}` (CORPUS: text of 100,000 tokens or more, as a file, a folder, or "
            "datasets:wikimedia/wikipedia:20231101.en with --tokens)"
        )

    def take_up(self, epoch: Epoch, source: History) -> None:
        """Go on in `epoch` of `source`, or in a copy of it if it is not the current one."""
        if self.history.epochs and not self._opens and _same(self.history.epoch, epoch):
            return
        check_joins(epoch.recipe, self.history)
        tensors = dict(source.tensors[epoch.tensors])
        for layer in epoch.recipe.layers:
            if layer not in self.history.layers:
                tensors[f"base.{layer}"] = source.original(layer)
        copy = replace(epoch, id=len(self.history.epochs) + 1, tensors=tensor_bytes(tensors)[0])
        self.recipe = epoch.recipe
        self._begin(copy, tensors)

    def _begin(self, epoch: Epoch, tensors: dict[str, Tensor]) -> None:
        self.journal.begin(epoch, tensors)
        self._opens = False
        self.weights.refresh()

    def _candidates(self) -> Iterator[Statistics]:
        """The statistics given, else the run's own, then those found, that cover the layers."""
        given, base = self.statistics, self.history.base.hash
        mlp_out = self.model.named_matrix
        if given is None:
            yield from self._recorded(mlp_out)
            yield from find_statistics(base, self.recipe.layers, mlp_out, inputs=self.method.apart)
            return
        if isinstance(given, Statistics):
            statistics = given
        else:
            kind = INPUTS if self.method.apart else KEYS
            statistics = Statistics.load(Path(given), kind=kind)
        if statistics.manifest.model_hash != base and self.history.events:
            base = model_hash(self.model.model)  # a refreshed second moment: of the model as it is
        statistics.check(base, self.recipe.layers, mlp_out, inputs=self.method.apart)
        yield statistics

    def _recorded(self, mlp_out: str) -> Iterator[Statistics]:
        """What the ledger holds of the kind that the method reads, the latest first.

        An epoch keeps as much of the spectra as its filter needs; another one may need more.
        """
        layers = self.recipe.layers
        for epoch in reversed(self.history.epochs):
            try:
                manifest = Manifest.from_json(json.dumps(epoch.statistics), "the run's statistics")
            except StatisticsError:  # of another version's format
                continue
            of_it = manifest.inputs == self.method.apart and manifest.mlp_out == mlp_out
            if of_it and set(layers) <= set(epoch.layers):
                tensors = self.history.tensors[epoch.tensors]
                spectra = {layer: read_spectrum(tensors, layer)[0] for layer in layers}
                yield Statistics(manifest, spectra)

    # -- one batch ---------------------------------------------------------------------------

    def carry_out(self, plan: Plan, kind: str, run: CallLog) -> None:
        """Make a planned change, as one event."""
        if plan.remade:
            self.batch(
                facts_of(plan.remade),
                run,
                kind=kind,
                dropped=plan.dropped,
                restored=plan.restored,
                replaced={c.fact.key: c for c in plan.remade},
            )
            return
        self.activate(kind, on=plan.restored, off=plan.dropped)

    def activate(self, kind: str, *, on: Sequence[Column], off: Sequence[Column]) -> None:
        """Bring recorded columns back, take others out, as one event.

        The weights come first: what can't be solved must not reach the ledger.
        """
        back, gone = {c.id for c in on}, {c.id for c in off}
        self.weights.refresh(
            [c for c in self.history.columns if c.id in (self.history.active_ids | back) - gone]
        )
        self.journal.commit(kind, [], activated=on, deactivated=off)

    def batch(
        self,
        facts: Sequence[Fact],
        run: CallLog,
        *,
        kind: str = "edit",
        dropped: Sequence[Column] = (),
        restored: Sequence[Column] = (),
        replaced: Mapping[tuple[str, str], Column] | None = None,
        given: KnownValues | None = None,
        values: ValueSettings | None = None,
    ) -> None:
        """Edit `facts` together and commit; `dropped` columns leave first, `restored` come back.

        An older answer to the same question leaves as well. Facts that share a key with a new one,
        or a value with one that leaves, are optimised again, so that one value says all of them.
        `replaced`: columns that new ones stand in for, by question, beside those that leave here.
        `given`: values, where they are known; then no older fact may share a key with a new one.
        `values`: settings of their optimisation in the place of the recipe's.
        """
        asked, before = {fact.key: fact for fact in facts}, self.weights.states()
        out = {c.id for c in dropped}
        present = [c for c in self.history.active if c.id not in out] + list(restored)
        present.sort(key=lambda c: c.id)
        older = [c for c in present if c.fact.key in asked]
        run.notices += [
            _instead(asked[fact.key], fact)
            for fact in facts_of(older)
            if fact.demand != asked[fact.key].demand
        ]
        writer = self.writer(facts, run, values)
        near = self.on_key(writer.first_keys, present)
        touched = with_groups([*older, *near], present)
        joined = facts_of(c for c in touched if c.fact.key not in asked)
        if joined:
            if given:
                raise LedgerError("facts with given values share a key with others")
            names = some(fact.id for fact in joined)
            run.notices.append(f"{names}: optimised again with a new fact on the same key")
            writer = self.writer([*joined, *facts], run, values, walked=writer.walk)
        forgotten = [fact.id for fact in writer.facts if fact.forget]
        if self.method.by_gradient and forgotten:
            raise FactError(
                f"{some(forgotten)}: to be forgotten, and of one value with a fact that leaves; "
                f"{self.method.name} only writes answers and can't find another: take it out as "
                "well, or change to a method that optimises values first"
            )
        leaving = [*dropped, *touched]
        gone = {c.id for c in leaving}
        staying = [c for c in present if c.id not in gone]
        if leaving or restored:
            self.weights.refresh(staying)
            if self.weights.layers[0] < self.recipe.layers[0]:  # what walks came through
                writer = self.writer(writer.facts, run, values)
        written = writer.write(staying, given)
        stand_in = {**(replaced or {}), **{c.fact.key: c for c in touched}}
        if values:
            changed = differences(self.recipe.values, values)
            outcomes = [replace(outcome, settings=changed) for outcome in written.outcomes]
            written = replace(written, outcomes=outcomes)
        made = self._columns(writer, written, stand_in)
        unknown = {c.fact.id for c in made if not c.outcome.known}
        known = facts_of(c for c in made if c.fact.id not in unknown)
        without = " once the edits that are made anew were taken out" * bool(leaving)
        told = (
            (False, "said by the model already; written all the same"),
            (
                True,
                f"the model did not say the answer that is to be forgotten{without}; it is "
                "suppressed all the same",
            ),
        )
        for forget, state in told:
            such = [fact.id for fact in known if fact.forget == forget]
            if such and not given:
                run.notices.append(f"{some(such)}: {state}")
        back = [c for c in restored if c.id not in gone]
        hashes = [b.tensors for b in self.history.batches] + [c.fact.id for c in made]
        self.ranks.agree({"state": sha256(json.dumps(hashes).encode()).hexdigest()})
        self.journal.commit(
            kind, made, deactivated=leaving, activated=back, tensors=written.tensors
        )
        if staying:
            run.displaced.append(of_batch(self.weights, before, staying, made[0].batch))

    def on_key(self, keys: Tensor, others: Sequence[Column]) -> list[Column]:
        """Those of `others` on the same first-layer key as one of `keys` [d_in, n]."""
        if self.method.by_gradient:
            return []
        found = self.weights.near_keys(keys, others, cosine=self.recipe.same_key)
        return [column for column, _ in found]

    def writer(
        self,
        facts: Sequence[Fact],
        run: CallLog,
        values: ValueSettings | None = None,
        walked: Walk | None = None,
    ) -> BatchWriter:
        """Brings `facts` to the first edited layer; `values` as for `batch`.

        `walked`: a walk of the last of them, which is there.
        """
        return BatchWriter(
            self.model,
            replace(self.recipe, values=values) if values else self.recipe,
            self.weights,
            self.history.epoch.contexts,
            facts,
            run,
            cache=self.cache,
            ranks=self.ranks,
            walked=walked,
        )

    def keys_alone(self, facts: Sequence[Fact], run: CallLog) -> Tensor:
        """Keys [d_in, n] of `facts` at the first edited layer of the unedited model.

        Each is made on its own, so that its bits do not depend on the facts beside it.
        """
        keys, counter = [], run.counter("keys", len(facts))
        with self.weights.holding([]):
            for fact in facts:
                keys.append(self.writer([fact], run).first_keys[:, :1])
                counter(1)
        return torch.cat(keys, dim=1)

    def agree(self, facts: Sequence[Fact]) -> None:
        """RankError unless all ranks are to do the same to the same."""
        if self.ranks.alone:
            return
        recipe = json.dumps(self.recipe.to_dict(), sort_keys=True)
        listed = json.dumps([fact.to_dict() for fact in facts])
        self.ranks.agree(
            {
                "model": self.history.base.hash,
                "recipe": sha256(recipe.encode()).hexdigest(),
                "seed": str(self.seed),
                "ledger": self.history.state_id,
                "list of facts": sha256(listed.encode()).hexdigest(),
            }
        )

    def check_rows(self, facts: Sequence[Fact], run: CallLog) -> None:
        """Refuse before any work what can't be done: a prompt too long, forgetting by gradient."""
        if self.method.by_gradient:
            refuse_forgetting(facts, self.method.name)
        contexts, values = self.history.epoch.contexts, self.recipe.values
        worded = wordings(facts, range(len(facts)), contexts, values.rewordings)
        for fact, others in zip(facts, worded, strict=True):
            try:
                bare = plan_rows(fact, self.model.encoder, contexts, others)[0]
                if bare.subject_last == 0:
                    run.notices.append(
                        f"{fact.id}: the subject is the text's first token, which models use as an "
                        "attention sink; the edit may not take hold: put words before it"
                    )
                for prompt in (values.kl_prompt, *values.held_relations):
                    self.model.encoder.encode_template(prompt, fact.subject)
            except FactError as error:
                raise FactError(f"fact {fact.id}: {error}") from error

    def _columns(
        self, writer: BatchWriter, written: BatchResult, stand_in: dict[tuple[str, str], Column]
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
                    outcome=written.outcomes[i],
                    replaces=stand_in[fact.key].id if fact.key in stand_in else 0,
                    part=request.part,
                )
            )
        return columns


def _instead(new: Fact, old: Fact) -> str:
    """What becomes of an earlier answer to the question of `new`."""
    if old.forget:
        return f"{new.id}: {old.target!r} was suppressed by {old.id}, which is taken out"
    if new.forget:
        return f"{new.id}: the edit {old.id}, which wrote {old.target!r}, is taken out"
    return f"{new.id}: the older answer {old.target!r} of {old.id} is replaced"


def _same(a: Epoch, b: Epoch) -> bool:
    """Whether both solve alike; one may hold a W₀ that an earlier epoch holds for the other."""
    return replace(a, id=0, tensors="") == replace(b, id=0, tensors="")


def _accepted(statistics: Statistics | str | Path | None) -> Statistics | str | Path | None:
    """`statistics`, where they can be any; StatisticsError at the door else."""
    if not isinstance(statistics, Statistics | str | Path | None):
        raise StatisticsError(
            f"statistics is a {type(statistics).__name__}; expected Statistics or their folder "
            "(make them by `nulledit stats make`)"
        )
    if isinstance(statistics, str):
        refuse_empty(statistics)
    return statistics


def check_in_model(ids: Iterable[str], history: History) -> None:
    """LedgerError if one of `ids` is of no fact in the model; names a near one."""
    active = dict.fromkeys(c.fact.id for c in history.active)
    for id_ in ids:
        check_id(id_)
        if id_ not in active:
            if not active:
                raise LedgerError(f"no fact {id_!r} in the model: there are no facts in it")
            near = suggest(id_, active)
            raise LedgerError(f"no fact {id_!r} in the model{near}; in it are: {some(active)}")


def some(names: Iterable[object], most: int = 5) -> str:
    """The first of `names`, and how many more."""
    shown = [str(n) for n in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
