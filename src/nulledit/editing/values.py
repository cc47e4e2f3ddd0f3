"""The value z of a fact: the hidden state that makes the model say its target.

z = h + δ at the subject's last token behind the last edited block, δ by gradient descent (ROME,
arXiv:2202.05262, Eq. 4; MEMIT, arXiv:2210.07229, Section 4.3). The published code runs the whole
model, one fact at a time, and computes logits everywhere. Here, with the same result:

- states up to the block are constant, so they are computed once and kept; what the rows of a prefix
  context have in common, the context as a rule, is run once for all of them;
- positions before the subject's last token never see δ, so of the blocks above only their
  attention keys and values are kept; where a model can't be run behind these (recurrent blocks),
  whole rows are run;
- logits are computed only where the loss reads them; no weight has a gradient;
- the facts of a chunk run together, and one that is done leaves.

Where a norm stands between W and the stream, no hidden state can be written through it: there the
value is of W's output, and the norm and the blocks above run behind it. W's output may have any
size, the norm takes it away; so δ is counted in units in which it is as long as the hidden state,
and step size, clamp and decay mean what they mean elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nulledit.config import ValueSettings
from nulledit.data.facts import Fact
from nulledit.editing.ignorance import Lesson, lessons_of, unlearned
from nulledit.errors import ModelError
from nulledit.models.layouts import differentiating, frozen
from nulledit.models.partial import PartialModel, Prefix
from nulledit.models.tokens import (
    Batch,
    Row,
    RowEncoder,
    chunks_by_length,
    collate,
    share_beginnings,
)


@dataclass(frozen=True)
class Value:
    """The optimised value of one fact and how it was reached."""

    z: Tensor
    """h + δ [d], at the subject's last token behind the last edited block; where a norm stands
    between W and the stream, h is W's output."""
    loss: float
    """Last loss seen: NLL + KL + decay."""
    nll: float
    """Mean negative log-likelihood of the target per token over the rewriting rows, nats; of a fact
    to forget, the distance from what it should say (`ignorance.unlearned`)."""
    steps: int
    """Updates of δ made."""
    delta_share: float
    """‖δ‖/‖h‖; of several rounds, their sum."""
    known: bool
    """Whether the model already said the target by strict argmax before any step."""
    ended: str = ""
    """Why the descent ended: `done`, `likeliest` (ENCORE's early stop), `patience`, or `steps`,
    which were used up. Empty in ledgers that are older than this field."""
    lead: float | None = None
    """Nats by which the target's weakest token leads its strongest rival, over all rows; below 0:
    somewhere a rival stands in its place. None for a fact to forget."""
    clamped: bool = False
    """Whether δ is as long as the clamp lets it be."""
    shared: int = 1
    """Facts on the same key that this δ must say together."""

    @classmethod
    def recorded(cls, z: Tensor, outcome: Mapping[str, Any]) -> Value:
        """The value `z` of a ledger, with the `outcome` that stands beside it."""
        known = {f.name for f in fields(cls)}
        return cls(z=z, **{name: held for name, held in outcome.items() if name in known})

    def moved(self, rest: Value, now: Tensor) -> Value:
        """This value and what `rest`, optimised where the model stands at `now` [d], adds."""
        return replace(
            rest,
            z=self.z + (rest.z.double() - now).to(self.z),
            steps=self.steps + rest.steps,
            delta_share=self.delta_share + rest.delta_share,
            known=self.known,
        )


@dataclass(frozen=True)
class _Job:
    """What one fact needs: rewriting rows, and where the drift of its subject's meaning is read."""

    fact_id: str
    rows: tuple[Row, ...]  # rewriting rows; the first is the bare prompt
    lessons: tuple[Lesson, ...]  # of the rows, where a fact is to be forgotten; else none
    labels: tuple[int, ...]  # the rows' contexts, by number
    drift_row: Row | None  # None: read at the bare row, whose tokens up to the subject are the same
    group: int


Work = Callable[["_Chunk", Sequence[int]], list[Value]]
"""The values of a chunk's facts, whose places in the whole are given."""


def plan_rows(fact: Fact, encoder: RowEncoder, contexts: Sequence[str]) -> tuple[Row, ...]:
    """Rewriting rows of a fact: each training prompt in each prefix context, with the target."""
    return tuple(
        encoder.encode_template(prompt, fact.subject, context=context, target=fact.target)
        for prompt in fact.prompts
        for context in contexts
    )


def optimise_values(
    model: PartialModel,
    encoder: RowEncoder,
    facts: Sequence[Fact],
    groups: Sequence[int],
    *,
    layer: int,
    contexts: Sequence[str],
    settings: ValueSettings,
    positions: int,
    pad_id: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Value]:
    """Optimise one δ per group for `facts` at block `layer`.

    `groups[i]` is the group of fact i: facts on one key share δ and sum their losses. `contexts`
    are templates with one slot, the bare "{}" first. `positions` bounds how many token positions
    run through the upper blocks together; on an accelerator it halves itself when memory runs out.
    """
    return _by_chunks(
        model,
        _jobs(model, encoder, facts, groups, contexts, settings),
        lambda chunk, _members: chunk.optimise(),
        layer=layer,
        settings=settings,
        positions=positions,
        pad_id=pad_id,
        progress=progress,
    )


def measure_values(
    model: PartialModel,
    encoder: RowEncoder,
    facts: Sequence[Fact],
    values: Sequence[Value],
    *,
    layer: int,
    contexts: Sequence[str],
    settings: ValueSettings,
    positions: int,
    pad_id: int,
) -> list[Value]:
    """`values` of `facts` whose z was changed, with the outcomes that describe it as it is now.

    The other arguments are as for `optimise_values`.
    """
    return _by_chunks(
        model,
        _jobs(model, encoder, facts, range(len(facts)), contexts, settings),
        lambda chunk, members: chunk.measure([values[i] for i in members]),
        layer=layer,
        settings=settings,
        positions=positions,
        pad_id=pad_id,
    )


def _jobs(
    model: PartialModel,
    encoder: RowEncoder,
    facts: Sequence[Fact],
    groups: Sequence[int],
    contexts: Sequence[str],
    settings: ValueSettings,
) -> list[_Job]:
    jobs = []
    for fact, group in zip(facts, groups, strict=True):
        lessons = lessons_of(model, encoder, fact, contexts) if fact.forget else ()
        rows = tuple(x.row for x in lessons) or plan_rows(fact, encoder, contexts)
        drift = encoder.encode_template(settings.kl_prompt, fact.subject).upto_subject()
        shared = rows[0].upto_subject().ids == drift.ids
        labels = tuple(i % len(contexts) for i in range(len(rows)))
        jobs.append(_Job(fact.id, rows, lessons, labels, None if shared else drift, group))
    return jobs


def _by_chunks(
    model: PartialModel,
    jobs: Sequence[_Job],
    work: Work,
    *,
    layer: int,
    settings: ValueSettings,
    positions: int,
    pad_id: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Value]:
    """What `work` gives for each chunk of `jobs` and their places, in the order of `jobs`."""
    values: dict[int, Value] = {}
    waiting = list(range(len(jobs)))
    while waiting:
        members = _next_chunk(jobs, waiting, positions, whole=not model.columns)
        found = _run_chunk(model, jobs, members, work, layer, settings, pad_id)
        if found is None:
            if len({jobs[i].group for i in members}) == 1:
                raise ModelError(f"fact {jobs[members[0]].fact_id}: not enough memory for its rows")
            positions = max(1, positions // 2)
            continue
        values.update(zip(members, found, strict=True))
        waiting = [i for i in waiting if i not in values]
        progress(len(members))
    return [values[i] for i in range(len(jobs))]


def _run_chunk(
    model: PartialModel,
    jobs: Sequence[_Job],
    members: Sequence[int],
    work: Work,
    layer: int,
    settings: ValueSettings,
    pad_id: int,
) -> list[Value] | None:
    """What `work` gives; None if memory ran out, with all that the chunk held let go."""
    try:
        with differentiating():
            return work(_Chunk(model, [jobs[i] for i in members], layer, settings, pad_id), members)
    except torch.OutOfMemoryError:
        return None


def _next_chunk(
    jobs: Sequence[_Job], waiting: Sequence[int], positions: int, *, whole: bool
) -> list[int]:
    """The shortest of `waiting`, groups kept whole, that fit `positions` token positions.

    `whole`: rows run from their start, not from the subject's last token.
    """
    groups: dict[int, list[int]] = {}
    for i in waiting:
        groups.setdefault(jobs[i].group, []).append(i)

    def length(members: Sequence[int]) -> int:
        rows = (row for i in members for row in jobs[i].rows)
        return max(len(row.ids) - 1 - (0 if whole else row.subject_last) for row in rows)

    chunk: list[int] = []
    for group in sorted(groups.values(), key=length):
        together = chunk + group
        longest = length(together)
        rows = sum(len(jobs[i].rows) + 1 for i in together)
        if chunk and rows * longest > positions:
            break
        chunk = together
    return chunk


class _Chunk:
    """The facts that run together: kept states and prefixes, one δ per group, Adam."""

    def __init__(
        self,
        model: PartialModel,
        jobs: Sequence[_Job],
        layer: int,
        settings: ValueSettings,
        pad_id: int,
    ):
        self.model, self.jobs, self.layer, self.settings = model, jobs, layer, settings
        names = list(dict.fromkeys(job.group for job in jobs))
        self.group_of = [names.index(job.group) for job in jobs]  # fact -> group
        rows: list[Row] = []
        self.labels: list[int] = []  # row -> its context
        owner: list[int] = []  # row -> fact
        bare: list[int] = []  # fact -> row
        drift: list[int] = []  # fact -> row
        for i, job in enumerate(jobs):
            bare.append(len(rows))
            rows += job.rows
            self.labels += job.labels
            if job.drift_row is not None:
                rows.append(job.drift_row)
                self.labels.append(-1)
            drift.append(bare[i] if job.drift_row is None else len(rows) - 1)
            owner += [i] * (len(rows) - len(owner))
        self.rows, self.owner, self.bare, self.drift = rows, owner, bare, drift
        self.device = model.device
        self.taught = {  # row -> what to say in its target's places [target tokens, vocabulary]
            bare[i] + k: lesson.teacher(model)
            for i, job in enumerate(jobs)
            for k, lesson in enumerate(job.lessons)
        }
        self._keep_states(pad_id)
        first = [bare[self.group_of.index(g)] for g in range(len(names))]
        at = [rows[r].subject_last - self.begins[r] for r in first]
        self.norms = self.states[first, at].norm(dim=1).to(self.start)  # ‖h‖ [groups]
        self.units = torch.ones_like(self.norms)
        if model.values_at_output:
            self.units = self.start[first].norm(dim=1) / self.norms

    @torch.no_grad()
    def _keep_states(self, pad_id: int) -> None:
        """Run the blocks up to `layer` once; split each row at its subject's last token.

        Or at its start, where that is more than the model can keep in front of rows.
        """
        inputs = [row.ids[: len(row.ids) - (len(row.target_ids) > 0)] for row in self.rows]
        ends = [row.subject_last for row in self.rows]
        behind = max(len(ids) - end for ids, end in zip(inputs, ends, strict=True))
        fits = max(ends) + behind <= self.model.columns
        self.begins = ends if fits else [0] * len(ends)  # row -> its first token that is run again
        shared = share_beginnings(
            inputs,
            self.labels,
            self.begins,
            columns=self.model.columns,
            pad_id=pad_id,
            device=self.device,
        )
        stems = self.model.record_prefix(shared.stems).select(shared.stem)
        states, standing = self.model.run_to_values(
            stems.before(shared.rests), layer=self.layer, prefix=stems
        )  # [rows, length, d]
        cuts = [begin - cut for begin, cut in zip(self.begins, shared.cuts, strict=True)]
        rests = [ids[cut:] for ids, cut in zip(inputs, shared.cuts, strict=True)]
        head = collate(
            [ids[:cut] for ids, cut in zip(rests, cuts, strict=True)],
            pad_id=pad_id,
            device=self.device,
        )
        tail = collate(
            [ids[cut:] for ids, cut in zip(rests, cuts, strict=True)],
            pad_id=pad_id,
            device=self.device,
        )
        width = head.ids.shape[1]
        head = replace(head, positions=shared.rests.positions[:, :width])
        start = torch.tensor(cuts, device=self.device)[:, None]
        first = torch.tensor(self.begins, device=self.device)[:, None]
        self.tail = Batch(tail.ids, tail.mask, tail.positions + first)
        where = (start + torch.arange(tail.ids.shape[1], device=self.device)).clamp_max(
            states.shape[1] - 1
        )
        d = states.shape[-1]
        self.states = states.gather(1, where.to(states.device)[..., None].expand(-1, -1, d))
        heads = self.model.record_prefix(
            head, states[:, :width], first=self.layer + 1, prefix=stems
        )
        self.prefix = stems.then(heads)
        last = [end - cut for end, cut in zip(ends, shared.cuts, strict=True)]
        start = standing[torch.arange(len(last)), last]
        self.start = start.float() if start.dtype.itemsize < 4 else start

    def optimise(self) -> list[Value]:
        """Descend until each group is done; the values of the chunk's facts in order."""
        s = self.settings
        n_groups = max(self.group_of) + 1
        h = self.start[self.bare]  # [facts, d]
        norms = self.norms
        deltas = [torch.zeros_like(h[0], requires_grad=True) for _ in range(n_groups)]
        optimiser = torch.optim.Adam(deltas, lr=s.learning_rate)
        active = list(range(n_groups))
        reads = _Reads(self, active)
        drift_start: dict[int, Tensor] = {}
        history: list[list[float]] = [[] for _ in range(n_groups)]
        outcome: dict[int, tuple[float, float, float]] = {}  # fact -> loss, nll, lead
        known: dict[int, bool] = {}
        updates = [0] * n_groups
        ended = ["steps"] * n_groups
        likeliest = [0] * n_groups  # steps at which the target was so in every context
        clamped = [False] * n_groups
        best: dict[int, _Best] = {}
        for step in range(s.steps):
            nll, drift, *found = reads.losses(deltas, drift_start)
            leads, bare, in_context = (
                dict(zip(reads.facts, lead.tolist(), strict=True)) for lead in found
            )
            if step == 0:
                known = {f: lead > 0 for f, lead in bare.items()}
            decay = {g: s.weight_decay * deltas[g].norm() / norms[g].square() for g in active}
            per_fact = nll + s.kl_weight * drift
            groups_of_facts = [self.group_of[f] for f in reads.facts]
            with_decay = per_fact + torch.stack([decay[g] for g in groups_of_facts])
            if not torch.isfinite(with_decay).all():
                broken = reads.facts[int((~torch.isfinite(with_decay)).nonzero()[0])]
                raise ModelError(
                    f"fact {self.jobs[broken].fact_id}: the loss is not finite at step {step}; "
                    "load the model in float32 or bfloat16, or use a smaller learning rate"
                )
            for f, total, own in zip(reads.facts, with_decay.tolist(), nll.tolist(), strict=True):
                outcome[f] = (total, own, leads[f])
            worst: dict[int, float] = {}
            for f, g in zip(reads.facts, groups_of_facts, strict=True):
                worst[g] = max(worst.get(g, outcome[f][0]), outcome[f][0])
            for g in active:
                history[g].append(worst[g])
            for g in active:
                said = {f: leads[f] for f in reads.facts if self.group_of[f] == g}
                likeliest[g] += all(in_context[f] > 0 for f in said)
                ended[g] = self._end(history[g], said, likeliest[g]) or "steps"
                says = all(self._says(f, lead) for f, lead in said.items())
                if g not in best or (says, -worst[g]) > best[g].score:
                    so_far = {f: outcome[f] for f in said}
                    delta = deltas[g].detach().clone()
                    best[g] = _Best((says, -worst[g]), delta, so_far, clamped[g])
            staying = [g for g in active if ended[g] == "steps"]
            if not staying or step == s.steps - 1:
                break
            loss = sum(
                (p for p, g in zip(per_fact, groups_of_facts, strict=True) if g in staying),
                start=per_fact.new_zeros(()),
            ) + sum((decay[g] for g in staying), start=per_fact.new_zeros(()))
            wanted = [deltas[g] for g in staying]
            for delta in deltas:
                delta.grad = None
            for delta, gradient in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
                delta.grad = gradient
            optimiser.step()  # those without a gradient stay as they are
            for g in staying:
                updates[g] += 1
                clamped[g] = _clamp(deltas[g], s.clamp * float(norms[g]))
            if staying != active:
                active = staying
                reads = _Reads(self, active)
        if s.stop_margin is not None:
            for g, step_of in best.items():
                if ended[g] in ("steps", "patience"):
                    deltas[g], clamped[g] = step_of.delta, step_of.clamped
                    outcome |= step_of.outcome
        return [
            Value(
                z=h[f] + self.units[g] * deltas[g].detach(),
                loss=outcome[f][0],
                nll=outcome[f][1],
                steps=updates[g],
                delta_share=float(self.units[g] * deltas[g].detach().norm() / h[f].norm()),
                known=known[f],
                ended=ended[g],
                lead=None if self.jobs[f].lessons else outcome[f][2],
                clamped=clamped[g],
                shared=self.group_of.count(g),
            )
            for f, g in enumerate(self.group_of)
        ]

    @torch.no_grad()
    def measure(self, values: Sequence[Value]) -> list[Value]:
        """The chunk's `values`, each with a δ of its own, with the outcomes of their z."""
        s = self.settings
        h = self.start[self.bare]  # [facts, d]
        moved = torch.stack([value.z for value in values]).to(h) - h
        deltas = list(moved / self.units[:, None])
        reads = _Reads(self, range(len(values)))
        drift_start: dict[int, Tensor] = {}
        reads.losses([torch.zeros_like(delta) for delta in deltas], drift_start)
        nll, drift, lead, *_ = reads.losses(deltas, drift_start)
        decay = s.weight_decay * torch.stack(deltas).norm(dim=1) / self.norms.square()
        loss = nll + s.kl_weight * drift + decay.to(nll)
        shares = moved.norm(dim=1) / h.norm(dim=1)
        return [
            replace(
                value,
                loss=float(loss[f]),
                nll=float(nll[f]),
                delta_share=float(shares[f]),
                lead=None if value.lead is None else float(lead[f]),
            )
            for f, value in enumerate(values)
        ]

    def _end(self, losses: list[float], leads: dict[int, float], likeliest: int) -> str:
        """Why a group ends here, as `Value.ended` says it; empty: it goes on.

        `leads`: of each fact of the group, as in `Value.lead`. A flat distribution is near another
        one also where the answer to forget is its peak, so a fact to forget is not done before some
        other token is likelier in every row. `likeliest`: steps so far, not always in a row, at
        which each fact led in all its contexts.
        """
        s = self.settings
        if 0 < s.stop_when_likeliest <= likeliest:
            return "likeliest"
        if losses[-1] < s.stop_loss and all(self._says(f, lead) for f, lead in leads.items()):
            return "done"
        flat = (
            s.patience > 0
            and len(losses) > s.patience
            and min(losses[-s.patience :]) > 0.99 * min(losses[: -s.patience])
        )
        return "patience" if flat else ""

    def _says(self, fact: int, lead: float) -> bool:
        if self.jobs[fact].lessons:
            return lead > 0
        return self.settings.stop_margin is None or lead > self.settings.stop_margin


@dataclass(frozen=True)
class _Best:
    """The best that a group has come to: Adam swings, and its last step may be a bad one."""

    score: tuple[bool, float]
    """Whether every row says what it should, then minus the loss."""
    delta: Tensor
    outcome: dict[int, tuple[float, float, float]]
    """By fact: loss, nll, lead."""
    clamped: bool


@torch.no_grad()
def bare_leads(
    model: PartialModel,
    encoder: RowEncoder,
    facts: Sequence[Fact],
    *,
    positions: int,
    pad_id: int,
) -> list[float]:
    """For each of `facts`, the least lead of a target token at its bare prompts, in nats.

    As the model is; infinite for a fact to forget. `positions` bounds the tokens that run together.
    """
    rows = [
        (i, row)
        for i, fact in enumerate(facts)
        if not fact.forget
        for row in plan_rows(fact, encoder, ("{}",))
    ]
    leads = [math.inf] * len(facts)
    with frozen(model.model):
        for part in chunks_by_length([len(row.ids) for _, row in rows], positions):
            chosen = [rows[k] for k in part]
            ids = [row.ids[:-1] for _, row in chosen]
            normed = model.run_normed(collate(ids, pad_id=pad_id, device=model.device))
            for at, (i, row) in enumerate(chosen):
                logits = model.logits(normed[at, row.target_start - 1 : len(row.ids) - 1])
                target = torch.tensor(row.target_ids, device=logits.device)
                leads[i] = min(leads[i], float(leads_of(logits.float(), target).min()))
    return leads


@torch.no_grad()
def _clamp(delta: Tensor, limit: float) -> bool:
    """Shorten `delta` to `limit`; whether it was longer."""
    norm = float(delta.norm())
    if norm > limit:
        delta.mul_(limit / norm)
    return norm > limit


class _Losses(NamedTuple):
    """What one pass of the rows gives, per fact.

    A lead is the least one of a target token over its strongest rival, in nats; of a fact to forget
    it is 1 where another token is likelier, else -1.
    """

    nll: Tensor  # of the target, or what `unlearned` says
    drift: Tensor  # KL
    lead: Tensor  # over all rows
    bare_lead: Tensor  # at the bare prompt
    context_lead: Tensor  # in the prefix contexts; at all rows where there is none


class _Reads:
    """The rows of the groups still at work, and where the loss reads logits in them."""

    def __init__(self, chunk: _Chunk, active: Sequence[int]):
        self.chunk = chunk
        device = chunk.device
        self.facts = [f for f, g in enumerate(chunk.group_of) if g in active]
        rows = [r for r, f in enumerate(chunk.owner) if chunk.group_of[f] in active]
        place = {row: i for i, row in enumerate(rows)}
        index = torch.tensor(rows, device=device)
        longest = max(
            len(chunk.rows[r].ids) - chunk.begins[r] - (len(chunk.rows[r].target_ids) > 0)
            for r in rows
        )
        everything = len(rows) == len(chunk.rows)
        self.prefix: Prefix = chunk.prefix if everything else chunk.prefix.select(index)
        self.states = chunk.states[index.to(chunk.states.device), :longest]
        self.start = chunk.start[index.to(chunk.start.device)]
        subjects = torch.tensor([chunk.rows[r].subject_last - chunk.begins[r] for r in rows])
        self.subjects = subjects.to(self.states.device)[:, None, None].expand(
            -1, -1, self.states.shape[-1]
        )  # place of each row's subject [rows, 1, d]
        tail = chunk.tail
        self.batch = Batch(
            tail.ids[index, :longest],
            torch.cat([self.prefix.mask, tail.mask[index, :longest]], dim=1),
            tail.positions[index, :longest],
        )
        self.delta_of_row = torch.tensor([chunk.group_of[chunk.owner[r]] for r in rows])
        at_row: list[int] = []
        at_position: list[int] = []
        target: list[int] = []
        fact: list[int] = []
        weight: list[float] = []
        taught: list[int] = []  # places in `target` that are taught otherwise
        banned: list[int] = []
        for i, f in enumerate(self.facts):
            for k, row in enumerate(chunk.jobs[f].rows):
                r = chunk.bare[f] + k
                if chunk.jobs[f].lessons:
                    taught += range(len(target), len(target) + len(row.target_ids))
                    banned += chunk.jobs[f].lessons[k].banned
                for t, token in enumerate(row.target_ids):
                    at_row.append(place[r])
                    at_position.append(row.target_start + t - 1 - chunk.begins[r])
                    target.append(token)
                    fact.append(i)
                    weight.append(1 / (len(row.target_ids) * len(chunk.jobs[f].rows)))
        self.n_nll = len(target)
        self.taught = torch.tensor(taught, dtype=torch.long, device=device)
        self.banned = torch.tensor(banned, dtype=torch.long, device=device)
        self.teacher = [told for r, told in chunk.taught.items() if r in place]
        bare = {chunk.bare[f] for f in self.facts}
        self.is_bare = torch.tensor([rows[r] in bare for r in at_row], device=device)
        contexts = [chunk.labels[rows[r]] > 0 for r in at_row]
        with_contexts = {i for i, there in zip(fact, contexts, strict=True) if there}
        self.in_context = torch.tensor(
            [there or i not in with_contexts for i, there in zip(fact, contexts, strict=True)],
            device=device,
        )
        for f in self.facts:
            r = chunk.drift[f]
            at_row.append(place[r])
            at_position.append(chunk.rows[r].subject_last - chunk.begins[r])
        self.at = (
            torch.tensor(at_row, device=device),
            torch.tensor(at_position, device=device),
        )
        self.target = torch.tensor(target, device=device)
        self.fact = torch.tensor(fact, device=device)
        self.weight = torch.tensor(weight, device=device)

    def losses(self, deltas: Sequence[Tensor], drift_start: dict[int, Tensor]) -> _Losses:
        """What `deltas`, one per group, give; `drift_start` is filled in at the first call."""
        model = self.chunk.model
        scaled = torch.stack(list(deltas)) * self.chunk.units[:, None]
        stacked = scaled[self.delta_of_row.to(scaled.device)]  # [rows, d]
        moved = model.with_value(
            self.chunk.layer,
            self.states.gather(1, self.subjects),
            self.start[:, None],
            stacked[:, None],
        )
        states = self.states.scatter(1, self.subjects, moved)
        normed = model.run_normed(
            self.batch, states=states, first=self.chunk.layer + 1, prefix=self.prefix
        )
        row, position = (index.to(normed.device) for index in self.at)
        logits = model.logits(normed[row, position])
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        device = logits.device
        says, drifts = logits[: self.n_nll], logits[self.n_nll :]
        each = F.cross_entropy(says, self.target.to(device), reduction="none")
        lead = leads_of(says.detach(), self.target.to(device))
        if self.teacher:
            each, lead = self._as_taught(says, each, lead)
        fact = self.fact.to(device)
        nll = each.new_zeros(len(self.facts)).index_add(0, fact, each * self.weight.to(each))
        most = lead.new_full((len(self.facts),), math.inf)
        least, bare_least, context_least = (
            most.scatter_reduce(0, fact[at], lead[at], "amin")
            for at in (slice(None), self.is_bare.to(device), self.in_context.to(device))
        )
        log_p = F.log_softmax(drifts, dim=1)
        for i, f in enumerate(self.facts):
            drift_start.setdefault(f, log_p[i].detach().clone())
        start = torch.stack([drift_start[f] for f in self.facts])
        kl = F.kl_div(start, log_p, log_target=True, reduction="none").sum(1)
        return _Losses(nll, kl, least, bare_least, context_least)

    def _as_taught(self, says: Tensor, each: Tensor, lead: Tensor) -> tuple[Tensor, Tensor]:
        """Losses `each` and leads [positions], with those of the teacher where one is."""
        at, banned = self.taught.to(says.device), self.banned.to(says.device)
        loss, slip = unlearned(says[at], torch.cat(self.teacher).to(says), banned)
        gone = torch.where(slip, -1.0, 1.0).to(lead)
        return each.index_copy(0, at, loss), lead.index_copy(0, at, gone)


def leads_of(logits: Tensor, target: Tensor) -> Tensor:
    """Nats by which each token of `target` [n] leads its strongest rival.

    `logits` are [n, vocabulary].
    """
    own = target[:, None]
    rival = logits.scatter(1, own, -math.inf).amax(1)
    return logits.gather(1, own)[:, 0] - rival
