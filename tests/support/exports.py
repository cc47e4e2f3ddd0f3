"""How tests of exports compare models."""

import torch


@torch.no_grad()
def logits(model):
    """Of some fixed ids, float64."""
    ids = torch.arange(48).reshape(4, 12) * 7 % 390 + 1
    return model(input_ids=ids).logits.double()


def gap(a, b):
    """The largest difference, as a share of the largest of `b`."""
    return float((a - b).abs().max() / b.abs().max())
