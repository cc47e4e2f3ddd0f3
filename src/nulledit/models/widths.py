"""One width for all MLPs of a model, as transformers' configurations have it, and back.

Blocks with neurons of their own are wider than the others while a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nulledit.errors import ModelError
from nulledit.linalg.neurons import Neurons
from nulledit.models.layouts import as_out_in
from nulledit.models.mlp import MlpForm, find_forms
from nulledit.models.partial import PartialModel

WIDTHS = (
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "dff"),
    *("feed_forward_size", "dim_ff", "intermediate_size_mlp", "dense_intermediate_size"),
)
"""Names that configurations have for the width of an MLP."""
MULTIPLE = 64
"""Widths that are written are multiples of this, as kernels like them."""


@contextmanager
def one_width(model: PreTrainedModel, forms: Sequence[MlpForm]) -> Iterator[None]:
    """All of `forms` as wide as the widest inside, as the model's configuration says then.

    transformers has one width for all blocks; what is added gives exactly nothing. ModelError
    where the configuration can't say it.
    """
    config = model.config.get_text_config()
    widest = max(as_out_in(form.out).shape[1] for form in forms)
    width = -(-widest // MULTIPLE) * MULTIPLE
    if all(as_out_in(form.out).shape[1] == form.width for form in forms):
        yield
        return
    before = {name: getattr(config, name) for name in WIDTHS if hasattr(config, name)}
    held = [form.held() for form in forms]
    try:
        for name, value in before.items():
            if value in (None, forms[0].width):
                setattr(config, name, width)
        for form, neurons in zip(forms, held, strict=True):
            form.put(_padded(form, neurons, width - form.width))
        _check_shapes(model)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        for form, neurons in zip(forms, held, strict=True):
            form.put(neurons)


def narrowed(model: PartialModel, width: int, kept: Mapping[int, int] | None = None) -> None:
    """Take units that `one_width` wrote out of every block, which then has `width` of its own.

    `kept`: by block, how many of those besides its own stay.
    """
    config = model.model.config.get_text_config()
    for layer, form in find_forms(model, range(model.depth)).items():
        if form.width > width:
            own, n = replace(form, width=width), (kept or {}).get(layer, 0)
            own.put(own.stored(slice(width, width + n)) if n else None)
    for name in WIDTHS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > width:
            setattr(config, name, width)


def _padded(form: MlpForm, neurons: Neurons | None, n: int) -> Neurons:
    """`neurons` and as many that give nothing as make them `n`."""
    like, d_out = as_out_in(form.driven.module), len(as_out_in(form.out))
    if neurons is None:
        neurons = Neurons(
            rows=like.new_zeros(0, form.d),
            biases=like.new_zeros(0) if form.units.biased else None,
            factors=like.new_zeros(0, form.d) if form.units.gated else None,
            columns=like.new_zeros(d_out, 0),
        )
    missing = n - len(neurons.rows)

    def longer(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])

    rows = longer(neurons.rows)
    assert rows is not None
    columns = torch.cat([neurons.columns, neurons.columns.new_zeros(d_out, missing)], dim=1)
    return Neurons(rows, longer(neurons.biases), longer(neurons.factors), columns)


def _check_shapes(model: PreTrainedModel) -> None:
    """ModelError unless a model of this configuration has the shapes of this one."""
    with torch.device("meta"):
        other = type(model)(model.config)
    expected = {name: tuple(t.shape) for name, t in other.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if expected.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise ModelError(
                f"{name} is {tuple(tensor.shape)} with its neurons, and the configuration of "
                f"{type(model).__name__} can't say so ({expected[name]}): it can't be written as a "
                "model folder"
            )
