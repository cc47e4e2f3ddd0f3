"""The loss of targets as a function of one layer's weight, for methods that descend on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.editing.values import plan_rows
from nulledit.models.batches import Batch, chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, stored_weight, turned, write_weight


class WeightLoss:
    """Mean NLL of the facts' targets after their bare prompts, and its gradient by W of one layer.

    States at the block's input are computed once; each call runs the blocks from there on.
    """

    def __init__(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        *,
        layer: int,
        positions: int,
    ):
        """`positions` bounds the tokens that run together."""
        self.model, self.layer = model, layer
        own = [plan_rows(fact, model.encoder, ("{}",)) for fact in facts]
        self.rows = [row for rows in own for row in rows]
        self.weights = [1 / len(rows) / len(facts) for rows in own for _ in rows]
        inputs = [row.ids[:-1] for row in self.rows]
        self.chunks = [
            self._start(chunk, inputs)
            for chunk in chunks_by_length([len(ids) for ids in inputs], positions)
        ]

    @torch.no_grad()
    def _start(
        self, chunk: Sequence[int], inputs: Sequence[Sequence[int]]
    ) -> tuple[Batch, Tensor, Sequence[int]]:
        batch = self.model.collate([inputs[i] for i in chunk])
        return batch, self.model.run(batch, last=self.layer - 1), chunk

    def __call__(self, weight: Tensor) -> tuple[float, Tensor]:
        """Loss in nats and gradient [d_out, d_in], float64; the module's weight is as before."""
        module = self.model.mlp_out(self.layer)
        parameter = stored_weight(module)
        held, total = parameter.detach().clone(), 0.0
        gradient = torch.zeros_like(weight)
        parameter.requires_grad_(True)
        try:
            write_weight(module, weight)
            for batch, states, chunk in self.chunks:
                loss = self._loss(batch, states, chunk)
                (found,) = torch.autograd.grad(loss, parameter)
                gradient += turned(module, found).to(gradient)
                total += float(loss.detach())
        finally:
            parameter.requires_grad_(False)
            parameter.data.copy_(held)
        return total, gradient

    def _loss(self, batch: Batch, states: Tensor, chunk: Sequence[int]) -> Tensor:
        normed = self.model.run_normed(batch, states=states, first=self.layer)
        loss = normed.new_zeros(())
        for i, place in enumerate(chunk):
            row = self.rows[place]
            target = torch.tensor(row.target_ids, device=normed.device)
            at = slice(row.target_start - 1, row.target_start - 1 + len(target))
            logits = self.model.logits(normed[i, at])
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            own = F.cross_entropy(logits, target.to(logits.device))
            loss = loss + self.weights[place] * own.to(loss)
        return loss

    def current(self) -> Tensor:
        """The layer's weight now [d_out, d_in], float64."""
        return as_out_in(self.model.mlp_out(self.layer)).double()
