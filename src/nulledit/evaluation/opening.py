"""How often the gates of gated edits open on a text that has nothing to do with the facts.

A gate gives next to nothing where it is shut, and everything it does to text it does where it is
open. What W is given has the neurons' activations after those of the block's own units, so they
are read off the pass that is made anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.editing.gates import own_openings
from nulledit.editing.weights import EditedWeights
from nulledit.evaluation.stats import mean_of
from nulledit.models.editable_model import EditableModel

OPEN = 0.1
"""Share of what a gate gives on its own fact above which it is open."""


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates that edits put into one block, and when they count as open."""

    layer: int
    """Block number."""
    units: int
    """The block's own."""
    facts: tuple[str, ...]
    """Id of the fact of each of the n gates, in the order in which they are in the block."""
    levels: Tensor
    """Activations [n] above which they are open."""


@dataclass(frozen=True)
class Opening:
    """How often gates open on a text, as shares of its tokens, 0 to 1."""

    value: float
    """Mean over the gates of the share of tokens at which one opens."""
    standard_error: float
    """Of `value`, over windows (delta method); nan for one window."""
    worst: float
    """The share of the gate that opens the most often."""
    worst_fact: str
    """Id of that gate's fact."""
    any: float
    """Share of tokens at which one gate or more opens."""
    any_standard_error: float
    """Of `any`, over windows."""
    tokens: int
    """Tokens looked at: those after which the next one is predicted."""
    gates: int
    """Neurons, one for each fact."""
    units: int
    """The block's own, beside which they are."""


def gates_of(weights: EditedWeights) -> Gates | None:
    """The gates that the edits have in the model now; None where there are none."""
    for layer in weights.layers:  # gated edits are in one block
        facts, own = own_openings(weights, layer)
        if facts:
            units = weights.edit(layer).base.shape[1]
            return Gates(layer, units, tuple(facts), OPEN * own)
    return None


@contextmanager
def opened_on(model: EditableModel, gates: Gates | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Watch `gates` in a run inside; gives a function to be called after it.

    It says for each position that its mask [rows, length] has, row by row, which gates were open:
    [positions, n], on the CPU. ValueError if the model has others in their block.
    """
    with model.reading_keys([gates.layer] if gates else []) as found:

        def opened(mask: Tensor) -> Tensor:
            assert gates is not None
            given = found[gates.layer][..., gates.units :]
            if given.shape[-1] != len(gates.facts):
                raise ValueError(
                    f"block {gates.layer} has {given.shape[-1]} gates, expected {len(gates.facts)}"
                )
            return (given[mask.to(given.device)] > gates.levels.to(given)).cpu()

        yield opened


def opening_of(gates: Gates, opened: Sequence[Tensor]) -> Opening:
    """From which gates are open [tokens, n] of each window."""
    shares = [window.double().mean(1).numpy() for window in opened]
    value, error, tokens = mean_of(shares)
    some, some_error, _ = mean_of([window.any(1).double().numpy() for window in opened])
    counts = torch.stack([window.sum(0) for window in opened]).sum(0)
    worst = int(counts.argmax())
    return Opening(
        value,
        error,
        float(counts[worst]) / tokens,
        gates.facts[worst],
        some,
        some_error,
        tokens,
        len(gates.facts),
        gates.units,
    )
