"""Neurons in the place of a block's own units, as exact factors of its matrices' changes.

Only n rows of the matrices that make the key, and n columns of W, change: each change is those rows
(or columns) times zeros and ones, of rank n; of rank 2n where one matrix makes both factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.export.same_shape import Places
from nulledit.export.updates import LayerExport, StoredLayer
from nulledit.linalg.neurons import Neurons
from nulledit.models.layouts import as_out_in
from nulledit.models.mlp import MlpForm


def neuron_factors(
    editor: EditEngine, places: Places, dtype: torch.dtype
) -> tuple[list[StoredLayer], dict[int, Neurons]]:
    """Factors, in `dtype`, of each matrix's change, and by layer the neurons that they make.

    ConfigError where `dtype` can't hold them.
    """
    names = {id(module): name for name, module in editor.model.named_modules()}
    matrices: list[StoredLayer] = []
    made: dict[int, Neurons] = {}
    with editor.base_weights():  # whose shapes the changes have
        for layer, neurons in places.neurons.items():
            form, at = editor.editable.form(layer), places.places(layer)
            wanted, own = neurons.map(_plain), form.stored(at).map(_plain)
            inputs = editor.weights.recorded(editor.history.active, layer)[0].double().cpu()
            for change in _changes(form, at, wanted, own, inputs):
                stored = change.stored(layer, names[id(change.module)], dtype)
                held = (stored.left, stored.right, stored.bias)
                if not all(t is None or t.isfinite().all() for t in held):
                    raise ConfigError(
                        f"{stored.module}: {dtype} can't hold the factors; use another dtype"
                    )
                matrices.append(stored)
            made[layer] = _rounded(wanted, own, dtype)
    return matrices, made


@dataclass(frozen=True)
class _Change:
    """What neurons change in one matrix, float64, on the CPU."""

    module: nn.Module
    places: Tensor
    """Of the rows, or columns, that change [m]."""
    new: Tensor
    """What they become: rows [m, d_in], or columns [d_out, m]."""
    before: Tensor
    """What they were."""
    by_row: bool
    """Whether it is rows that change."""
    bias: Tensor | None
    """Added to the bias [d_out]; None without one."""
    inputs: Tensor
    """What the changed rows, or columns, are given at the facts: [d_in, facts], or [m, facts]."""

    def stored(self, layer: int, name: str, dtype: torch.dtype) -> StoredLayer:
        """Its factors in `dtype`, and their numbers."""
        base = as_out_in(self.module)
        exact = self.new - self.before
        kept = exact.to(dtype)
        chosen = torch.zeros(base.shape[0 if self.by_row else 1], len(self.places), dtype=dtype)
        chosen[self.places, torch.arange(len(self.places))] = 1
        left, right = (chosen, kept) if self.by_row else (kept, chosen.mT.contiguous())
        missing, norm = exact - kept.double(), float(exact.norm())
        written = float((exact @ self.inputs).norm())
        rounding = float((self.new.to(base.dtype).double() - self.new).norm())
        report = LayerExport(
            layer=layer,
            parameter=f"{name}.weight",
            shape=(base.shape[0], base.shape[1]),
            rank=len(self.places),
            of=len(self.places),
            error=_share(float(missing.norm()), norm),
            key_error=_share(float((missing @ self.inputs).norm()), written),
            update_share=norm / float(torch.linalg.matrix_norm(base.double())),
            rounding_share=_share(rounding, norm),
            bytes=left.nbytes + right.nbytes,
        )
        bias = None if self.bias is None else self.bias.to(dtype)
        turned = isinstance(self.module, Conv1D)
        return StoredLayer(layer, name, turned, left, right, report, bias)


def _changes(
    form: MlpForm, at: Tensor, wanted: Neurons, own: Neurons, inputs: Tensor
) -> Iterator[_Change]:
    """Of each matrix of a block. `inputs` [d, facts]: of its MLP, at the facts."""
    makers = [rows for rows in (form.driven, form.factor) if rows is not None]
    for module in {id(rows.module): rows.module for rows in makers}.values():
        held = [rows for rows in makers if rows.module is module]
        places = torch.cat([at + rows.part * form.width for rows in held])
        new, before = (
            torch.cat([_weights(units, rows is form.driven) for rows in held])
            for units in (wanted, own)
        )
        bias = _bias(module)
        if bias is not None:
            constants = [wanted.biases if rows is form.driven else None for rows in held]
            zeros = inputs.new_zeros(len(at))
            added = torch.cat([zeros if c is None else c for c in constants]) - bias[places]
            bias = torch.zeros_like(bias).index_copy(0, places, added)
        yield _Change(module, places, new, before, True, bias, inputs)
    bias = _bias(form.out)
    yield _Change(
        form.out,
        at,
        wanted.columns,
        own.columns,
        False,
        None if bias is None else torch.zeros_like(bias),
        wanted.units(inputs, form.activation),
    )


def _weights(neurons: Neurons, driven: bool) -> Tensor:
    """The rows of one factor [n, d]."""
    found = neurons.rows if driven else neurons.factors
    assert found is not None
    return found


def _bias(module: nn.Module) -> Tensor | None:
    """The module's bias, float64, on the CPU."""
    found = module.bias
    return found.data.double().cpu() if isinstance(found, nn.Parameter) else None


def _rounded(wanted: Neurons, own: Neurons, dtype: torch.dtype) -> Neurons:
    """What the units `own` become if their change to `wanted` is rounded to `dtype`."""
    before = own.tensors()
    made = {
        name: before[name] + (new - before[name]).to(dtype).double()
        for name, new in wanted.tensors().items()
    }
    return replace(wanted, **made)


def added_reports(
    editor: EditEngine, layer: int, exact: Neurons, kept: Neurons
) -> Iterator[LayerExport]:
    """The numbers of each matrix that `kept` neurons, rounded from `exact`, are added to."""
    form = editor.editable.form(layer)
    names = {id(module): name for name, module in editor.model.named_modules()}
    wanted = exact.map(_plain)
    for rows, new, stored in (
        (form.driven.module, wanted.rows, kept.rows),
        (form.factor.module if form.factor else None, wanted.factors, kept.factors),
        (form.out, wanted.columns, kept.columns),
    ):
        if rows is None or new is None or stored is None:
            continue
        own = as_out_in(rows)
        base = own[:, : form.width] if rows is form.out else own[: form.width]
        norm = float(new.norm())
        yield LayerExport(
            layer=layer,
            parameter=f"{names[id(rows)]}.weight",
            shape=(new.shape[0], new.shape[1]),
            rank=0,
            of=0,
            error=_share(float((new - stored.double()).norm()), norm),
            key_error=0.0,
            update_share=norm / float(torch.linalg.matrix_norm(base.double())),
            rounding_share=_share(float((new.to(own.dtype).double() - new).norm()), norm),
            bytes=stored.nbytes,
        )


def _share(part: float, whole: float) -> float:
    """Of nothing, nothing: a fact that the base says already has a column of zeros."""
    return part / whole if whole else 0.0


def _plain(tensor: Tensor) -> Tensor:
    """Float64 on the CPU."""
    return tensor.double().cpu()
