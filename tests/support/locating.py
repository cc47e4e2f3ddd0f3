"""A question to trace, of a model that knows nothing."""

import torch

from nulledit.tracing import Question

SPREAD = 0.3


def question(first=2, last=4, length=7, answer=5):
    ids = tuple(torch.randint(1, 400, (length,), generator=torch.Generator().manual_seed(1)))
    return Question("q", tuple(map(int, ids)), first, last, answer, "answer", True)
