"""What a value costs other text in each block, and how well its MLP tells subjects apart.

An edit adds δ s(x) to what a block gives: δ at its subject, where s = 1, and a share s of it on
text. Per token of text, the KL of what is predicted grows by ½ E[s²] δᵀSδ to second order, with the
Fisher information S = E[g gᵀ], g the gradient of the log-probability of sampled tokens by what the
block gives. Of a δ as long as the state h at the subject, and in no direction that is known, that
is half of

    cost = tr(S)/d · ‖h‖² · E[s²],    E[s²] = 1/(kᵀC⁻¹k)

with k what the edit reads there and C = E[k kᵀ] over text: W's key for methods that change W, the
MLP's input x for a neuron of its own. The gate of such a neuron is closed below a threshold, so
how often text and other facts open it is measured, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nulledit.config import ContextSettings
from nulledit.data.corpus import Corpus, open_corpus
from nulledit.data.facts import Fact
from nulledit.editing.contexts import make_contexts
from nulledit.errors import ConfigError, FactError, ModelError, StatisticsError
from nulledit.evaluation.reading import read_windows
from nulledit.evaluation.stats import Rate
from nulledit.linalg.moments import SecondMoment
from nulledit.methods.gates import GateSettings, gate_directions
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.tracing.cost_passes import Drives, Moments, Passes, Progress, Subjects, Windows
from nulledit.tracing.suggestion import CheapBlocks, cheapest

UNIT = 1e-4  # nats a token, of costs as they are shown
RARE = 1000  # one token of text in so many drives a gate above what is reported
RIDGE = 1e-6
"""Of C's mean eigenvalue, added to all: a layer norm leaves a direction out of all inputs, and
ReLUs some units out of all keys."""


@dataclass(frozen=True)
class CostSettings:
    """How costs are measured."""

    windows: int = 64
    """Windows of text for gradients, and for how far text drives gates."""
    tokens: int = 30_000
    """Tokens of text for second moments, besides."""
    window: int = 256
    """Tokens of a window."""
    keys: bool = True
    """Whether second moments of keys are summed, too: d_in² numbers a block."""
    seed: int = 0
    """Of the sampled tokens."""
    positions: int = 0
    """Token positions that run together; 0: by device."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 2), ("tokens", 1), ("window", 2), ("positions", 0)):
            if (found := getattr(self, name)) < least:
                raise ConfigError(f"{name} is {found}; expected {least} or more")

    @property
    def all_windows(self) -> int:
        """Windows of text that are read in all."""
        return self.windows + -(-self.tokens // (self.window - 1))


@dataclass(frozen=True)
class GateDrives:
    """What drives the gates of facts in one block; s = 1 at a gate's own subject."""

    text: float
    """√E[s²] over text that C has not seen, median over facts."""
    text_rare: float
    """What one token of text in a thousand exceeds, median over facts."""
    past_gate: Rate
    """Cost where only tokens count at which the gate is open, nats a token, over facts."""
    text_open: float
    """Share of pairs of a fact and a token of text with s above the threshold."""
    facts_open: float
    """Share of pairs of facts with other subjects: one's gate opens on the other's."""
    rivals: Rate | None
    """The largest s on another fact's subject, over facts; None: no fact has another subject."""
    rival: float | None
    """The largest of these."""


@dataclass(frozen=True)
class BlockCost:
    """One block."""

    layer: int
    """From 0."""
    sensitivity: Rate
    """tr(S)/d, over windows of text."""
    keys: Rate | None
    """Cost of a value that W writes, nats a token, over facts; None: not asked for."""
    inputs: Rate | None
    """The same of a neuron of its own; None: the MLP can't be given any."""
    gates: GateDrives | None
    """How well its MLP tells subjects apart; None with `inputs`."""


@dataclass(frozen=True)
class Costs:
    """What was measured, block by block."""

    settings: CostSettings
    """How."""
    threshold: float
    """Drive above which a gate counts as open."""
    depth: int
    """Blocks of the model."""
    facts: int
    """Facts that it is over."""
    at_first_token: tuple[str, ...]
    """Ids of facts left out: their subject is the text's first token, an attention sink."""
    blocks: tuple[BlockCost, ...]
    """All that can be edited, by layer."""
    wall_seconds: float
    """Without loading the model."""
    cpu_seconds: float
    """The same in time of all cores."""
    text: str = ""
    """Name of the text."""

    @property
    def suggestion(self) -> CheapBlocks:
        """The cheapest blocks."""
        return cheapest(
            {b.layer: b.keys.mean for b in self.blocks if b.keys},
            {b.layer: b.inputs.mean for b in self.blocks if b.inputs},
            depth=self.depth,
        )


def cost_of(
    model: EditableModel,
    facts: Sequence[Fact],
    text: str | Path | Corpus,
    contexts: ContextSettings,
    settings: CostSettings | None = None,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> Costs:
    """`measure_costs` on the beginning of `text`, in contexts made as edits make them.

    StatisticsError, besides, for a text that is too short.
    """
    settings = settings or CostSettings()
    settings = replace(settings, window=min(settings.window, model.context))
    corpus = text if isinstance(text, Corpus) else open_corpus(text)
    wanted = settings.all_windows
    windows = read_windows(corpus, model.tokenizer, windows=wanted, window=settings.window)
    if len(windows) < wanted:
        raise StatisticsError(
            f"{corpus.name}: has {len(windows)} windows of {settings.window} tokens, expected "
            f"{wanted}: give a longer text, or fewer --tokens or --windows"
        )
    made = make_contexts(model, contexts, seed=settings.seed)
    found = measure_costs(
        model,
        facts,
        windows,
        settings,
        contexts=made,
        bare_weight=contexts.bare_weight,
        progress=progress,
    )
    return replace(found, text=corpus.name)


def measure_costs(
    model: EditableModel,
    facts: Sequence[Fact],
    windows: Windows,
    settings: CostSettings | None = None,
    *,
    contexts: Sequence[str] = ("{}",),
    bare_weight: float = 0.5,
    progress: Progress = lambda stage, done, total: None,
) -> Costs:
    """What a value for `facts` costs in every block of `model`, which is as before afterwards.

    `windows` of token ids of one length: the last `settings.windows` for gradients and drives, all
    before for second moments. `contexts` and their weight as for edits: keys and inputs are means
    over them. `progress` receives a stage, what is done and of how much.

    FactError without a fact that counts, StatisticsError with fewer tokens than a key is wide,
    ModelError where no block can be edited.
    """
    settings, gate_settings = settings or CostSettings(), GateSettings()
    wall, cpu = time.perf_counter(), time.process_time()
    layers = [layer for layer in range(model.depth) if model.fits(layer)]
    if not layers:
        model.mlp_out(0)
    first = [fact for fact in facts if _at_first_token(model, fact)]
    counted = [fact for fact in facts if fact not in first]
    if not counted:
        raise FactError(
            f"none of {len(facts)} facts counts: each subject is its prompt's first token, an "
            "attention sink; give some with words before the subject"
        )
    positions = settings.positions or model.positions(1024, 8192)
    before, after = windows[: -settings.windows], windows[-settings.windows :]
    rarest = len(after) * (len(windows[0]) - 1) // RARE + 1
    with frozen(model.model):
        keys, inputs = layers if settings.keys else [], _with_inputs(model, layers)
        if not keys and not inputs:
            raise ModelError(
                "no block's MLP can be given neurons, so there is no cost by inputs: leave out "
                "--inputs"
            )
        passes = Passes(model, keys, inputs, positions, progress)
        text = passes.text(before)
        for moment in (*text.keys.values(), *text.inputs.values()):
            _check_sampled(moment)
        at = passes.subjects(counted, contexts, bare_weight)
        gates = {
            layer: Drives(
                gate_directions(_ridged(text.inputs[layer].value.cpu()), X, gate_settings),
                gate_settings.threshold,
                rarest,
            )
            for layer, X in at.inputs.items()
        }
        squared = passes.gradients(after, layers, gates, settings.seed)
    blocks = [
        _block(layer, squared[layer], text, at, gates.get(layer), counted) for layer in layers
    ]
    return Costs(
        settings=settings,
        threshold=gate_settings.threshold,
        depth=model.depth,
        facts=len(counted),
        at_first_token=tuple(fact.id for fact in first),
        blocks=tuple(blocks),
        wall_seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
    )


def _block(
    layer: int,
    squared: Sequence[float],
    text: Moments,
    at: Subjects,
    seen: Drives | None,
    facts: Sequence[Fact],
) -> BlockCost:
    sensitivity = Rate.of(squared)
    value = sensitivity.mean * at.squares[layer]
    keys = inputs = drives = None
    if layer in at.keys:
        keys = Rate.of((value / energies(text.keys[layer], at.keys[layer])).tolist())
    if layer in at.inputs:
        inputs = Rate.of((value / energies(text.inputs[layer], at.inputs[layer])).tolist())
    if seen is not None:
        drives = _drives(seen, at.inputs[layer], value, facts)
    return BlockCost(layer, sensitivity, keys, inputs, drives)


def energies(moment: SecondMoment, columns: Tensor) -> Tensor:
    """kᵀC⁻¹k [n] of `columns` K [width, n]; of experts, those that text was routed to enough."""
    blocks = moment.value.view(-1, moment.width, moment.width)
    parts = columns.view(len(blocks), moment.width, -1)
    found = torch.zeros(columns.shape[1], dtype=torch.float64)
    for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        if not moment.tokens or moment.tokens[i] >= moment.width:
            solved = torch.cholesky_solve(part.to(block), torch.linalg.cholesky(_ridged(block)))
            found += (part * solved.cpu()).sum(0)
    return found


def _ridged(moment: Tensor) -> Tensor:
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def _drives(seen: Drives, inputs: Tensor, value: Tensor, facts: Sequence[Fact]) -> GateDrives:
    """What text drove, and what facts' `inputs` X [d, n] do to each other's gates."""
    s = seen.directions.mT @ inputs  # [n, n], gate by subject
    names = [fact.subject.casefold() for fact in facts]
    others = torch.tensor([[a != b for b in names] for a in names])
    rivals = s.masked_fill(~others, -torch.inf).amax(1)
    rivals = rivals[others.any(1)]
    pairs = int(others.sum())
    return GateDrives(
        text=float((seen.squares / seen.tokens).sqrt().median()),
        text_rare=float(seen.largest[-1].median()),
        past_gate=Rate.of((value * seen.squares_open / seen.tokens).tolist()),
        text_open=float(seen.opened.sum()) / (seen.tokens * len(names)),
        facts_open=float(((s > seen.threshold) & others).sum()) / pairs if pairs else 0.0,
        rivals=Rate.of(rivals.tolist()) if pairs else None,
        rival=float(rivals.max()) if pairs else None,
    )


def _at_first_token(model: EditableModel, fact: Fact) -> bool:
    return model.encoder.encode_template(fact.prompt, fact.subject).subject_last == 0


def _with_inputs(model: EditableModel, layers: Sequence[int]) -> list[int]:
    """Those of `layers` whose MLP can be given neurons."""
    found = []
    for layer in layers:
        with suppress(ModelError):
            model.form(layer)
            found.append(layer)
    return found


def _check_sampled(moment: SecondMoment) -> None:
    if moment.sampled < moment.width:
        whom = " to the expert with most of them" if moment.tokens else ""
        raise StatisticsError(
            f"{moment.sampled} tokens of text{whom} for second moments of what is {moment.width} "
            "wide leave directions unsampled: give more --tokens, or --inputs where keys are wide"
        )
