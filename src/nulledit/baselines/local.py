"""Plain local fine-tuning: one block's W, trained on the facts and on their end.

A localized fine-tuning in mini-batches over all facts, as "Fine-tuning Done Right in Model Editing"
(arXiv:2509.22072) argues for, in its plainest form: Adam on one W, the end token after each target.
The update lies beside W, in float32 at least, and W itself is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nulledit.baselines.training import Trained, TrainingSettings
from nulledit.data.facts import Fact
from nulledit.editing.call_log import Progress
from nulledit.errors import ModelError
from nulledit.io.settings import Count, NotNegative, Positive, Whole, checked
from nulledit.models.editable_model import EditableModel
from nulledit.models.experts import is_experts
from nulledit.models.hooks import hooked
from nulledit.models.layouts import as_out_in


@checked
@dataclass(frozen=True)
class LocalSettings(TrainingSettings):
    """Which matrix is trained, and how."""

    layer: Whole = 0
    """The block whose W is trained, from 0."""
    epochs: Count = 25
    learning_rate: Positive = 5e-4
    stop_loss: NotNegative = 0.0


class LocalBaseline(Trained[LocalSettings]):
    """An update of one block's W, trained, from its making to `close`."""

    name = "local fine-tuning"
    ends = True

    def __init__(self, model: EditableModel, settings: LocalSettings):
        """Put an update of zeros beside W; ModelError for a block out of range, or of experts."""
        if not 0 <= settings.layer < model.depth:
            raise ModelError(
                f"layer {settings.layer} is out of range: the model has layers 0 to "
                f"{model.depth - 1}"
            )
        module = model.matrix(settings.layer)
        if is_experts(module):
            raise ModelError(
                f"block {settings.layer} is a mixture of experts, which local fine-tuning does "
                "not train: name a dense block"
            )
        super().__init__(model, settings)
        weight = as_out_in(module)
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = nn.Parameter(torch.zeros_like(weight, dtype=wide))
        self.parameters = [update]
        self._placed = ExitStack()
        self._placed.enter_context(hooked(module, _adding(update)))

    def _remove(self) -> None:
        self._placed.close()


@contextmanager
def local_finetune(
    model: EditableModel,
    facts: Sequence[Fact],
    settings: LocalSettings,
    progress: Progress | None = None,
) -> Iterator[LocalBaseline]:
    """The model with one W trained on `facts` inside; as it was, to the bit, afterwards."""
    with LocalBaseline(model, settings) as baseline:
        baseline.train(facts, progress)
        yield baseline


def _adding(update: Tensor) -> Any:
    """A hook after W that adds what `update` [d_out, d_in] gives at the same keys."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(args[0].to(update.dtype), update).to(output.dtype)

    return hook
