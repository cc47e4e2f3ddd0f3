"""Where the loss of values reads logits, and what it reads there.

Logits are computed only at these places; no weight has a gradient. A step may read some of a fact's
rows only, in turn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nulledit.editing.kept_rows import RELATIONS, KeptRows
from nulledit.editing.unlearning import unlearned
from nulledit.models.batches import Batch, runs_by_length
from nulledit.models.prefix import Prefix


class Losses(NamedTuple):
    """What one pass of the rows gives, per fact.

    A lead is the least one of a target token over its strongest rival, in nats; of a fact to forget
    it is 1 where another token is likelier, else -1.
    """

    nll: Tensor  # of the target, or what `unlearned` says
    drift: Tensor  # KL of what the subject's own token predicts
    relations: Tensor  # mean KL of what comes after its other relations
    lead: Tensor  # over all rows that are read
    bare_lead: Tensor  # at the bare prompt
    context_lead: Tensor  # in the prefix contexts; at all rows where there is none


def rows_in_turn(
    kept: KeptRows, active: Collection[int], turns: Mapping[int, int], per_step: Sequence[int]
) -> list[int]:
    """The rows of groups `active` that a step reads: of those in `turns` so many of each kind.

    `turns` tells how many steps such a group has made: step after step it is each row's turn. The
    first one reads all other relations, since what the model says there is what is held.
    """
    each = Counter((f, t.kind) for f, t in zip(kept.owner, kept.turns, strict=True) if t)
    found = []
    for row, (fact, turn) in enumerate(zip(kept.owner, kept.turns, strict=True)):
        group = kept.group_of[fact]
        if group not in active:
            continue
        if turn and group in turns and (n := per_step[turn.kind]):
            begun = turns[group] > 0 or turn.kind != RELATIONS
            if begun and (turn.place - turns[group] * n) % each[fact, turn.kind] >= n:
                continue
        found.append(row)
    return found


class _Run:
    """Rows of nearly one length, which run together."""

    def __init__(self, kept: KeptRows, rows: Sequence[int]):
        """Of all that is kept, what belongs to `rows`."""
        self.kept, device = kept, kept.device
        index = torch.tensor(rows, device=device)
        longest = max(kept.lengths[r] for r in rows)
        everything = len(rows) == len(kept.rows)
        self.prefix: Prefix = kept.prefix if everything else kept.prefix.select(index)
        self.states = kept.states[index.to(kept.states.device), :longest]
        self.start = kept.start[index.to(kept.start.device)]
        subjects = torch.tensor([kept.rows[r].subject_last - kept.begins[r] for r in rows])
        self.subjects = subjects.to(self.states.device)[:, None, None].expand(
            -1, -1, self.states.shape[-1]
        )  # place of each row's subject [rows, 1, d]
        self.batch = Batch(
            kept.tail.ids[index, :longest],
            torch.cat([self.prefix.mask, kept.tail.mask[index, :longest]], dim=1),
            kept.tail.positions[index, :longest],
        )
        self.delta_of_row = torch.tensor([kept.group_of[kept.owner[r]] for r in rows])

    def normed(self, deltas: Tensor) -> Tensor:
        """After the final norm, with each row's δ of `deltas` [groups, layers, d] added."""
        states, _ = self.moved(deltas)
        return self.kept.model.run_normed(
            self.batch, states=states, first=self.kept.layers[-1] + 1, prefix=self.prefix
        )

    def moved(self, deltas: Tensor) -> tuple[Tensor, list[Tensor]]:
        """States after the last block with values, each row's δ added in all of these blocks.

        And, by block, what stands at the rows' subjects with it [rows, d].
        """
        model, below = self.kept.model, None
        stacked = deltas[self.delta_of_row.to(deltas.device)]  # [rows, layers, d]
        states, values = self.states, []
        standing = self.start[:, None]
        for k, layer in enumerate(self.kept.layers):
            if below is not None:
                states, there = model.run_to_values(
                    self.batch, states=states, first=below + 1, layer=layer, prefix=self.prefix
                )
                standing = there.gather(1, self.subjects.to(there.device)).to(stacked.dtype)
            subjects = self.subjects.to(states.device)
            delta = stacked[:, k : k + 1].to(standing.device)
            moved = model.with_value(layer, states.gather(1, subjects), standing, delta)
            states = states.scatter(1, subjects, moved)
            values.append((standing + delta)[:, 0])
            below = layer
        return states, values


class Reads:
    """Rows of the groups still at work, and where the loss reads logits in them."""

    def __init__(
        self,
        kept: KeptRows,
        active: Collection[int],
        rows: Collection[int] = (),
        *,
        worth: int | None = None,
    ):
        """`active`: numbers of the groups; `rows`: those to read, by default all.

        `worth`: how many tokens of padding a further run of the model must save; None: one run.
        """
        self.kept = kept
        self.facts = [f for f, g in enumerate(kept.group_of) if g in active]
        chosen = rows or range(len(kept.rows))
        self.rows = [r for r in chosen if kept.group_of[kept.owner[r]] in active]
        lengths = [kept.lengths[r] for r in self.rows]
        whole = [list(range(len(self.rows)))]
        self.members = whole if worth is None else runs_by_length(lengths, worth)
        self.runs = [_Run(kept, [self.rows[i] for i in run]) for run in self.members]
        self._choose_places()

    def _choose_places(self) -> None:
        """Each target token of each rewriting row; after them, one place a fact for the drift, and
        the ends of its subject's other relations.
        """
        kept, device = self.kept, self.kept.device
        place = {row: i for i, row in enumerate(self.rows)}
        at_row: list[int] = []
        at_position: list[int] = []
        target: list[int] = []
        fact: list[int] = []
        weight: list[float] = []
        taught: list[int] = []  # places in `target` that are taught otherwise
        banned: list[int] = []
        for i, f in enumerate(self.facts):
            read = [k for k in range(len(kept.jobs[f].rows)) if kept.bare[f] + k in place]
            for k in read:
                row = kept.jobs[f].rows[k]
                r, n = kept.bare[f] + k, len(row.target_ids)
                if kept.jobs[f].lessons:
                    taught += range(len(target), len(target) + n)
                    banned += kept.jobs[f].lessons[k].banned
                begin = row.target_start - 1 - kept.begins[r]
                at_row += [place[r]] * n
                at_position += range(begin, begin + n)
                target += row.target_ids
                fact += [i] * n
                weight += [1 / (n * len(read))] * n
        self.n_nll = len(target)
        self._choose_leads(at_row, fact)
        self.teacher = [told for r, told in kept.taught.items() if r in place]
        self.taught = torch.tensor(taught, dtype=torch.long, device=device)
        self.banned = torch.tensor(banned, dtype=torch.long, device=device)
        at_row += [place[kept.drift[f]] for f in self.facts]
        drift = [kept.drift[f] for f in self.facts]
        at_position += [kept.rows[r].subject_last - kept.begins[r] for r in drift]
        others = [(i, r) for i, f in enumerate(self.facts) for r in kept.relations[f] if r in place]
        at_row += [place[r] for _, r in others]
        at_position += [len(kept.rows[r].ids) - 1 - kept.begins[r] for _, r in others]
        self.meant_rows = [*drift, *(r for _, r in others)]  # each fact's own, then the others
        self.relation_fact = torch.tensor([i for i, _ in others], dtype=torch.long, device=device)
        read_of = Counter(i for i, _ in others)
        share = [1 / read_of[i] for i, _ in others]
        self.relation_weight = torch.tensor(share, device=device)
        self._place(at_row, at_position)
        self.target = torch.tensor(target, device=device)
        self.fact = torch.tensor(fact, device=device)
        self.weight = torch.tensor(weight, device=device)

    def _choose_leads(self, at_row: Sequence[int], fact: Sequence[int]) -> None:
        """Places of target tokens at bare prompts, and in contexts; `at_row` and `fact` of each.

        Places, not yes and no: to count those, every step would wait for the device.
        """
        kept, device = self.kept, self.kept.device
        bare = {kept.bare[f] for f in self.facts}
        there = [kept.labels[self.rows[r]] > 0 for r in at_row]
        with_contexts = {i for i, yes in zip(fact, there, strict=True) if yes}
        at_bare = [k for k, r in enumerate(at_row) if self.rows[r] in bare]
        in_context = [
            k
            for k, (i, yes) in enumerate(zip(fact, there, strict=True))
            if yes or i not in with_contexts
        ]
        self.at_bare = torch.tensor(at_bare, dtype=torch.long, device=device)
        self.in_context = torch.tensor(in_context, dtype=torch.long, device=device)

    def losses(self, deltas: Sequence[Tensor], before: dict[int, Tensor]) -> Losses:
        """What `deltas` [layers, d], one per group, give.

        `before`: row -> what it predicts of what is to stay, filled in at the first call.
        """
        logits = self._logits(deltas)
        device = logits.device
        says, meant = logits[: self.n_nll], logits[self.n_nll :]
        each = F.cross_entropy(says, self.target.to(device), reduction="none")
        lead = leads_of(says.detach(), self.target.to(device))
        if self.teacher:
            each, lead = self._as_taught(says, each, lead)
        fact = self.fact.to(device)
        nll = each.new_zeros(len(self.facts)).index_add(0, fact, each * self.weight.to(each))
        most = lead.new_full((len(self.facts),), math.inf)
        least, bare_least, context_least = (
            most.scatter_reduce(0, fact[at], lead[at], "amin")
            for at in (slice(None), self.at_bare.to(device), self.in_context.to(device))
        )
        log_p = F.log_softmax(meant, dim=1)
        for row, now in zip(self.meant_rows, log_p, strict=True):
            before.setdefault(row, now.detach().clone())
        start = torch.stack([before[row] for row in self.meant_rows])
        kl = F.kl_div(start, log_p, log_target=True, reduction="none").sum(1)
        n = len(self.facts)
        weighed = kl[n:] * self.relation_weight.to(kl)
        relations = kl.new_zeros(n).index_add(0, self.relation_fact.to(device), weighed)
        return Losses(nll, kl[:n], relations, least, bare_least, context_least)

    def _place(self, at_row: Sequence[int], at_position: Sequence[int]) -> None:
        """Where each run is read, and the order in which its places come in all of them."""
        device = self.kept.device
        self.at: list[tuple[Tensor, Tensor]] = []  # of each run, rows and positions
        order: list[int] = []
        for run in self.members:
            row_in_run = {row: i for i, row in enumerate(run)}
            mine = [k for k, row in enumerate(at_row) if row in row_in_run]
            rows = torch.tensor([row_in_run[at_row[k]] for k in mine], dtype=torch.long)
            places = torch.tensor([at_position[k] for k in mine], dtype=torch.long)
            self.at.append((rows.to(device), places.to(device)))
            order += mine
        self.order = torch.tensor(order, device=device).argsort()

    def _logits(self, deltas: Sequence[Tensor]) -> Tensor:
        """At the places that are read, with each row's δ added [places, vocabulary]."""
        stacked, read = torch.stack(list(deltas)), []
        for run, at in zip(self.runs, self.at, strict=True):
            normed = run.normed(stacked)
            row, position = (index.to(normed.device) for index in at)
            read.append(normed[row, position])
        states = torch.cat(read)[self.order.to(read[0].device)]
        logits = self.kept.model.logits(states)
        return logits.float() if logits.dtype.itemsize < 4 else logits

    @torch.no_grad()
    def values(self, deltas: Sequence[Tensor]) -> Tensor:
        """z of each row, by block, with the δ of its group [rows, layers, d]."""
        stacked = torch.stack(list(deltas))
        moved = [run.moved(stacked)[1] for run in self.runs]
        order = torch.tensor([i for run in self.members for i in run]).argsort()
        by_run = [torch.stack([z.to(found[0]) for z in found], dim=1) for found in moved]
        together = torch.cat(by_run)
        return together[order.to(together.device)]

    def _as_taught(self, says: Tensor, each: Tensor, lead: Tensor) -> tuple[Tensor, Tensor]:
        """Losses `each` and leads [positions], with those of the teacher where one is."""
        at, banned = self.taught.to(says.device), self.banned.to(says.device)
        loss, slip = unlearned(says[at], torch.cat(self.teacher).to(says), banned)
        gone = torch.where(slip, -1.0, 1.0).to(lead)
        return each.index_copy(0, at, loss), lead.index_copy(0, at, gone)


def unit_lengths(kept: KeptRows) -> Tensor:
    """How long a δ of 1 is, by group and block [groups, layers].

    Where a norm follows W, its output may have any length, so δ is counted in units in which that
    is as long as the state. Of several blocks, so that it is as long as the first one's.
    """
    ones = kept.norms.new_ones(len(kept.norms), len(kept.layers))
    normed = kept.model.values_at_output
    if not normed and len(kept.layers) == 1:
        return ones
    if len(kept.layers) == 1:
        standing = kept.start[kept.firsts][:, None]
    else:
        nothing = [torch.zeros_like(kept.start[:1]).expand(len(kept.layers), -1)] * len(ones)
        standing = Reads(kept, range(len(ones))).values(nothing)[kept.firsts]
    lengths = standing.norm(dim=2)
    return lengths / (kept.norms[:, None] if normed else lengths[:, :1])


def leads_of(logits: Tensor, target: Tensor) -> Tensor:
    """Nats by which each token of `target` [n] leads its strongest rival.

    `logits` are [n, vocabulary].
    """
    own = target[:, None]
    rival = logits.scatter(1, own, -math.inf).amax(1)
    return logits.gather(1, own)[:, 0] - rival
