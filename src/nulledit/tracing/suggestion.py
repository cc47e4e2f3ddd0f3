"""From effects, or costs, to layers that one may try first.

The rule for effects is after MEMIT (arXiv:2210.07229), which edits a range of blocks that ends
where the MLPs' effect at the subject's last token is still high. Its GPT-2 XL setting is five
blocks, 13 to 17, and 17 is the one that ROME edits, at the peak of its trace. Windows that hold the
first block are left out: its MLP sees little but the token's own embedding, where the noise is, so
putting its output back takes the noise away again instead of showing where a fact is read.

This is a place to begin, no more: where tracing finds an effect does not tell where editing works
best (Hase et al., arXiv:2301.04213).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT = 5  # as the published recipes of GPT-2 XL and LLaMA3
RESAMPLES = 2000
CLEAR = 2.0  # standard errors that the peak must stand above zero


@dataclass(frozen=True)
class Suggestion:
    """A range of layers, and how sure the trace is of it."""

    layers: tuple[int, ...]
    """Ascending, ending at the peak; empty if no peak stands above zero."""
    peak: int
    """Middle of the window with the largest mean effect, of those that count."""
    effect: float
    """That effect, a probability."""
    standard_error: float
    """Of it, over facts."""
    lowest: int
    """Middle of the lowest window without the first block: no peak can lie below it."""
    low: int
    """Lower end of the 95 % interval of the peak, facts drawn anew (bootstrap)."""
    high: int
    """Upper end."""
    facts: int
    """Number of facts that it rests on."""

    @property
    def recipe_line(self) -> str:
        """The line for a recipe; empty without a suggestion."""
        return f"layers: {list(self.layers)}" if self.layers else ""


def suggest(effects: Tensor, *, lowest: int, count: int = COUNT) -> Suggestion:
    """Layers from MLP-window effects [facts, layers] at the subject's last token.

    `count` layers ending at the peak of the mean, fewer where the model does not reach so far down.
    Windows around layers below `lowest` don't count, nor does that around the last block: nothing
    above it would read what is written there. The bootstrap has a fixed seed. ValueError for fewer
    than two facts, or where no window counts.
    """
    facts, depth = effects.shape
    if facts < 2 or not 0 <= lowest < depth - 1:
        raise ValueError(f"no peak in {facts} facts and layers {lowest} to {depth - 2}")
    inner = effects[:, lowest : depth - 1].double().cpu()
    mean = inner.mean(0)
    top = int(mean.argmax())
    peak = lowest + top
    error = float(inner[:, top].std()) / math.sqrt(facts)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(facts, (RESAMPLES, facts), generator=generator)
    weights = torch.zeros(RESAMPLES, facts, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    peaks = (weights @ inner).argmax(1).sort().values
    low, high = (lowest + int(peaks[int(p * (RESAMPLES - 1))]) for p in (0.025, 0.975))
    effect = float(mean[top])
    layers = tuple(range(max(0, peak - count + 1), peak + 1)) if effect > CLEAR * error else ()
    return Suggestion(layers, peak, effect, error, lowest, low, high, facts)


FLAT = 1.15
"""Times the least cost, up to which a block next to the cheapest is as good as it."""


@dataclass(frozen=True)
class CheapBlocks:
    """Blocks where a value costs other text least, for both kinds of methods."""

    layers: tuple[int, ...]
    """For methods that change W: the span round the cheapest that costs hardly more; empty if it
    was not measured."""
    gated: int | None
    """For gated edits: the cheapest block; None if there is none."""

    @property
    def recipe_line(self) -> str:
        """The line for a recipe of a method that changes W; empty without layers."""
        return f"layers: {list(self.layers)}" if self.layers else ""

    @property
    def gated_line(self) -> str:
        """Lines for a recipe of gated edits; empty without a block."""
        return "" if self.gated is None else f"method: {{name: gated}}\nlayers: [{self.gated}]"


def cheapest(
    keys: Mapping[int, float], inputs: Mapping[int, float], *, depth: int, count: int = COUNT
) -> CheapBlocks:
    """Blocks from costs by layer, of what W writes (`keys`) and of neurons (`inputs`).

    The span holds neighbours within `FLAT` of the least cost, `count` at most, the costlier end
    left out first. The last of `depth` blocks does not count: nothing above it would read an edit.
    """
    keys, inputs = (
        {layer: cost for layer, cost in costs.items() if layer < depth - 1}
        for costs in (keys, inputs)
    )
    span: tuple[int, ...] = ()
    if keys:
        low = high = min(keys, key=keys.__getitem__)
        most = FLAT * keys[low]
        while high - low + 1 < count:
            ends = [layer for layer in (low - 1, high + 1) if keys.get(layer, math.inf) <= most]
            if not ends:
                break
            added = min(ends, key=keys.__getitem__)
            low, high = min(low, added), max(high, added)
        span = tuple(range(low, high + 1))
    return CheapBlocks(span, min(inputs, key=inputs.__getitem__) if inputs else None)
