"""Which keys are the same."""

from __future__ import annotations

from torch import Tensor


def unit_columns(keys: Tensor) -> Tensor:
    """`keys` [d, n] scaled to length 1, float64."""
    K = keys.double()
    return K / K.norm(dim=0, keepdim=True).clamp_min(1e-30)


def same_key_groups(keys: Tensor, same: float) -> list[int]:
    """For each column of `keys` [d_in, n], the index of the first column it shares a key with."""
    unit = unit_columns(keys)
    close = (unit.mT @ unit) > same
    groups = list(range(keys.shape[1]))
    for i in range(len(groups)):
        for j in range(i):
            if close[i, j] and groups[i] != groups[j]:
                old, new = max(groups[i], groups[j]), min(groups[i], groups[j])
                groups = [new if g == old else g for g in groups]
    return groups
