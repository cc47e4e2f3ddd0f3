"""Whether weights are still what they were: sums of their bits, quick enough for every edit.

A change by training or by hand changes the sum but for one case in 2^64; who means to deceive can
keep it, and is met by the hashes of ledger and folders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORD = 8  # bytes that are added as one integer, modulo 2^64
BLOCK = 256  # words in a row


def bit_sums(model: nn.Module) -> dict[str, int]:
    """A sum for each parameter by name.

    Left out are those that are elsewhere until they work, and quantised ones: some are packed anew
    when they work.
    """
    return {
        name: bit_sum(parameter.data)
        for name, parameter in model.named_parameters()
        if parameter.device.type != "meta"
        and parameter.is_floating_point()
        and parameter.dtype.itemsize > 1
        and type(parameter.data) is Tensor
    }


@torch.no_grad()
def bit_sum(tensor: Tensor) -> int:
    """The sum of one tensor."""
    flat = tensor.contiguous().reshape(-1)
    if flat.storage_offset() * flat.itemsize % WORD:
        flat = flat.clone()  # a part of another tensor that begins within a word
    raw = flat.view(torch.uint8)
    whole = len(raw) // (WORD * BLOCK) * (WORD * BLOCK)
    blocks = raw[:whole].view(torch.int64).reshape(-1, BLOCK)
    # Rows and columns, so that numbers that change places change the sum wherever they stand.
    return int(sum(map(_by_place, (blocks.sum(0), blocks.sum(1), raw[whole:].long()))))


def _by_place(numbers: Tensor) -> Tensor:
    """Their sum, each times an odd number that tells its place."""
    return (numbers * (2 * torch.arange(len(numbers), device=numbers.device) + 1)).sum()
