"""What a ledger keeps of epochs and columns as tensors, and how it is read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nulledit.ledger.records import Column, History
from nulledit.linalg.neurons import UnitForm
from nulledit.linalg.spectrum import Block, Spectrum, part_names


def by_batch(columns: Sequence[Column]) -> dict[int, list[Column]]:
    """Columns by the number of their batch, ascending."""
    batches: dict[int, list[Column]] = {}
    for column in columns:
        batches.setdefault(column.batch, []).append(column)
    return dict(sorted(batches.items()))


def recorded(history: History, columns: Sequence[Column], layer: int) -> tuple[Tensor, Tensor]:
    """Keys [d_in, n] and absolute targets [d_out, n] of `columns` at `layer`, as stored."""
    if not columns:
        d_out, d_in = history.original(layer).shape
        return torch.empty(d_in, 0), torch.empty(d_out, 0)
    return (
        history.column_tensor(columns, f"keys.{layer}").mT,
        history.column_tensor(columns, f"targets.{layer}").mT,
    )


def form_tensors(form: UnitForm, layer: int) -> dict[str, Tensor]:
    """What `read_form` reads."""
    name = torch.tensor(list(form.activation.encode()), dtype=torch.uint8)
    return {
        f"activation.{layer}": name,
        f"unit.{layer}": torch.tensor([form.biased, form.gated]),
    }


def read_form(tensors: Mapping[str, Tensor], layer: int) -> UnitForm:
    """What a unit of the MLP of `layer` is, in an epoch's tensors."""
    name = bytes(tensors[f"activation.{layer}"].tolist()).decode()
    return UnitForm(name, *map(bool, tensors[f"unit.{layer}"].tolist()))


def spectrum_tensors(
    spectrum: Spectrum, threshold: float, layer: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What `read_spectrum` reads, with the eigenvectors in `dtype`."""
    found = {f"threshold.{layer}": torch.tensor(threshold, dtype=torch.float64)}
    if spectrum.tokens:
        found[f"tokens.{layer}"] = torch.tensor(spectrum.tokens)
    for name, part in spectrum.parts(f"{layer}").items():
        found |= {
            f"eigenvalues.{name}": part.eigenvalues.double().contiguous(),
            f"eigenvectors.{name}": part.eigenvectors.to(dtype).contiguous(),
            f"first_eigenvector.{name}": torch.tensor(part.start),
        }
        if dtype != torch.float64:
            found[f"rounded.{name}"] = torch.tensor(True)
    return found


def read_spectrum(
    tensors: Mapping[str, Tensor], layer: int, device: torch.device | None = None
) -> tuple[Spectrum, float]:
    """The spectrum of `layer` in an epoch's tensors, float64, and its τ.

    Eigenvectors that were rounded are made orthonormal again: a part of 1e-7 of a gain of 1e8 would
    be no positive metric. Epochs from before that was done lack the mark of it, and so keep the
    weights that they were recorded with, bit for bit.
    """

    def part(name: str) -> Block:
        kept = Block(
            tensors[f"eigenvalues.{name}"].to(device),
            tensors[f"eigenvectors.{name}"].to(device).double(),
            int(tensors[f"first_eigenvector.{name}"]),
        )
        return kept.orthonormal() if f"rounded.{name}" in tensors else kept

    counted = tensors.get(f"tokens.{layer}")
    tokens = [] if counted is None else counted.tolist()
    parts = part_names(f"{layer}", len(tokens), tensors)
    blocks = {i: part(name) for i, name in parts.items()}
    return Spectrum.joined(blocks, tokens), float(tensors[f"threshold.{layer}"])
