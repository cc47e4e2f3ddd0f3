"""How a block's MLP makes the input of W, and units of its own that it can be given.

    k = φ(A x + a)                plain: GPT-2, GPT-J, OPT, Falcon
    k = φ(A x + a) ⊙ (B x + b)    gated: Llama, Qwen, Gemma; of one matrix [A; B] in Phi-3

x [d] is the MLP's input after its norm, k [d_in] the key. Nothing here knows a family's name: one
run of a few tokens shows which matrices and which φ give the key that W is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nulledit.errors import ModelError
from nulledit.linalg.neurons import ACTIVATIONS, Neurons, UnitForm
from nulledit.models.batches import collate
from nulledit.models.dense import is_quantised
from nulledit.models.experts import is_experts
from nulledit.models.layouts import as_out_in
from nulledit.models.partial import PartialModel
from nulledit.models.unchanged import bit_sum

MISSED = 0.01
"""‖k − explained‖/‖k‖ below which a form explains a key, besides what rounding leaves."""
TOKENS = 16
"""Tokens of the run that shows a form."""


@dataclass(frozen=True)
class Rows:
    """The rows of a matrix that make one factor of the key."""

    module: nn.Module
    """A linear layer or a Conv1D."""
    part: int
    """Which part of its output, from 0."""
    parts: int
    """Parts of its output, each as wide as the key: 2 where one matrix makes both factors."""


@dataclass(frozen=True)
class MlpForm:
    """The parts of one block's MLP that a unit lies in."""

    driven: Rows
    """A, whose output φ is applied to."""
    factor: Rows | None
    """B; None in a plain MLP."""
    activation: str
    """Name of φ."""
    out: nn.Module
    """W."""
    width: int
    """d_in: units of the block as it was taken up."""
    sums: tuple[int, ...] = ()
    """Of their bits, as they were then."""

    @property
    def d(self) -> int:
        """Width of the MLP's input."""
        return as_out_in(self.driven.module).shape[1]

    @property
    def units(self) -> UnitForm:
        """What a unit of it is."""
        biased = getattr(self.driven.module, "bias", None) is not None
        return UnitForm(self.activation, biased, self.factor is not None)

    @torch.no_grad()
    def put(self, neurons: Neurons | None) -> None:
        """Have `neurons` besides the block's own units, in the place of those put before.

        None: the block's own alone, whose bits are never changed.
        """
        for module, name, whole in self._made(neurons):
            before = getattr(module, name)
            if before.shape != whole.shape or not torch.equal(before, whole):
                fresh = nn.Parameter(whole.contiguous(), requires_grad=before.requires_grad)
                setattr(module, name, fresh)
        self._say_sizes()

    @contextmanager
    def replaced(self, places: Tensor, neurons: Neurons) -> Iterator[None]:
        """`neurons` in the place of the own units at `places` [n] inside, no others besides.

        Afterwards the block has the very parameters of before.
        """
        before = [(module, name, getattr(module, name)) for module, name, _ in self._made(None)]
        try:
            with torch.no_grad():
                for module, name, own in list(self._made(None)):
                    grad = getattr(module, name).requires_grad
                    setattr(module, name, nn.Parameter(own.contiguous(), requires_grad=grad))
                for rows in self._rows():
                    driven = rows is self.driven
                    weights = neurons.rows if driven else neurons.factors
                    at = rows.part * self.width + places.to(self.columns.device)
                    matrix, bias = as_out_in(rows.module), rows.module.bias
                    assert weights is not None
                    matrix[at] = weights.to(matrix)
                    if isinstance(bias, nn.Parameter):
                        constants = neurons.biases if driven else None
                        bias.data[at] = 0 if constants is None else constants.to(bias.data)
                columns = as_out_in(self.out)
                columns[:, places.to(columns.device)] = neurons.columns.to(columns)
            self._say_sizes()
            yield
        finally:
            for module, name, parameter in before:
                setattr(module, name, parameter)
            self._say_sizes()

    def _say_sizes(self) -> None:
        """Have the modules' own numbers of rows and columns say what their weights are."""
        for rows in self._rows():
            size = "nf" if _turned(rows.module) else "out_features"
            vars(rows.module)[size] = as_out_in(rows.module).shape[0]
        vars(self.out)["nx" if _turned(self.out) else "in_features"] = as_out_in(self.out).shape[1]

    @torch.no_grad()
    def held(self) -> Neurons | None:
        """The units besides the block's own, as they are stored; None: there are none."""
        if as_out_in(self.out).shape[1] == self.width:
            return None
        return self.stored(slice(self.width, None))

    @torch.no_grad()
    def stored(self, places: slice | Tensor) -> Neurons:
        """A copy of the units at `places`: the block's own first, then those besides."""

        def rows(found: Rows | None, name: str) -> Tensor | None:
            stored = getattr(found.module, name, None) if found else None
            if found is None or not isinstance(stored, nn.Parameter):
                return None
            whole = as_out_in(found.module) if name == "weight" else stored.data
            part = whole.tensor_split(found.parts)[found.part]
            return part[places].clone()

        driven = rows(self.driven, "weight")
        assert driven is not None
        biases, factors = rows(self.driven, "bias"), rows(self.factor, "weight")
        return Neurons(driven, biases, factors, as_out_in(self.out)[:, places].clone())

    @torch.no_grad()
    def holds(self, neurons: Neurons | None) -> bool:
        """Whether the block is what `put` makes of `neurons`, and its own units as they were."""
        made = all(
            getattr(module, name).shape == whole.shape and torch.equal(getattr(module, name), whole)
            for module, name, whole in self._made(neurons)
        )
        return made and self.own_sums() == self.sums

    @torch.no_grad()
    def own_sums(self) -> tuple[int, ...]:
        """Sums of the bits of the block's own units."""
        return tuple(bit_sum(whole) for _, _, whole in self._made(None))

    def _rows(self) -> list[Rows]:
        return [rows for rows in (self.driven, self.factor) if rows is not None]

    def _made(self, neurons: Neurons | None) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Each parameter, and what it is with `neurons`: module, name, tensor."""
        fresh: dict[int, tuple[Tensor, Tensor | None]] = {}
        if neurons is not None:
            fresh[id(self.driven)] = neurons.rows, neurons.biases
            if neurons.factors is not None:
                fresh[id(self.factor)] = neurons.factors, None
        modules = {id(rows.module): rows.module for rows in self._rows()}
        for module in modules.values():
            parts = sorted((r for r in self._rows() if r.module is module), key=lambda r: r.part)
            weight, bias = as_out_in(module), module.bias
            held = len(weight) // parts[0].parts
            weights, biases = [], []
            for rows in parts:
                own = slice(rows.part * held, rows.part * held + self.width)
                weights.append(weight[own])
                added, constants = fresh.get(id(rows), (None, None))
                if added is not None:
                    weights.append(added.to(weight))
                if isinstance(bias, nn.Parameter):
                    biases.append(bias.data[own])
                    if added is not None:
                        none = torch.zeros(len(added)).to(bias.data)
                        biases.append(none if constants is None else constants.to(bias.data))
            whole = torch.cat(weights)
            yield module, "weight", whole.mT if _turned(module) else whole
            if biases:
                yield module, "bias", torch.cat(biases)
        own_columns = as_out_in(self.out)[:, : self.width]
        columns = [] if neurons is None else [neurons.columns.to(own_columns)]
        whole = torch.cat([own_columns, *columns], dim=1)
        yield self.out, "weight", whole.mT if _turned(self.out) else whole

    def parameters(self) -> list[nn.Parameter]:
        """What neurons are put into."""
        return [getattr(module, name) for module, name, _ in self._made(None)]

    @property
    def columns(self) -> Tensor:
        """W's columns besides its own [d_out, n]."""
        return as_out_in(self.out)[:, self.width :]


@torch.no_grad()
def find_form(model: PartialModel, layer: int) -> MlpForm:
    """The form of block `layer`'s MLP, as a run of a few tokens shows it.

    ModelError where no form explains the key: mixtures of experts, quantised or offloaded
    matrices, factors of their own.
    """
    out = model.mlp_out(layer)
    if found := find_forms(model, [layer]):
        return found[layer]
    if is_experts(out):
        raise ModelError(
            f"block {layer} is a mixture of experts, whose tokens go to different ones, so it "
            "can't be given neurons of its own: name a block with one MLP by --layers, if the "
            "model has some, or use --method alphaedit, which edits experts"
        )
    raise ModelError(
        f"block {layer}: no form of MLP that is known explains the input of "
        f"{model.layout.mlp_out} (quantised or offloaded matrices, or factors between?), so it "
        "can't be given neurons of its own"
    )


@torch.no_grad()
def find_forms(model: PartialModel, layers: Iterable[int]) -> dict[int, MlpForm]:
    """The forms of those of `layers` that have one, as a single run of a few tokens shows them."""
    outs = {layer: model.mlp_out(layer) for layer in layers if model.fits(layer)}
    made: dict[int, list[tuple[nn.Module, Tensor]]] = {layer: [] for layer in outs}
    keys: dict[int, list[Tensor]] = {layer: [] for layer in outs}
    with ExitStack() as stack:
        for layer, out in outs.items():
            for module in model.blocks[layer].modules():
                if _is_plain(module) and module is not out:
                    stack.enter_context(_watching(module, made[layer]))
            stack.enter_context(_receiving(out, keys[layer]))
        if outs:
            high = min(TOKENS, model.vocabulary or TOKENS)
            batch = collate([list(range(high))], pad_id=0, device=model.device)
            model.run(batch, last=max(outs))
    found = {}
    for layer, out in outs.items():
        if not (_is_plain(out) and keys[layer]):
            continue
        key = keys[layer][-1].reshape(-1, keys[layer][-1].shape[-1]).double()
        rows = [(m, o.reshape(len(key), -1).double()) for m, o in made[layer]]
        if form := _explained(out, key, rows):
            found[layer] = replace(form, sums=form.own_sums())
    return found


def _explained(out: nn.Module, key: Tensor, made: list[tuple[nn.Module, Tensor]]) -> MlpForm | None:
    """The form that explains `key` [tokens, d_in] best, if one does."""
    width = key.shape[1]
    factors: list[tuple[Rows, Tensor]] = []
    for module, output in made:
        parts = output.shape[1] // width
        if output.shape[1] == parts * width and parts in (1, 2):
            pieces = output.split(width, dim=1)
            factors += [(Rows(module, i, parts), piece) for i, piece in enumerate(pieces)]
    best: tuple[float, MlpForm] | None = None
    pairs: list[tuple[tuple[Rows, Tensor], tuple[Rows, Tensor] | None]] = [
        (one, None) for one in factors
    ]
    pairs += list(permutations(factors, 2))
    for name, activation in ACTIVATIONS.items():
        for (rows, driven), other in pairs:
            made_of_it = activation(driven) * (1.0 if other is None else other[1])
            missed = float((key - made_of_it).norm() / key.norm())
            if best is None or missed < best[0]:
                form = MlpForm(rows, None if other is None else other[0], name, out, width)
                best = missed, form
    rounding = 8 * torch.finfo(as_out_in(out).dtype).eps
    return best[1] if best is not None and best[0] < MISSED + rounding else None


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a matrix whose rows can be read and joined by others."""
    if not isinstance(module, nn.Linear | Conv1D) or is_quantised(module):
        return False
    return isinstance(module.weight, nn.Parameter) and module.weight.device.type != "meta"


def _turned(module: nn.Module) -> bool:
    """Whether the module stores its weight [d_in, d_out]."""
    return isinstance(module, Conv1D)


@contextmanager
def _watching(module: nn.Module, found: list[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((module, output.clone()))  # some models work on it in place

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _receiving(module: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].clone())

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
