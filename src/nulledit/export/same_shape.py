"""Gated edits in a model of the base's shape: neurons in the place of a block's least used units.

A unit j gives column_j · a_j to what the block adds. Of an MLP's units those with the smallest
E[a_j²]‖column_j‖² on text are missed least; nothing stands in for what they gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError, LedgerError, StatisticsError
from nulledit.evaluation.kept_reading import base_reading, edited_reading
from nulledit.evaluation.reading import Divergence, read
from nulledit.linalg.neurons import Neurons
from nulledit.models.layer_edit import NeuronUpdate
from nulledit.models.layouts import as_out_in, frozen
from nulledit.runs.measure import windows_of

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ReplacedUnits:
    """Which units of one block neurons stand in the place of."""

    layer: int
    """Block number."""
    units: tuple[int, ...]
    """Their places, in order: as many as there are neurons."""
    of: int
    """Units of the block."""
    share: float
    """Σ E[a_j²]‖column_j‖² over them, of the sum over all units of the block."""


@dataclass(frozen=True)
class SameShape:
    """What it costs that neurons stand in the place of units, and not besides them."""

    layers: tuple[ReplacedUnits, ...]
    """By block."""
    text: str
    """On what units were chosen, by every other window, and the price measured, by the others."""
    kl: Divergence
    """KL(base ‖ model in the base's shape) per token."""
    grown_kl: Divergence
    """KL(base ‖ the run's model, with neurons besides the block's own units)."""


def require_neurons(editor: EditEngine, what: str) -> dict[int, Neurons]:
    """The run's neurons by layer, before rounding.

    ConfigError, which names `what` was asked for, where edits change W; LedgerError without facts.
    """
    edits = {layer: editor.weights.edit(layer) for layer in editor.weights.layers}
    if any(not isinstance(edit, NeuronUpdate) for edit in edits.values()):
        raise ConfigError(
            f"{what} is for gated edits; the edits of this run change W, and its model has the "
            "base's shape already"
        )
    found = {
        layer: edit.neurons
        for layer, edit in edits.items()
        if isinstance(edit, NeuronUpdate) and edit.neurons is not None
    }
    if not found:
        raise LedgerError("nothing is edited in this run: there are no neurons to export")
    return found


class Places:
    """Where the neurons of a run go in the base's shape, and the text that says so."""

    def __init__(self, editor: EditEngine, text: str | Path | None, progress: Tell | None = None):
        """`text`: a file; None: the text that comes with nulledit.

        ConfigError where neurons are as many as a block's units; StatisticsError for a text of less
        than two windows.
        """
        self.editor, self.progress = editor, progress
        self.neurons = require_neurons(editor, "the base's shape")
        found = windows_of(editor.editable.encoder, text)
        if len(found.windows) < 2:
            raise StatisticsError(
                f"{found.name}: has one window of {len(found.windows[0])} tokens; expected two or "
                "more: units are chosen on one half and the price is measured on the other"
            )
        self.text, self.choosing, self.judging = (
            found.name,
            found.windows[::2],
            found.windows[1::2],
        )
        for layer, neurons in self.neurons.items():
            count, width = len(neurons.rows), editor.editable.form(layer).width
            if count >= width:
                raise ConfigError(
                    f"block {layer} has {width:,} units, too few for {count:,} neurons in their "
                    "place; export --as delta, or --as checkpoint without --same-shape, which "
                    "keep the block's own"
                )
        self.layers = tuple(self._chosen())

    def _chosen(self) -> Iterator[ReplacedUnits]:
        model, layers = self.editor.editable, list(self.neurons)
        energies = {
            layer: torch.zeros(model.form(layer).width, dtype=torch.float64) for layer in layers
        }
        with frozen(self.editor.model), torch.no_grad(), self.editor.base_weights():
            for number, window in enumerate(self.choosing):
                self._tell("units", number, len(self.choosing))
                with model.reading_keys(layers) as found:
                    model.run(model.collate([window]), last=layers[-1])
                for layer in layers:
                    energies[layer] += found[layer][0].double().square().sum(0).cpu()
            for layer in layers:
                columns = as_out_in(model.matrix(layer)).double().square().sum(0).cpu()
                energies[layer] *= columns
        for layer, energy in energies.items():
            n = len(self.neurons[layer].rows)
            places = energy.argsort(stable=True)[:n].sort().values
            share = float(energy[places].sum() / energy.sum())
            yield ReplacedUnits(layer, tuple(places.tolist()), len(energy), share)

    def places(self, layer: int) -> Tensor:
        """Of the neurons of `layer` [n]."""
        return torch.tensor(next(x.units for x in self.layers if x.layer == layer))

    @contextmanager
    def taken(self, neurons: Mapping[int, Neurons] | None = None) -> Iterator[None]:
        """The model in the base's shape inside; afterwards the run's again.

        `neurons`: those of the run, as an artefact stores them; None: rounded to the model's dtype.
        """
        with ExitStack() as stack:
            for layer, own in (neurons or self.neurons).items():
                form = self.editor.editable.form(layer)
                stack.enter_context(form.replaced(self.places(layer), own))
            yield

    def price(self, neurons: Mapping[int, Neurons] | None = None) -> SameShape:
        """What the base's shape costs on the half of the text that chose nothing.

        `neurons` as for `taken`.
        """
        tell = partial(self._tell, "text, base")
        base = base_reading(self.editor, self.judging, progress=tell)
        tell = partial(self._tell, "text, edited")
        grown = edited_reading(self.editor, self.judging, base, progress=tell)
        with self.taken(neurons):
            tell = partial(self._tell, "text, same shape")
            same = read(self.editor.editable, self.judging, base=base, progress=tell)
        assert grown.kl is not None
        assert same.kl is not None
        return SameShape(self.layers, self.text, same.kl, grown.kl)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)
