"""One batch of facts through keys, values and solves, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.editing.batch_values import BatchValues, stacked
from nulledit.editing.call_log import CallLog
from nulledit.editing.chunks import chunks_of
from nulledit.editing.descent import Value
from nulledit.editing.keys import LayerwiseForward, Walk, WalksTogether
from nulledit.editing.target_loss import WeightLoss
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import bare_leads
from nulledit.editing.weights import EditedWeights
from nulledit.ledger.records import Column, ValueOutcome
from nulledit.linalg.angles import same_key_groups
from nulledit.methods import find_method
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import differentiating
from nulledit.parallel.ranks import Ranks

KnownValues = Callable[[int], list[Value]]
"""Values that are known, one per request, by the layer that they are for."""


@dataclass(frozen=True)
class Request:
    """What gets a column: a fact, or one chunk of a long target."""

    owner: int
    """Place of its fact in the batch."""
    part: int
    """Number of the chunk, from 0."""
    wording: Fact
    """What the walk and the values are asked."""


@dataclass(frozen=True)
class BatchResult:
    """What a batch left in the weights."""

    tensors: dict[str, Tensor]
    """Keys, targets and values, one row per request."""
    outcomes: list[ValueOutcome]
    """How each request's value was reached."""
    groups: list[int]
    """Requests that stand or fall together have one number, that of the first of them."""


class BatchWriter:
    """Writes one batch into the edited layers."""

    def __init__(
        self,
        model: EditableModel,
        recipe: Recipe,
        weights: EditedWeights,
        contexts: tuple[str, ...],
        facts: Sequence[Fact],
        run: CallLog,
        *,
        cache: ValueCache | None = None,
        ranks: Ranks | None = None,
        walked: Walk | None = None,
    ):
        """Brings `facts` to the first edited layer; nothing is changed yet.

        `walked`: a walk of the last of them, which is there.
        """
        self.model, self.recipe = model, recipe
        self.weights, self.contexts, self.run = weights, contexts, run
        self.ranks = ranks or Ranks()
        self.method = find_method(recipe.method.name)
        self.facts = list(facts)
        self.requests = [
            Request(i, part, wording)
            for i, fact in enumerate(self.facts)
            for part, wording in enumerate(
                chunks_of(fact, model.encoder, recipe.values.chunk_tokens)
                if not self.method.by_gradient
                else (fact,)
            )
        ]
        self.wordings = [request.wording for request in self.requests]
        self.batch_values = BatchValues(
            model, recipe, weights, contexts, self.wordings, run, cache=cache, ranks=self.ranks
        )
        with run.timed("keys"):
            self.walk = self._walk(walked)
            keys = self.walk.keys()  # [d_in, requests]
            self.first_keys = self.ranks.from_first(None, {"keys": keys})[1]["keys"].to(keys)

    def write(self, staying: Sequence[Column], given: KnownValues | None = None) -> BatchResult:
        """Edit layer after layer; `staying` are the columns in the weights now.

        Values are optimised, unless they are `given`.
        """
        if self.method.by_gradient:
            found, tensors = self._descend(staying)
            return self._agreed(tensors, found, [0] * len(self.wordings))
        shared = same_key_groups(self.first_keys, self.recipe.same_key)
        values: dict[int, list[Value]] = {}  # by layer
        find = given or self._finding(shared)
        tensors = self._pass(staying, values, find)
        if not given and self.recipe.values.rounds > 1:
            values, tensors = self._in_rounds(staying, values, tensors, shared)
        last = values[max(values)]
        return self._agreed(tensors, [value.outcome for value in last], self._joined(shared))

    def _finding(self, shared: Sequence[int]) -> KnownValues:
        """Values by layer, optimised as its turn comes; joint ones all as the first is asked."""
        together: dict[int, list[Value]] = {}

        def find(layer: int) -> list[Value]:
            layers = self._layers_with(layer)
            if layer not in together:
                together.update(self._values(layers, shared))
            return together[layer]

        return find

    def _layers_with(self, layer: int) -> tuple[int, ...]:
        """The layers whose values are optimised with those of `layer`."""
        return self.recipe.layers if self.recipe.values.at == "joint" else (layer,)

    def _agreed(
        self, tensors: dict[str, Tensor], outcomes: Sequence[ValueOutcome], groups: list[int]
    ) -> BatchResult:
        """What rank 0 has: other machines may round otherwise."""
        told, tensors = self.ranks.from_first([o.to_dict() for o in outcomes], tensors)
        return BatchResult(tensors, [ValueOutcome.from_dict(o) for o in told], groups)

    def _pass(
        self,
        staying: Sequence[Column],
        values: dict[int, list[Value]],
        find: Callable[[int], list[Value]],
    ) -> dict[str, Tensor]:
        """Edit layer after layer to the values that `find` gives; they are kept in `values`."""
        where, layers = self.recipe.values.at, self.recipe.layers
        each = where in ("each", "joint") or self.model.values_at_output
        one = layers[0] if where == "first" else layers[-1]
        if not each:
            values[one] = find(one)
        goals = self._caused(values[one]) if where == "first" else {}
        tensors = {}
        for layer in self._upwards():
            at = layer if each or goals else one
            if each:
                values[layer] = find(layer)
                tensors[f"z.{layer}"] = stacked(values[layer])
            with self.run.timed("keys"):
                keys = self.walk.keys()
                goal = goals[layer] if goals else stacked(values[at]).double().mT
                with self._unedited(self.method.apart):
                    missing = goal - self.walk.hidden(at)
                keys, missing = self._of_first(keys, missing)
            left = 1 if where != "last" else sum(other >= layer for other in layers)
            with self.run.timed("solve"):
                residual = missing / (left * self.model.scale(layer))
                tensors |= self.weights.write(layer, staying, keys, residual)
        return tensors | {"z": stacked(values[one])}

    def _caused(self, values: Sequence[Value]) -> dict[int, Tensor]:
        """Goals [d, n] by layer: the states that `values` after the first one cause."""
        unedited = self.method.rewinds or self.method.apart
        with self.run.timed("keys"), self._unedited(unedited):
            walk = self._walk() if unedited else self.walk
            return walk.caused(stacked(values).double().mT, self.recipe.layers)

    def _in_rounds(
        self,
        staying: Sequence[Column],
        values: dict[int, list[Value]],
        tensors: dict[str, Tensor],
        shared: Sequence[int],
    ) -> tuple[dict[int, list[Value]], dict[str, Tensor]]:
        """Correct `values`, which are written, and write them again, while that helps.

        Facts that disturb each other may undo each other's corrections, so the round counts after
        which most lead. Returns the values that are in the model then, and what is to be recorded.
        """
        margin, rounds = self.recipe.values.stop_margin or 0.0, self.recipe.values.rounds
        best: tuple[tuple[int, float], dict[int, list[Value]]] | None = None
        for number in range(rounds):
            leads = self._bare_leads()
            good = sum(lead > 0 for lead in leads), sum(min(lead, margin) for lead in leads)
            if best is None or good > best[0]:
                best = good, values
            failing = {shared[i] for i, lead in enumerate(leads) if not lead > margin}
            if number == rounds - 1 or not failing:
                break
            chosen = [i for i, group in enumerate(shared) if group in failing]
            values = self._corrected(values, shared, chosen)
            tensors = self._written_again(staying, values)
        if best is not None and best[1] is not values:
            values = best[1]
            tensors = self._written_again(staying, values)
        return values, tensors

    def _written_again(
        self, staying: Sequence[Column], values: dict[int, list[Value]]
    ) -> dict[str, Tensor]:
        """`values` in the place of what the batch has written so far."""
        self.weights.refresh(staying)
        self.walk.rewind()
        return self._pass(staying, {}, values.__getitem__)

    def _bare_leads(self) -> list[float]:
        """Of each request, in the model as it is."""
        with self.run.timed("values"):
            leads = bare_leads(
                self.model,
                self.wordings,
                positions=self.batch_values.positions(4),
            )
            return list(self.ranks.from_first(leads)[0])

    def _corrected(
        self, values: dict[int, list[Value]], shared: Sequence[int], chosen: Sequence[int]
    ) -> dict[int, list[Value]]:
        """`values`, where `chosen` requests have the rest that they lack in the model as it is.

        They are optimised from where the model stands, and their targets move by the δ that is
        found there; so a target takes in what the solve withholds.
        """
        found = {}
        rests: dict[int, list[Value]] = {}
        with self.run.timed("values"):
            self.walk.rewind()
            for layer, before in values.items():
                now = self.walk.hidden(layer).mT
                if layer not in rests:
                    rests |= self.batch_values.optimised(self._layers_with(layer), shared, chosen)
                rest = dict(zip(chosen, rests[layer], strict=True))
                found[layer] = [
                    value.moved(rest[i], now[i]) if i in rest else value
                    for i, value in enumerate(before)
                ]
        return found

    def _of_first(self, keys: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """As rank 0 has them: other machines may round otherwise, and all solve the same."""
        _, found = self.ranks.from_first(None, {"keys": keys, "missing": missing})
        return found["keys"].to(keys), found["missing"].to(missing)

    def _descend(self, staying: Sequence[Column]) -> tuple[list[ValueOutcome], dict[str, Tensor]]:
        """Each layer by gradient descent on the targets' loss."""
        tensors: dict[str, Tensor] = {}
        loss = None
        for layer in self._upwards():
            with self.run.timed("keys"):
                keys = self.walk.keys()
            with self.run.timed("solve"), differentiating():
                loss = WeightLoss(
                    self.model,
                    self.wordings,
                    layer=layer,
                    positions=self.batch_values.positions(4),
                )
                tensors |= self.weights.write(layer, staying, keys, None, target_loss=loss)
        assert loss is not None
        with differentiating():
            end = loss(loss.current())[0]
        return [ValueOutcome(end) for _ in self.requests], tensors

    def _upwards(self) -> Iterator[int]:
        """The edited layers; the walk is at each one's input, and runs it once it is written."""
        layers = self.recipe.layers
        for layer in range(layers[0], layers[-1] + 1):
            if layer in layers:
                yield layer
            if layer < layers[-1]:
                with self.run.timed("keys"):
                    self.walk.advance()

    def _walk(self, walked: Walk | None = None) -> Walk:
        requests = self.requests[: len(self.requests) - (walked.n if walked else 0)]
        walk = LayerwiseForward(
            self.model,
            [request.wording for request in requests],
            first=self.recipe.layers[0],
            contexts=self.contexts,
            bare_weight=self.recipe.contexts.bare_weight,
            inputs=self.method.apart,
        )
        return WalksTogether(walk, walked) if walked else walk

    def _unedited(self, wanted: bool) -> AbstractContextManager[None]:
        """The model without edits inside, if that is `wanted`."""
        return self.weights.holding([]) if wanted else nullcontext()

    def _values(self, layers: Sequence[int], shared: Sequence[int]) -> dict[int, list[Value]]:
        """One value per request at each of `layers`, on the weights that the method wants."""
        unedited = self.method.rewinds or self.method.apart
        with self.run.timed("values"), self._unedited(unedited):
            found = self.batch_values.optimised(layers, shared)
            if not self.recipe.values.norm_anchor:
                return found
            walk = self._walk() if self.method.rewinds else self.walk
            return {layer: self.batch_values.anchored(v, layer, walk) for layer, v in found.items()}

    def _joined(self, shared: Sequence[int]) -> list[int]:
        """Requests that share a key or a fact, with all that these share in turn."""
        group = list(range(len(shared)))
        changed = True
        while changed:
            changed = False
            for names in (shared, [request.owner for request in self.requests]):
                lowest: dict[int, int] = {}
                for i, name in enumerate(names):
                    lowest[name] = min(lowest.get(name, group[i]), group[i])
                joined = [lowest[name] for name in names]
                changed = changed or joined != group
                group = joined
        return group
