"""How much longer hidden states have become: edits that pile up lengthen them before they break."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.drift import read_states
from nulledit.evaluation.stats import Rate
from nulledit.models.editable_model import EditableModel

PIECE = 64  # tokens of other text before the state that is read


def edit_rows(model: EditableModel, facts: Sequence[Fact]) -> list[tuple[int, ...]]:
    """Token ids of each fact's prompt up to the subject's last token, where its key is."""
    encode = model.encoder.encode_template
    return [encode(fact.prompt, fact.subject).upto_subject().ids for fact in facts]


def text_rows(windows: Sequence[Sequence[int]], *, piece: int = PIECE) -> list[tuple[int, ...]]:
    """Windows of token ids in full pieces of `piece` (a shorter window as it is)."""
    return [
        tuple(window[start : start + piece])
        for window in windows
        for start in range(0, max(len(window) - piece, 0) + 1, piece)
    ]


def state_norms(model: EditableModel, rows: Sequence[Sequence[int]], layer: int) -> Tensor:
    """‖h‖ [n] after block `layer` at the last token of each row, for the weights as they are now.

    Blocks above are not run.
    """
    states = read_states(model, rows, [layer])
    return states.by_layer[layer].norm(dim=1)


def norm_growth(base: Tensor, edited: Tensor) -> Rate:
    """Mean over rows of ‖h′‖/‖h‖ − 1, from the norms [n] of both models.

    nan if one of them is not finite: leaving it out would flatter a broken model.
    """
    grown = edited.double() / base.double() - 1
    if not torch.isfinite(grown).all():
        return Rate(math.nan, math.nan, len(grown))
    return Rate.of(grown.tolist())


def hidden_growth(editor: EditEngine, rows: Sequence[Sequence[int]]) -> Rate:
    """Growth of hidden states' norm at `rows` of token ids, edited against base model.

    After the last edited block.
    """
    layer = editor.recipe.layers[-1]
    with editor.base_weights():
        base = state_norms(editor.editable, rows, layer)
    return norm_growth(base, state_norms(editor.editable, rows, layer))
