"""The driver: facts in batches, through keys, values and solves, into weights and ledger."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import Recipe, load_recipe, shipped_recipes
from nulledit.data.facts import Fact
from nulledit.editing.contexts import make_contexts
from nulledit.editing.keys import Walk
from nulledit.editing.statistics import Statistics, find_statistics
from nulledit.editing.values import optimise_values, plan_rows
from nulledit.errors import FactError, LedgerError, ModelError, StatisticsError
from nulledit.ledger.checkpoint import write_model
from nulledit.ledger.entries import Base, Batch, Column, Epoch, Event, History
from nulledit.ledger.fold import fold, metric_of, metric_tensors, solve_joint
from nulledit.ledger.store import Store, tensor_bytes
from nulledit.linalg.spectrum import RULES
from nulledit.methods.registry import find_method
from nulledit.models.layouts import as_out_in, frozen, parameter_name, write_weight
from nulledit.models.load import load_model, model_hash
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import RowEncoder, context_length, pad_id

logger = logging.getLogger(__name__)

NEAR_KEY = 0.9  # cosine of keys above which an undo names an edit as near
CPU_POSITIONS = 200  # small chunks stay in a processor's cache
ACCELERATOR_POSITIONS = 16384

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerReport:
    """What the edits do to one layer."""

    layer: int
    """Block number."""
    protected: int
    """Directions that edits may not use, of d_in."""
    d_in: int
    """Width of the keys."""
    free_share: float
    """Mean ‖Pk‖²/‖k‖² of the edit keys: the share that edits may use."""
    update_share: float
    """‖Δ‖/‖W₀‖ of all edits so far."""
    rounding_share: float
    """‖rounding‖/‖Δ‖: what storing in the model's dtype costs."""


@dataclass(frozen=True)
class EditReport:
    """What `Editor.edit` did."""

    columns: tuple[Column, ...]
    """One per fact edited, in order; `column.outcome` says how its value was reached."""
    layers: tuple[LayerReport, ...]
    """The state after the last batch."""
    notices: tuple[str, ...]
    """Facts known, replaced, repeated, or joined with others on one key."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage: values, keys, solve."""


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
    ):
        """Take a `model` as the base of edits; its weights are changed in place.

        `recipe`: a Recipe, a file, or a shipped recipe's name; left out, the shipped one called
        `name`, else the published settings on five layers chosen by depth. `statistics`: of this
        model's keys; left out, shipped or cached ones are looked for at the first edit.
        """
        self.partial = PartialModel(model)
        self.model, self.tokenizer = model, tokenizer
        self.encoder = RowEncoder(tokenizer, max_length=context_length(model.config))
        self.recipe = self._resolve(recipe, name)
        self.seed = seed
        self._statistics = statistics
        dtype = str(model.dtype).removeprefix("torch.")
        self.history = History(Base(name, model_hash(model), dtype))
        self._store: Store | None = None
        self._weights: dict[int, Tensor] = {}

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
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a model by name (`smollm2-135m`), folder or Hub id and make an editor of it."""
        model, tokenizer = load_model(
            name, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return cls(model, tokenizer, recipe=recipe, statistics=statistics, name=name, seed=seed)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> Self:
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
        model, tokenizer = load_model(source, device=device, dtype=history.base.dtype)
        epoch = history.epochs[-1] if history.epochs else None
        if epoch:
            for layer in Recipe.from_dict(epoch.recipe).layers:
                module = PartialModel(model).mlp_out(layer)
                write_weight(module, history.tensors[epoch.tensors][f"base.{layer}"])
        found = model_hash(model)
        if found != history.base.hash:
            raise LedgerError(
                f"{source}: its weights without the edits have hash {found[:12]}, the ledger's "
                f"base has {history.base.hash[:12]}: this is another model, or one changed by hand"
            )
        recipe = Recipe.from_dict(epoch.recipe) if epoch else None
        editor = cls.__new__(cls)
        editor.partial = PartialModel(model)
        editor.model, editor.tokenizer = model, tokenizer
        editor.encoder = RowEncoder(tokenizer, max_length=context_length(model.config))
        editor.recipe = editor._resolve(recipe, history.base.model)
        editor.seed = epoch.seed if epoch else 0
        editor._statistics = None
        editor.history = history
        editor._store = store
        editor._refresh()
        return editor

    def attach(self, folder: str | Path) -> None:
        """Keep the ledger in `folder`/ledger from now on: every batch is committed as it ends."""
        store = Store(Path(folder) / "ledger")
        store.create(self.history)
        self._store = store

    def save(self, folder: str | Path) -> None:
        """Write the ledger (first) and the edited model, an ordinary Hugging Face folder."""
        folder = Path(folder)
        target = Store(folder / "ledger")
        if self._store is None:
            self.attach(folder)
        elif self._store.folder.resolve() != target.folder.resolve():
            target.create(self.history)
        self.save_model(folder / "model")

    def save_model(self, folder: Path) -> None:
        """Bring the model in `folder` to the ledger's state; nothing is done if it is there."""
        names = [parameter_name(self.model, layer) for layer in self.recipe.layers]
        write_model(
            self.model,
            self.tokenizer,
            folder,
            state_id=self.history.state_id,
            edited=names if self.history.epochs else [],
        )

    @property
    def facts(self) -> list[Fact]:
        """The facts that are in the model now, in the order they were edited."""
        return [column.fact for column in self.history.active]

    @contextmanager
    def base_weights(self) -> Iterator[PreTrainedModel]:
        """The model without its edits inside; as before afterwards."""
        try:
            self._refresh([])
            yield self.model
        finally:
            self._refresh()

    def edit(
        self,
        facts: Iterable[Fact],
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        progress: Progress | None = None,
    ) -> EditReport:
        """Write `facts` into the model, in batches of `batch_size` (the recipe's by default).

        Queues longer than one batch are shuffled (seeded), since order decides what survives. Every
        fact is checked before the first batch. After an error or an interruption the model and the
        ledger are as after the last finished batch.
        """
        queue = self._admit(list(facts))
        size = batch_size or self.recipe.batch_size
        if shuffle and len(queue) > size:
            random.Random(f"{self.seed}/{len(self.history.batches)}").shuffle(queue)
        timer = _Timer()
        columns: list[Column] = []
        notices: list[str] = []
        with frozen(self.model):
            self._begin_epoch()
            self._check_lengths(queue)
            for start in range(0, len(queue), size):
                if progress:
                    progress("batches", start, len(queue))
                try:
                    made, said = self._edit_batch(queue[start : start + size], timer, progress)
                except BaseException:
                    self._refresh()
                    raise
                columns += made
                notices += said
            report = self._layer_reports()
        return EditReport(tuple(columns), report, tuple(notices), timer.seconds)

    def undo(self, *ids: str) -> UndoReport:
        """Take facts out again, exactly: the weights become the solve without their columns.

        An answer that an undone fact had replaced comes back; facts on the same key as it are
        rebuilt without it. LedgerError if an id is not in the model.
        """
        active = {c.fact.id: c for c in self.history.active}
        for id_ in ids:
            if id_ not in active:
                raise LedgerError(f"no fact {id_!r} in the model; in it are: {_some(active)}")
        before = {layer: self._weight(layer) for layer in self.recipe.layers}
        gone = [active[i] for i in dict.fromkeys(ids)]
        groups = {(c.batch, c.group) for c in gone}
        dropped = [c for c in self.history.active if (c.batch, c.group) in groups]
        removed = {c.id for c in gone}
        back = [c.fact for c in dropped if c.id not in removed]
        by_id = {c.id: c for c in self.history.columns}
        for column in gone:
            older = by_id.get(column.replaces)
            if older and older.fact.key == column.fact.key and older.fact != column.fact:
                back.append(older.fact)
        near = self._near_keys(gone, dropped)
        rebuilt: tuple[str, ...] = ()
        versions = self._stored_version(back)
        with frozen(self.model):
            try:
                if versions is not None:
                    self._commit("undo", [], activated=versions, deactivated=dropped)
                    self._refresh()
                else:
                    self._edit_batch(back, _Timer(), None, dropped=dropped, kind="undo")
                    rebuilt = tuple(f.id for f in back)
            except BaseException:
                self._refresh()
                raise
        return UndoReport(
            removed=tuple(c.fact.id for c in gone),
            restored=tuple(c.fact.id for c in versions or ()),
            rebuilt=rebuilt,
            near=near,
            moved=self._moved(before),
        )

    # -- one batch ---------------------------------------------------------------------------

    def _edit_batch(
        self,
        facts: Sequence[Fact],
        timer: _Timer,
        progress: Progress | None,
        *,
        dropped: Sequence[Column] = (),
        kind: str = "edit",
    ) -> tuple[list[Column], list[str]]:
        """Edit `facts` together and commit; `dropped` columns leave first."""
        notices: list[str] = []
        active = [c for c in self.history.active if c not in dropped]
        replaced = {c.fact.key: c for c in active if c.fact.key in {f.key for f in facts}}
        for older in replaced.values():
            notices.append(f"{older.fact.id}: its older answer {older.fact.target!r} is replaced")
        stand_in = {f.key: replaced[f.key].id for f in facts if f.key in replaced}
        leaving = [*dropped, *replaced.values()]
        batch = list(facts)
        with timer("keys"):
            walk = self._walk(batch)
            first_keys = walk.keys()
        joined = self._on_same_key(first_keys, [c for c in active if c not in leaving])
        if joined:
            batch = [c.fact for c in joined] + batch
            stand_in.update({c.fact.key: c.id for c in joined})
            leaving += joined
            notices.append(
                f"{_some([c.fact.id for c in joined])}: optimised again, a new fact shares the key"
            )
            with timer("keys"):
                walk = self._walk(batch)
                first_keys = walk.keys()
        staying = [c for c in self.history.active if c not in leaving]
        if leaving:
            self._refresh(staying)
        groups = _group(first_keys, self.recipe.same_key)
        with timer("values"):
            values = optimise_values(
                self.partial,
                self.encoder,
                batch,
                groups,
                layer=self.recipe.layers[-1],
                contexts=self._contexts,
                settings=self.recipe.values,
                positions=self._positions,
                pad_id=pad_id(self.tokenizer),
                progress=_counter("values", len(batch), progress),
            )
        tensors = {"z": torch.stack([v.z for v in values]).detach().cpu()}
        tensors |= self._write_layers(walk, tensors["z"], staying, timer)
        n_columns, n_batches = len(self.history.columns), len(self.history.batches)
        made = [
            Column(
                id=n_columns + 1 + i,
                batch=n_batches + 1,
                row=i,
                group=n_columns + 1 + groups[i],
                fact=fact,
                active=True,
                outcome={
                    k: v for k, v in asdict(replace(value, z=torch.empty(0))).items() if k != "z"
                },
                replaces=stand_in.get(fact.key, 0),
            )
            for i, (fact, value) in enumerate(zip(batch, values, strict=True))
        ]
        known = [c.fact.id for c in made if c.outcome["known"]]
        if known:
            notices.append(f"{_some(known)}: known to the model already; kept as they are")
        digest, _ = tensor_bytes(tensors)
        self._commit(kind, made, deactivated=leaving, tensors=(digest, tensors))
        return made, notices

    def _write_layers(
        self, walk: Walk, z: Tensor, staying: Sequence[Column], timer: _Timer
    ) -> dict[str, Tensor]:
        """Edit layer after layer; keys and absolute targets, one row per fact."""
        recorded: dict[str, Tensor] = {}
        layers = self.recipe.layers
        for layer in range(layers[0], layers[-1] + 1):
            if layer not in layers:
                with timer("keys"):
                    walk.advance()
                continue
            with timer("keys"):
                keys = walk.keys()
                left = sum(other >= layer for other in layers)
                residual = (z.double().mT - walk.hidden(layers[-1])) / left
            with timer("solve"):
                now = self._weight(layer)
                # As they will be stored: later solves must see what a reloaded ledger sees.
                keys = keys.to(self._record_dtype)
                targets = (now.cpu() @ keys.double() + residual).to(self._record_dtype)
                old_keys, old_targets = self._recorded(staying, layer)
                weight = solve_joint(
                    self.history,
                    layer,
                    torch.cat([old_keys, keys], dim=1),
                    torch.cat([old_targets, targets], dim=1),
                    device=self._solve_device(layer),
                )
                if not torch.isfinite(weight).all():
                    raise LedgerError(
                        f"the update of layer {layer} is not finite; nothing was kept"
                    )
                write_weight(self.partial.mlp_out(layer), weight)
                self._weights[layer] = weight
            recorded[f"keys.{layer}"] = keys.mT.contiguous()
            recorded[f"targets.{layer}"] = targets.mT.contiguous()
            with timer("keys"):
                walk.advance()
        return recorded

    def _walk(self, facts: Sequence[Fact]) -> Walk:
        return Walk(
            self.partial,
            self.encoder,
            facts,
            first=self.recipe.layers[0],
            contexts=self._contexts,
            bare_weight=self.recipe.contexts.bare_weight,
            pad_id=pad_id(self.tokenizer),
        )

    def _on_same_key(self, keys: Tensor, columns: Sequence[Column]) -> list[Column]:
        """Those of `columns`, with their groups, whose first-layer key is one of `keys`."""
        if not columns:
            return []
        first = self.recipe.layers[0]
        recorded = self.history.column_tensor(columns, f"keys.{first}").double()
        cosines = _unit(recorded, 1) @ _unit(keys, 0)
        hit = {
            (c.batch, c.group)
            for c, close in zip(columns, (cosines > self.recipe.same_key).any(1), strict=True)
            if close
        }
        return [c for c in columns if (c.batch, c.group) in hit]

    # -- the ledger and the weights ----------------------------------------------------------

    def _begin_epoch(self) -> None:
        """Fix what all later batches share: contexts, W₀ and the metric of each layer."""
        if self.history.epochs:
            return
        statistics = self._find_statistics()
        contexts = make_contexts(self.model, self.tokenizer, self.recipe.contexts, seed=self.seed)
        method, settings = find_method(self.recipe.method.name), self.recipe.null_space
        tensors: dict[str, Tensor] = {}
        for layer in self.recipe.layers:
            spectrum = statistics.spectra[layer]
            weight = as_out_in(self.partial.mlp_out(layer))
            if spectrum.d_in != weight.shape[1]:
                raise StatisticsError(
                    f"statistics of layer {layer} are {spectrum.d_in} wide, "
                    f"its keys {weight.shape[1]}"
                )
            threshold = RULES[settings.rule](spectrum.eigenvalues, settings.value)
            gains = method.gains(spectrum.eigenvalues, threshold, self.recipe.method)
            try:
                metric = spectrum.metric(gains)
            except LookupError as error:
                raise StatisticsError(
                    f"these compact statistics don't serve null_space {settings.rule} "
                    f"{settings.value} at layer {layer} ({error}): make full ones with "
                    "`nulledit stats make`"
                ) from error
            if metric.rank == spectrum.d_in:
                logger.warning(
                    "layer %d: nothing is protected (no eigenvalue reaches %.3g)", layer, threshold
                )
            if metric.rank == 0:
                logger.warning(
                    "layer %d: no room left (every eigenvalue reaches %.3g): edits are void",
                    layer,
                    threshold,
                )
            tensors |= metric_tensors(metric, layer, self._record_dtype)
            tensors[f"base.{layer}"] = weight.detach().clone().cpu().contiguous()
        digest, _ = tensor_bytes(tensors)
        self.history.tensors[digest] = tensors
        self.history.epochs.append(
            Epoch(
                id=1,
                recipe=self.recipe.to_dict(),
                seed=self.seed,
                contexts=contexts,
                statistics=asdict(statistics.manifest),
                tensors=digest,
            )
        )
        self._weights = {i: tensors[f"base.{i}"].double() for i in self.recipe.layers}

    def _commit(
        self,
        kind: str,
        made: Sequence[Column],
        *,
        deactivated: Sequence[Column],
        activated: Sequence[Column] = (),
        tensors: tuple[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Add to the history and to the store; both as before if the store refuses."""
        h = self.history
        counts = {
            "epochs": len(h.epochs) if h.events else 0,
            "batches": len(h.batches),
            "columns": len(h.columns),
            "events": len(h.events),
        }
        before = (list(h.columns), list(h.batches), list(h.events))
        on, off = {c.id for c in activated}, {c.id for c in deactivated}
        h.columns[:] = [
            replace(c, active=c.id in on or (c.active and c.id not in off)) for c in h.columns
        ]
        h.columns += made
        if tensors:
            h.batches.append(Batch(len(h.batches) + 1, len(h.epochs), tensors[0]))
            h.tensors[tensors[0]] = tensors[1]
        h.events.append(
            Event(
                id=len(h.events) + 1,
                kind=kind,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                activated=tuple(c.id for c in (*activated, *made)),
                deactivated=tuple(off),
            )
        )
        try:
            if self._store:
                self._store.commit(h, **counts)
        except BaseException:
            h.columns[:], h.batches[:], h.events[:] = before
            raise

    def _refresh(self, columns: Sequence[Column] | None = None) -> None:
        """Set the edited matrices to W₀ + the fold of `columns` (the active ones by default)."""
        self._weights = {}
        if not self.history.epochs:
            return
        chosen = self.history.active if columns is None else list(columns)
        for layer in self.recipe.layers:
            weight = fold(self.history, layer, chosen, device=self._solve_device(layer))
            self._weights[layer] = weight
            write_weight(self.partial.mlp_out(layer), weight)

    def _weight(self, layer: int) -> Tensor:
        """The weight [d_out, d_in] of `layer` before rounding, float64."""
        return self._weights[layer]

    def _recorded(self, columns: Sequence[Column], layer: int) -> tuple[Tensor, Tensor]:
        if not columns:
            rows, width = as_out_in(self.partial.mlp_out(layer)).shape
            return torch.empty(width, 0, dtype=self._record_dtype), torch.empty(
                rows, 0, dtype=self._record_dtype
            )
        return (
            self.history.column_tensor(columns, f"keys.{layer}").mT,
            self.history.column_tensor(columns, f"targets.{layer}").mT,
        )

    def _stored_version(self, facts: Sequence[Fact]) -> list[Column] | None:
        """Columns made together for exactly `facts` as one group, newest first; [] for no facts."""
        if not facts:
            return []
        groups: dict[tuple[int, int], list[Column]] = {}
        for column in self.history.columns:
            groups.setdefault((column.batch, column.group), []).append(column)
        for columns in reversed(list(groups.values())):
            same = {c.fact for c in columns} == set(facts) and len(columns) == len(facts)
            if same and not any(c.active for c in columns):
                return columns
        return None

    def _near_keys(
        self, gone: Sequence[Column], dropped: Sequence[Column]
    ) -> tuple[tuple[str, float], ...]:
        others = [c for c in self.history.active if c not in dropped]
        if not others or not gone:
            return ()
        name = f"keys.{self.recipe.layers[0]}"
        mine = self.history.column_tensor(list(gone), name).double()
        theirs = self.history.column_tensor(others, name).double()
        cosines = (_unit(theirs, 1) @ _unit(mine, 1).mT).max(1).values
        pairs = [
            (c.fact.id, float(x)) for c, x in zip(others, cosines, strict=True) if x > NEAR_KEY
        ]
        return tuple(sorted(pairs, key=lambda p: -p[1]))

    def _moved(self, before: dict[int, Tensor]) -> tuple[tuple[str, float], ...]:
        columns = self.history.active
        if not columns:
            return ()
        layer = self.recipe.layers[-1]
        keys, _ = self._recorded(columns, layer)
        base = self.history.tensors[self.history.epochs[-1].tensors][f"base.{layer}"].double()
        K = keys.double()
        change = (self._weight(layer).cpu() - before[layer].cpu()) @ K
        written = (before[layer].cpu() - base) @ K
        shares = change.norm(dim=0) / written.norm(dim=0).clamp_min(1e-12)
        pairs = [(c.fact.id, float(x)) for c, x in zip(columns, shares, strict=True)]
        return tuple(sorted(pairs, key=lambda p: -p[1]))

    def _layer_reports(self) -> tuple[LayerReport, ...]:
        reports = []
        columns = self.history.active
        tensors = self.history.tensors[self.history.epochs[-1].tensors]
        for layer in self.recipe.layers:
            metric = metric_of(tensors, layer)
            base = tensors[f"base.{layer}"].double()
            weight = self._weight(layer).cpu()
            stored = as_out_in(self.partial.mlp_out(layer)).double().cpu()
            keys, _ = self._recorded(columns, layer)
            norm = float((weight - base).norm())
            reports.append(
                LayerReport(
                    layer=layer,
                    protected=base.shape[1] - metric.rank,
                    d_in=base.shape[1],
                    free_share=float(metric.free_share(keys).mean()) if columns else float("nan"),
                    update_share=norm / float(base.norm()),
                    rounding_share=float((stored - weight).norm()) / norm if norm else 0.0,
                )
            )
        return tuple(reports)

    # -- small things ------------------------------------------------------------------------

    def _admit(self, facts: list[Fact]) -> list[Fact]:
        """Facts without those already in the model; FactError for ids used twice."""
        active = {c.fact.id: c.fact for c in self.history.active}
        keys: dict[tuple[str, str], Fact] = {}
        queue = []
        for fact in facts:
            held = active.get(fact.id)
            if held is not None and held.key != fact.key:
                raise FactError(
                    f"id {fact.id!r} is in the model already, for {held.subject!r}; give another id"
                )
            other = keys.get(fact.key)
            if other is not None and other.target != fact.target:
                raise FactError(
                    f"{other.id} and {fact.id} contradict each other on {fact.subject!r}: "
                    f"{other.target!r} and {fact.target!r}"
                )
            if any(
                (f.key, f.prompt, f.target) == (fact.key, fact.prompt, fact.target)
                for f in active.values()
            ):
                logger.warning("%s: in the model already, left out", fact.id)
                continue
            keys[fact.key] = fact
            queue.append(fact)
        ids = [f.id for f in queue]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise FactError(f"two facts have the id {twice!r}")
        return queue

    def _check_lengths(self, facts: Sequence[Fact]) -> None:
        """Tokenise every row once, so that a prompt too long is refused before any work."""
        for fact in facts:
            try:
                plan_rows(fact, self.encoder, self._contexts)
                self.encoder.encode_template(self.recipe.values.kl_prompt, fact.subject)
            except FactError as error:
                raise FactError(f"fact {fact.id}: {error}") from error

    def _resolve(self, recipe: Recipe | str | Path | None, name: str) -> Recipe:
        if recipe is None and name in shipped_recipes():
            recipe = name
        if recipe is None:
            recipe = Recipe()
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
        depth = self.partial.depth
        if not recipe.layers:
            first = round(0.13 * depth)  # LLaMA3 4-8 of 32, GPT-J 3-8 of 28
            chosen = tuple(range(first, min(first + 5, max(depth - 1, 1))))
            logger.warning("the recipe names no layers; chosen by depth: %s", list(chosen))
            recipe = replace(recipe, layers=chosen)
        if recipe.layers[-1] >= depth:
            raise ModelError(
                f"layer {recipe.layers[-1]} is out of range: the model has layers 0 to {depth - 1}"
            )
        if recipe.layers[-1] == depth - 1:
            raise ModelError(
                f"layer {depth - 1} is the model's last: nothing above it would read the edit; "
                f"choose layers up to {depth - 2}"
            )
        find_method(recipe.method.name)
        for layer in recipe.layers:
            as_out_in(self.partial.mlp_out(layer))
        return recipe

    def _find_statistics(self) -> Statistics:
        given = self._statistics
        if isinstance(given, str | Path):
            given = Statistics.load(Path(given))
        found = given or find_statistics(self.history.base.hash, self.recipe.layers)
        if found is None:
            layers = ",".join(map(str, self.recipe.layers))
            name = self.history.base.model or "MODEL"
            raise StatisticsError(
                "no statistics of this model's preserved keys: make them once with "
                f"`nulledit stats make {name} --text CORPUS --layers {layers}`"
            )
        found.check(self.history.base.hash, self.recipe.layers)
        self._statistics = found
        return found

    def _solve_device(self, layer: int) -> torch.device:
        """Where the layer's weights are, unless float64 is missing there."""
        device = as_out_in(self.partial.mlp_out(layer)).device
        return torch.device("cpu") if device.type == "mps" else device

    @property
    def _contexts(self) -> tuple[str, ...]:
        return self.history.epochs[-1].contexts

    @property
    def _record_dtype(self) -> torch.dtype:
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    @property
    def _positions(self) -> int:
        on_cpu = self.partial.device.type == "cpu"
        return self.recipe.chunk_positions or (CPU_POSITIONS if on_cpu else ACCELERATOR_POSITIONS)


class _Timer:
    """Adds up wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _counter(stage: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(stage, done, total)

    return count


def _unit(keys: Tensor, dim: int) -> Tensor:
    return keys / keys.norm(dim=dim, keepdim=True).clamp_min(1e-30)


def _group(keys: Tensor, same: float) -> list[int]:
    """For each column of `keys` [d_in, n], the index of the first column it shares a key with."""
    unit = _unit(keys, 0)
    close = (unit.mT @ unit) > same
    groups = list(range(keys.shape[1]))
    for i in range(len(groups)):
        for j in range(i):
            if close[i, j] and groups[i] != groups[j]:
                old, new = max(groups[i], groups[j]), min(groups[i], groups[j])
                groups = [new if g == old else g for g in groups]
    return groups


def _some(names: Iterable[Any], most: int = 5) -> str:
    shown = [str(n) for n in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
