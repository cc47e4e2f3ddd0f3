"""A LoRA trained on the facts: the fine-tuning that users would try first.

LoRA (arXiv:2106.09685) by PEFT: W x + (α/r) B A x with A [r, d_in], B [d_out, r] trained and the
model's own weights never touched, so that it is bit for bit the same once the adapter is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, get_args

from nulledit.baselines.adapter import (
    Adapter,
    Target,
    import_peft,
    linear_modules,
    refuse_adapted,
)
from nulledit.baselines.training import Trained, TrainingSettings, seeded
from nulledit.data.facts import Fact
from nulledit.editing.call_log import Progress
from nulledit.io.settings import Count, Expected, Positive, Several, checked
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import differentiating

Blocks = Annotated[Several[int], Expected("some blocks, or None for all", bool)]
Targets = Annotated[Several[Target], Expected(f"some of {', '.join(get_args(Target))}", bool)]


@checked
@dataclass(frozen=True)
class LoraSettings(TrainingSettings):
    """How the adapter looks and how it is trained; defaults chosen as docs/baselines.md says."""

    rank: Count = 8
    """r, the rank of each matrix's update."""
    alpha: Positive = 16.0
    """α; the update is scaled by α/r."""
    layers: Blocks | None = None
    """Blocks with an adapter, from 0; None: all."""
    targets: Targets = ("mlp_out",)
    """Linear maps of a block with an adapter: those of attention, of the MLP, or the MLP's last."""


class LoraBaseline(Trained[LoraSettings]):
    """A LoRA on a model, from its making to `close`."""

    name = "lora"

    def __init__(self, model: EditableModel, settings: LoraSettings | None = None):
        """Put a fresh adapter on `model`; ConfigError without PEFT."""
        import_peft()
        refuse_adapted(model.model)
        s = settings or LoraSettings()
        names = linear_modules(model, s.targets, s.layers)
        super().__init__(model, s)
        with seeded(model.device, s.seed), differentiating():
            self._adapter = Adapter(model.model, names, rank=s.rank, alpha=s.alpha)
        self.parameters = self._adapter.parameters

    def _remove(self) -> None:
        self._adapter.remove()


@contextmanager
def lora_finetune(
    model: EditableModel,
    facts: Sequence[Fact],
    settings: LoraSettings | None = None,
    progress: Progress | None = None,
) -> Iterator[LoraBaseline]:
    """The model with a LoRA trained on `facts` inside; as it was, to the bit, afterwards.

    For a stream, make a LoraBaseline and call `train` once per batch.
    """
    with LoraBaseline(model, settings) as baseline:
        baseline.train(facts, progress)
        yield baseline
