"""The values of facts whose rows are kept together: one δ per group by Adam, until each is done.

As many groups as a step has room for are at work. One that is done leaves, and the next one begins,
so that a step is never spent on the slowest alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nulledit.config import ValueSettings
from nulledit.editing.kept_rows import KeptRows
from nulledit.editing.reads import Losses, Reads, rows_in_turn, unit_lengths
from nulledit.errors import ModelError
from nulledit.ledger.records import ValueOutcome

RUN = 16
"""A further run of the model in a step, which reads all weights again, is worth this part of the
token positions that a step has."""


@dataclass(frozen=True)
class Value:
    """The optimised value of one fact and how it was reached."""

    z: Tensor
    """h + δ [d], at the subject's last token after the block that was asked; where a norm follows
    W, h is W's output. Of several blocks at once [layers, d], each h with the δ below it."""
    outcome: ValueOutcome
    """How it was reached."""

    def at(self, number: int) -> Value:
        """The value of one of several blocks, by its place among them."""
        return replace(self, z=self.z[number])

    def moved(self, rest: Value, now: Tensor) -> Value:
        """This value and what `rest`, optimised where the model is at `now` [d], adds.

        `now` is in float64, on the CPU, as not every device has it.
        """
        own, more = self.outcome, rest.outcome
        return Value(
            self.z + (rest.z.to(now.device).double() - now).to(self.z),
            replace(
                more,
                steps=(own.steps or 0) + (more.steps or 0),
                delta_share=(own.delta_share or 0.0) + (more.delta_share or 0.0),
                known=own.known,
            ),
        )


class _Outcome(NamedTuple):
    """What was last seen of one fact."""

    loss: float
    nll: float
    lead: float


@dataclass(frozen=True)
class _Best:
    """The best that a group has come to: Adam swings, and its last step may be a bad one."""

    score: tuple[bool, float]
    """Whether every row says what it should, then minus the loss."""
    delta: Tensor
    outcomes: dict[int, _Outcome]
    """By fact."""
    clamped: bool


@dataclass
class _Group:
    """The facts that share a δ, and how far it has come."""

    facts: list[int]
    delta: Tensor
    """[layers, d], in units of `unit_lengths`."""
    norm: Tensor
    """‖h‖ of its first fact."""
    cycle: int = 1
    """Steps until each of its rows had its turn."""
    losses: list[float] = field(default_factory=list)
    """Of its worst fact, step by step."""
    likeliest: int = 0
    """Steps, not always in a row, at which each of its facts led in all its contexts."""
    updates: int = 0
    clamped: bool = False
    ended: str = "steps"
    """As `Value.ended` says it; steps: not yet."""
    best: _Best | None = None
    """Of the steps that read all of its rows."""
    steps: int = 0
    """Forward passes that it has been in."""
    to_check: bool = False
    """Whether it would end by the rows that were read: the next step reads all, at the same δ."""


class Descent:
    """Adam on the δ of each group; a group that is done leaves, and another one begins."""

    def __init__(self, kept: KeptRows, settings: ValueSettings, positions: int):
        """Nothing has moved yet.

        `positions` bounds the tokens that run together, padding apart, but where facts are read in
        all contexts.
        """
        self.kept, self.settings, self.positions = kept, settings, positions
        self.units = unit_lengths(kept)[..., None]  # [groups, layers, 1]
        self.per_step = (settings.contexts_per_step, settings.relations_per_step)
        self.groups = [self._group(number, norm) for number, norm in enumerate(kept.norms)]
        self.optimiser = torch.optim.Adam(
            [{"params": [group.delta], "lr": self._rate(group)} for group in self.groups]
        )
        self.tokens = [kept.tokens(g, self.per_step) for g in range(len(self.groups))]  # of a step
        self.outcomes: dict[int, _Outcome] = {}  # by fact
        self.known: dict[int, bool] = {}  # by fact

    def _group(self, number: int, norm: Tensor) -> _Group:
        kept = self.kept
        facts = [f for f, g in enumerate(kept.group_of) if g == number]
        nothing = torch.zeros(len(kept.layers), kept.start.shape[1]).to(kept.start)
        cycle = max(kept.jobs[f].cycle(self.per_step) for f in facts)
        return _Group(facts, nothing.requires_grad_(), norm, cycle)

    def run(self) -> Iterator[dict[int, Value]]:
        """Descend until each group is done; the values of its facts, by number, as it leaves."""
        waiting, before = list(range(len(self.groups))), dict[int, Tensor]()
        active: list[int] = []
        reads: Reads | None = None
        while waiting or active:
            while waiting and self._fits([*active, waiting[0]]):
                active.append(waiting.pop(0))
            whole = {g for g in active if self._reads_all(self.groups[g])}
            turns = {g: self.groups[g].steps for g in active if g not in whole}
            rows = rows_in_turn(self.kept, active, turns, self.per_step)
            if reads is None or rows != reads.rows:
                reads = Reads(self.kept, active, rows, worth=self.positions // RUN)
            found = reads.losses(self._scaled(), before)
            each = held_loss(found, self.settings)
            decay = {g: self._decay(self.groups[g]) for g in active}
            self._note(reads.facts, found, each, decay)
            self._judge(reads.facts, found, active, whole)
            there, active = active, [g for g in active if self._goes_on(self.groups[g])]
            if moving := [g for g in active if not self.groups[g].to_check]:
                self._update(reads.facts, each, decay, moving)
            left = {g for g in there if g not in active}
            for row in [r for r in before if self.kept.group_of[self.kept.owner[r]] in left]:
                del before[row]
            for group in (self.groups[g] for g in there if g in left):
                self._return_to_best(group)
                yield self._values(group)

    def _scaled(self) -> list[Tensor]:
        """The δ of each group as it is added [layers, d]."""
        return [group.delta * unit for group, unit in zip(self.groups, self.units, strict=True)]

    def _fits(self, active: Sequence[int]) -> bool:
        """Whether a step has room for the groups `active`; for one it always has."""
        return len(active) == 1 or sum(self.tokens[g] for g in active) <= self.positions

    def _reads_all(self, group: _Group) -> bool:
        """Whether the next step reads all rows of `group`."""
        last = group.steps == self.settings.steps - 1
        return last or group.to_check or not any(self.per_step)

    def _goes_on(self, group: _Group) -> bool:
        """Count a step of `group`; whether another one follows."""
        group.steps += 1
        return group.ended == "steps" and group.steps < self.settings.steps

    def _rate(self, group: _Group) -> float:
        """Adam's step size, by coordinate."""
        rate = self.settings.learning_rate
        if self.settings.learning_rate_of == "unit":
            return rate
        return rate * float(group.norm) / math.sqrt(group.delta.shape[-1])

    def _decay(self, group: _Group) -> Tensor:
        lengths = group.delta.norm(dim=-1).sum()
        return self.settings.weight_decay * lengths / group.norm.square()

    def _note(
        self,
        facts: Sequence[int],
        found: Losses,
        each: Tensor,
        decay: Mapping[int, Tensor],
    ) -> None:
        """Keep the outcomes of `facts`, whose losses without decay are `each`.

        ModelError where one is not finite.
        """
        total = each + torch.stack([decay[self.kept.group_of[f]] for f in facts])
        if not torch.isfinite(total).all():
            broken = facts[int((~torch.isfinite(total)).nonzero()[0])]
            raise ModelError(
                f"fact {self.kept.jobs[broken].fact_id}: the loss is not finite at step "
                f"{self.groups[self.kept.group_of[broken]].steps}; "
                "load the model in float32 or bfloat16, or use a smaller learning rate"
            )
        seen = zip(total.tolist(), found.nll.tolist(), found.lead.tolist(), strict=True)
        self.outcomes |= {f: _Outcome(*told) for f, told in zip(facts, seen, strict=True)}
        for fact, lead in zip(facts, found.bare_lead.tolist(), strict=True):
            self.known.setdefault(fact, lead > 0)  # of its first step

    def _judge(
        self,
        facts: Sequence[int],
        found: Losses,
        active: Sequence[int],
        whole: Collection[int],
    ) -> None:
        """Whether each of the `active` groups ends here, and whether this is its best step.

        Those that are not `whole` had some of their rows read, and are to be checked first.
        """
        in_context = dict(zip(facts, found.context_lead.tolist(), strict=True))
        for number in active:
            group = self.groups[number]
            outcomes = {f: self.outcomes[f] for f in group.facts}
            worst = max(outcome.loss for outcome in outcomes.values())
            says = all(self._says(f, outcome.lead) for f, outcome in outcomes.items())
            group.losses.append(worst)
            leads = all(in_context[f] > 0 for f in group.facts)
            group.likeliest += leads
            if number in whole and not leads:  # what steps with some contexts counted is not enough
                group.likeliest = min(group.likeliest, self.settings.stop_when_likeliest - 1)
            ended = self._end(group, says=says)
            group.to_check = bool(ended) and number not in whole
            if number not in whole:
                continue
            group.ended = ended or "steps"
            if group.best is None or (says, -worst) > group.best.score:
                delta = group.delta.detach().clone()
                group.best = _Best((says, -worst), delta, outcomes, group.clamped)

    def _end(self, group: _Group, *, says: bool) -> str:
        """Why `group` ends here, as `Value.ended` says it; empty: it goes on.

        A flat distribution is near another one also where the answer to forget is its peak, so a
        fact to forget is not done before some other token is likelier in every row.
        """
        s, losses = self.settings, group.losses
        if 0 < s.stop_when_likeliest <= group.likeliest:
            return "likeliest"
        if losses[-1] < s.stop_loss and says:
            return "done"
        patience = -(-s.patience // group.cycle) * group.cycle  # the same rows before and since
        flat = (
            patience > 0
            and len(losses) > patience
            and min(losses[-patience:]) > 0.99 * min(losses[:-patience])
        )
        return "patience" if flat else ""

    def _says(self, fact: int, lead: float) -> bool:
        if self.kept.jobs[fact].lessons:
            return lead > 0
        return self.settings.stop_margin is None or lead > self.settings.stop_margin

    def _update(
        self,
        facts: Sequence[int],
        each: Tensor,
        decay: Mapping[int, Tensor],
        staying: Sequence[int],
    ) -> None:
        """One step of Adam for the groups `staying`, whose facts' losses are summed."""
        nothing = each.new_zeros(())
        mine = (x for x, f in zip(each, facts, strict=True) if self.kept.group_of[f] in staying)
        loss = sum(mine, start=nothing) + sum((decay[g] for g in staying), start=nothing)
        groups = [self.groups[g] for g in staying]
        for group in self.groups:
            group.delta.grad = None
        gradients = torch.autograd.grad(loss, [group.delta for group in groups])
        for group, gradient in zip(groups, gradients, strict=True):
            group.delta.grad = gradient
        self.optimiser.step()  # those without a gradient stay as they are
        for group in groups:
            group.updates += 1
            group.clamped = _clamp(group.delta, self.settings.clamp * float(group.norm))

    def _return_to_best(self, group: _Group) -> None:
        """Where steps ran out or gained too little, the best step counts rather than the last."""
        counts = self.settings.stop_margin is not None and group.ended in ("steps", "patience")
        if counts and group.best is not None:
            group.delta, group.clamped = group.best.delta, group.best.clamped
            self.outcomes |= group.best.outcomes

    def _values(self, group: _Group) -> dict[int, Value]:
        """Of the facts of `group`, which is done."""
        number = self.kept.group_of[group.facts[0]]
        z = self._written(number)
        share = float(group.delta.detach().norm(dim=-1).max() / group.norm)
        found = {}
        for fact in group.facts:
            outcome = self.outcomes[fact]
            reached = ValueOutcome(
                loss=outcome.loss,
                nll=outcome.nll,
                steps=group.updates,
                delta_share=share,
                known=self.known[fact],
                ended=group.ended,
                lead=None if self.kept.jobs[fact].lessons else outcome.lead,
                clamped=group.clamped,
                shared=len(group.facts),
            )
            found[fact] = Value(z[fact], reached)
        return found

    @torch.no_grad()
    def _written(self, number: int) -> dict[int, Tensor]:
        """z of the facts of a group; of several blocks what stands there with the δ below."""
        kept, group = self.kept, self.groups[number]
        bare = [kept.bare[f] for f in group.facts]
        if len(kept.layers) == 1:
            h, delta = kept.start[bare], (group.delta * self.units[number])[0]
            return dict(zip(group.facts, h + delta, strict=True))
        reads = Reads(kept, [number])
        at = [reads.rows.index(row) for row in bare]
        return dict(zip(group.facts, reads.values(self._scaled())[at], strict=True))


@torch.no_grad()
def _clamp(delta: Tensor, limit: float) -> bool:
    """Shorten each row of `delta` to `limit`; whether one was longer."""
    norms = delta.norm(dim=-1, keepdim=True)
    longest = float(norms.max())
    if longest > limit:
        delta.mul_((limit / norms).clamp(max=1))
    return longest > limit


def held_loss(found: Losses, settings: ValueSettings) -> Tensor:
    """Loss without decay [facts]: of the target, and of what is to stay as it was."""
    held = settings.kl_weight * found.drift + settings.relation_weight * found.relations
    return found.nll + held


@torch.no_grad()
def measured(kept: KeptRows, settings: ValueSettings, values: Sequence[Value]) -> dict[int, Value]:
    """`values` of the rows' facts, by number, with the outcomes of their z; no δ is shared."""
    h = kept.start[kept.bare]  # [facts, d]
    moved = torch.stack([value.z for value in values]).to(h) - h
    deltas = list(moved[:, None])  # [layers, d] each
    reads = Reads(kept, range(len(values)))
    before: dict[int, Tensor] = {}
    reads.losses([torch.zeros_like(delta) for delta in deltas], before)
    found = reads.losses(deltas, before)
    lengths = moved.norm(dim=1) / unit_lengths(kept)[:, 0]
    decay = settings.weight_decay * lengths / kept.norms.square()
    loss = held_loss(found, settings) + decay.to(found.nll)
    shares = moved.norm(dim=1) / h.norm(dim=1)
    return {
        f: Value(
            value.z,
            replace(
                value.outcome,
                loss=float(loss[f]),
                nll=float(found.nll[f]),
                delta_share=float(shares[f]),
                lead=None if value.outcome.lead is None else float(found.lead[f]),
            ),
        )
        for f, value in enumerate(values)
    }
