"""A quantised matrix made dense, so that edits can be written into it.

What a quantised module stores is its library's own; how it acts is not. The matrix is what the
module makes of unit vectors, so any library's will do. Everything else in the model stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nulledit.errors import ModelError
from nulledit.models.experts import is_experts

ROWS = 512  # unit vectors that a module is given together
ALIKE = 0.01  # share of a matrix by which it may be read otherwise elsewhere
MISSED = 0.1  # share of its output that a module may give otherwise than the matrix read from it


class Dense(nn.Linear):
    """Stands in for a quantised module: its matrix in the dtype that it computes in."""

    def __init__(self, weight: Tensor, bias: Tensor | None, base_hash: str):
        """`weight` [d_out, d_in]; `base_hash`: of the model while it was all quantised."""
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
        self.base_hash = base_hash
        self.original = digest_of(self.weight)

    def begin_from(self, weight: Tensor) -> bool:
        """Take W₀ [d_out, d_in] as a ledger has it; False if the module holds another matrix.

        Reading it again gives other bits on other hardware, not another matrix.
        """
        given = weight.to(self.weight)
        if given.shape != self.weight.shape:
            return False
        if digest_of(given) != self.original:
            if digest_of(self.weight) != self.original:
                return False  # edited, and not from there
            own = self.weight.double()
            if not float((given.double() - own).norm()) <= ALIKE * float(own.norm()):
                return False
        with torch.no_grad():
            self.weight.copy_(weight)
        self.original = digest_of(self.weight)
        return True


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` keeps its matrix in another way than as plain floating-point numbers."""
    weight = module.down_proj if is_experts(module) else getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return True
    plain = type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor
    return not (plain and weight.is_floating_point() and weight.dtype.itemsize > 1)


@torch.no_grad()
def dense_of(module: nn.Module, example: Tensor, base_hash: str, name: str) -> tuple[Dense, float]:
    """`module` as a `Dense`, and by how much it acts otherwise, as a share of its output.

    `example` [rows, d_in]: some of what the module is given; its dtype and device are taken, and
    the two are compared on it. ModelError where the module does not act as a matrix: `name` says
    which.
    """
    d_in = example.shape[-1]

    def given(rows: Tensor) -> Tensor:
        found = module(rows)
        if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
            raise ModelError(f"{name}: {type(module).__name__} does not act as a matrix")
        return found

    with torch.enable_grad():
        if not given(example.clone().requires_grad_()).requires_grad:
            raise ModelError(
                f"{name}: {type(module).__name__} passes no gradient on, which values need; load "
                "the model anew by nulledit, or on another device"
            )
    zero = given(example.new_zeros(1, d_in))[0]
    bias = zero if bool(zero.any()) else None
    parts = []
    with _without_bias(module) if bias is not None else _as_it_is():
        offset = given(example.new_zeros(1, d_in)) if bias is not None else zero[None]
        for start in range(0, d_in, ROWS):
            rows = example.new_zeros(min(ROWS, d_in - start), d_in)
            rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 1
            parts.append((given(rows) - offset).mT)
    weight = torch.cat(parts, dim=1).to(example.dtype)
    dense = Dense(weight, None if bias is None else bias.to(example.dtype), base_hash)
    expected, found = given(example).double(), dense(example).double()
    missed = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not missed <= MISSED:
        raise ModelError(
            f"{name}: {type(module).__name__} does not act as the matrix that unit vectors show: "
            f"its output differs by {missed:.2g} of its size; expected at most {MISSED}"
        )
    return dense, missed


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    """A bias of nought inside, where it is a parameter: what is small beside it keeps its bits."""
    bias = module._parameters.get("bias")
    held = None if bias is None else bias.detach().clone()
    try:
        if bias is not None:
            bias.data.zero_()
        yield
    finally:
        if bias is not None and held is not None:
            bias.data.copy_(held)


def digest_of(tensor: Tensor) -> str:
    """Hash of a tensor's bytes, in hex."""
    digest = hashlib.sha256()
    update_digest(digest, tensor)
    return digest.hexdigest()


def update_digest(digest: Any, tensor: Tensor) -> None:
    """Add a tensor's bytes to a hash."""
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    digest.update(raw.numpy())
