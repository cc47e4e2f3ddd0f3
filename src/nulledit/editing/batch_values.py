"""The values of a batch's requests: known ones from a cache, the others optimised together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.editing.call_log import CallLog
from nulledit.editing.descent import Value
from nulledit.editing.keys import Walk
from nulledit.editing.norm_anchor import (
    BARE,
    TOO_LONG,
    LengthRecord,
    anchored,
    usable,
    usual_length,
)
from nulledit.editing.sharing import dealt, gathered, of_first
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import measure_values, optimise_values, plan_rows, wordings
from nulledit.editing.weights import EditedWeights
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import Row
from nulledit.parallel.ranks import Ranks

CPU_POSITIONS = 400  # more don't stay in a processor's cache, fewer read all weights for little
ACCELERATOR_POSITIONS = 4096


class BatchValues:
    """Finds values for one batch, on the weights as they are when it is asked."""

    def __init__(
        self,
        model: EditableModel,
        recipe: Recipe,
        weights: EditedWeights,
        contexts: tuple[str, ...],
        wordings: Sequence[Fact],
        run: CallLog,
        *,
        cache: ValueCache | None,
        ranks: Ranks,
    ):
        """`wordings`: what the values are asked, one a request; shared out between `ranks`."""
        self.model, self.recipe, self.weights = model, recipe, weights
        self.contexts, self.wordings, self.run = contexts, wordings, run
        self.cache, self.ranks = cache, ranks

    def optimised(
        self, layers: Sequence[int], shared: Sequence[int], chosen: Sequence[int] | None = None
    ) -> dict[int, list[Value]]:
        """Values from the cache, or optimised together and kept there, by layer.

        Of `chosen` requests, whole groups; all of them, where none are chosen.
        """
        wordings = self.wordings
        stage = "values" if chosen is None else "corrections"
        chosen = range(len(wordings)) if chosen is None else chosen
        members: dict[int, list[int]] = {}
        for i in chosen:
            members.setdefault(shared[i], []).append(i)
        names = self._cache_names(layers, {g: [wordings[i] for i in m] for g, m in members.items()})
        values: dict[int, Value] = {}
        if self.cache is not None:
            if self.ranks.first:
                for group, alike in members.items():
                    values.update(zip(alike, self.cache.get(names[group]) or (), strict=False))
            values = of_first(self.ranks, values)
        missing = [i for i in chosen if i not in values]
        counter = self.run.counter(stage, len(chosen))
        counter(len(values))
        self.run.optimised += len(missing)
        mine = dealt(self.ranks, wordings, shared, missing)

        def keep(found: Mapping[int, Value]) -> None:
            if self.cache is not None and self.ranks.first:
                for group in {shared[i] for i in found}:
                    self.cache.put(names[group], [found[i] for i in members[group]])

        def done(found: Mapping[int, Value]) -> None:
            """Kept as they come: what an interruption ends is not lost."""
            keep({mine[k]: value for k, value in found.items()})
            counter(len(found))

        found = optimise_values(
            self.model,
            [wordings[i] for i in mine],
            [shared[i] for i in mine],
            layers=layers,
            contexts=self.contexts,
            settings=self.recipe.values,
            positions=self.positions(1),
            done=done,
        )
        of_all = gathered(self.ranks, dict(zip(mine, found, strict=True)))
        keep({i: value for i, value in of_all.items() if i not in mine})
        values.update(of_all)
        counter(len(missing) - len(mine))
        found = [values[i] for i in chosen]
        if len(layers) == 1:
            return {layers[0]: found}
        return {layer: [value.at(k) for value in found] for k, layer in enumerate(layers)}

    def anchored(self, values: Sequence[Value], layer: int, walk: Walk) -> list[Value]:
        """`values` with their v* scaled (NAS), and with the outcomes that they have so.

        `walk` reads what stands at `layer` where they were optimised.
        """
        length = self._usual_length(layer)
        hidden, added = walk.standing(layer)
        scaled = [
            anchored(z, h, v, length)
            for z, h, v in zip(stacked(values).double(), hidden.mT, added.mT, strict=True)
        ]
        changed = [
            replace(value, z=(h if z is None else z).to(value.z))
            for value, z, h in zip(values, scaled, hidden.mT, strict=True)
        ]
        dropped = sum(z is None for z in scaled)
        if dropped:
            self.run.notices.append(
                f"norm anchor: {dropped} of {len(values)} values at layer {layer} were over "
                f"{TOO_LONG:g} times as long as usual ({length:.3g}); nothing is written for them"
            )
        return measure_values(
            self.model,
            self.wordings,
            changed,
            layer=layer,
            contexts=self.contexts,
            settings=self.recipe.values,
            positions=self.positions(1),
        )

    def _usual_length(self, layer: int) -> float:
        """Mean ‖v*‖ of a fixed sample in the unedited model: measured once, then kept."""
        record = LengthRecord(
            model_hash=self.weights.history.base.hash,
            reading=self.model.reading(
                row
                for fact in usable(self.model.encoder)
                for row in plan_rows(fact, self.model.encoder, BARE)
            ),
            layer=layer,
            settings=self.recipe.values,
            chat=self.recipe.chat,
            mlp_out=self.model.layout.mlp_out,
        )
        known = self.ranks.from_first(record.read() if self.ranks.first else None)[0]
        if known is not None:
            return float(known)
        with self.weights.holding([]):
            return usual_length(
                record,
                self.model,
                self.ranks,
                first=self.recipe.layers[0],
                positions=self.positions(1),
                counter=partial(self.run.counter, "norm anchor"),
            )

    def _cache_names(
        self, layers: Sequence[int], groups: Mapping[int, Sequence[Fact]]
    ) -> dict[int, str]:
        """What the values of each group of wordings are called in the cache, on this model."""
        if self.cache is None:
            return {}
        weights, settings = self.weights.digest(), self.recipe.values
        rows = {group: self._rows(facts) for group, facts in groups.items()}
        return {
            group: self.cache.name(
                f"{weights} {self.model.reading(rows[group])}",
                wordings,
                layers=layers,
                contexts=self.contexts,
                settings=settings,
                chat=self.recipe.chat,
            )
            for group, wordings in groups.items()
        }

    def _rows(self, alike: Sequence[Fact]) -> list[Row]:
        """The rewriting rows of facts of one group."""
        worded = wordings(alike, [0] * len(alike), self.contexts, self.recipe.values.rewordings)
        return [
            row
            for fact, others in zip(alike, worded, strict=True)
            for row in plan_rows(fact, self.model.encoder, self.contexts, others)
        ]

    def positions(self, factor: int) -> int:
        """How many token positions run together, times `factor`."""
        default = self.model.positions(CPU_POSITIONS, ACCELERATOR_POSITIONS)
        return factor * (self.recipe.chunk_positions or default)


def stacked(values: Sequence[Value]) -> Tensor:
    """z of `values` [requests, d], on the CPU."""
    return torch.stack([value.z.detach().cpu() for value in values])
