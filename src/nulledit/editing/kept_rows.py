"""Rows of the facts that run together, with all that no δ changes computed once and kept.

- states up to the first block with values are constant, so they are computed once; what the rows
  of a prefix context have in common, the context as a rule, is run once for all of them;
- positions before the subject's last token never see δ, so of the blocks above only their
  attention keys and values are kept; where a model can't be run after these (recurrent blocks),
  whole rows are run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch

from nulledit.editing.unlearning import ForgetTarget
from nulledit.models.batches import Batch, share_beginnings
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import Row

CONTEXTS, RELATIONS = range(2)
"""Kinds of rows that steps may read in turn: of contexts and rewordings, of other relations."""


class Turn(NamedTuple):
    """Which row of its kind a row is."""

    kind: int
    place: int


@dataclass(frozen=True)
class Job:
    """What one fact needs: rewriting rows, and where the drift of its subject's meaning is read."""

    fact_id: str
    """Its fact."""
    rows: tuple[Row, ...]
    """Rewriting rows; the first is the bare prompt."""
    lessons: tuple[ForgetTarget, ...]
    """Of the rows, where a fact is to be forgotten; else none."""
    labels: tuple[int, ...]
    """The rows' contexts, by number."""
    drift_row: Row | None
    """None: read at the bare row, whose tokens up to the subject are the same."""
    group: int
    """Facts of one group share δ."""
    relations: tuple[Row, ...] = ()
    """Other relations of its subject, without a target, whose next token is held."""

    @property
    def turns(self) -> list[Turn | None]:
        """Of `all_rows`; None: read in every step."""
        found = count()
        own = [None if label == 0 else Turn(CONTEXTS, next(found)) for label in self.labels]
        drift = [] if self.drift_row is None else [None]
        return own + drift + [Turn(RELATIONS, place) for place in range(len(self.relations))]

    def cycle(self, per_step: Sequence[int]) -> int:
        """How many steps it takes until each row has had its turn."""
        kinds = Counter(turn.kind for turn in self.turns if turn)
        steps = (-(-n // per_step[kind]) for kind, n in kinds.items() if per_step[kind])
        return max(steps, default=1)

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """All that are run, in their order."""
        drift = () if self.drift_row is None else (self.drift_row,)
        return (*self.rows, *drift, *self.relations)


class KeptRows:
    """The rows of some jobs, split at their subject's last token, with states and prefixes."""

    def __init__(self, model: EditableModel, jobs: Sequence[Job], layers: Sequence[int]):
        """`layers`: the blocks whose values are asked. The groups of `jobs` are numbered anew."""
        self.model, self.jobs, self.layers = model, jobs, tuple(layers)
        self.device = model.device
        names = list(dict.fromkeys(job.group for job in jobs))
        self.group_of = [names.index(job.group) for job in jobs]  # fact -> group
        self.rows: list[Row] = []
        self.labels: list[int] = []  # row -> its context
        self.owner: list[int] = []  # row -> fact
        self.turns: list[Turn | None] = []  # row -> its place among its fact's of one kind
        self.bare: list[int] = []  # fact -> row
        self.drift: list[int] = []  # fact -> row
        self.relations: list[range] = []  # fact -> rows
        for i, job in enumerate(jobs):
            self._add(i, job)
        self.taught = {  # row -> what to say in its target's places [target tokens, vocabulary]
            self.bare[i] + k: lesson.teacher(model)
            for i, job in enumerate(jobs)
            for k, lesson in enumerate(job.lessons)
        }
        self._keep_states()
        first = [self.bare[self.group_of.index(g)] for g in range(len(names))]
        at = [self.rows[r].subject_last - self.begins[r] for r in first]
        self.firsts = first  # group -> bare row of its first fact
        self.norms = self.states[first, at].norm(dim=1).to(self.start)  # ‖h‖ [groups]

    def tokens(self, group: int, per_step: Sequence[int]) -> int:
        """How many tokens of `group` a step reads at most, so many rows of each kind."""
        found = 0
        for fact, bare in enumerate(self.bare):
            if self.group_of[fact] != group:
                continue
            end = self.bare[fact + 1] if fact + 1 < len(self.bare) else len(self.rows)
            by_kind: dict[int | None, list[int]] = {}
            for turn, length in zip(self.turns[bare:end], self.lengths[bare:end], strict=True):
                by_kind.setdefault(turn and turn.kind, []).append(length)
            for kind, lengths in by_kind.items():
                n = per_step[kind] if kind is not None else 0
                found += sum(sorted(lengths)[-n:])
        return found

    def _add(self, fact: int, job: Job) -> None:
        """Append the rows of `job`, which is number `fact`."""
        self.bare.append(len(self.rows))
        self.rows += job.all_rows
        self.labels += job.labels
        self.labels += [-1] * (len(self.rows) - len(self.labels))
        self.turns += job.turns
        first = len(self.rows) - len(job.relations)
        self.drift.append(self.bare[fact] if job.drift_row is None else first - 1)
        self.relations.append(range(first, len(self.rows)))
        self.owner += [fact] * (len(self.rows) - len(self.owner))

    @torch.no_grad()
    def _keep_states(self) -> None:
        """Run the blocks up to the first with values; split each row at its subject's last token.

        Or at its start, where that is more than the model can keep in front of rows.
        """
        inputs = [row.ids[: len(row.ids) - (len(row.target_ids) > 0)] for row in self.rows]
        ends = [row.subject_last for row in self.rows]
        after = max(len(ids) - end for ids, end in zip(inputs, ends, strict=True))
        fits = max(ends) + after <= self.model.columns
        self.begins = ends if fits else [0] * len(ends)  # row -> its first token that is run again
        self.lengths = [len(ids) - at for ids, at in zip(inputs, self.begins, strict=True)]
        shared = share_beginnings(
            inputs,
            self.labels,
            self.begins,
            columns=self.model.columns,
            pad_id=self.model.pad_id,
            device=self.device,
        )
        stems = self.model.record_prefix(shared.stems).select(shared.stem)
        states, standing = self.model.run_to_values(
            stems.before(shared.rests), layer=self.layers[0], prefix=stems
        )  # [rows, length, d]
        cuts = [begin - cut for begin, cut in zip(self.begins, shared.cuts, strict=True)]
        rests = [ids[cut:] for ids, cut in zip(inputs, shared.cuts, strict=True)]
        heads = [ids[:cut] for ids, cut in zip(rests, cuts, strict=True)]
        tails = [ids[cut:] for ids, cut in zip(rests, cuts, strict=True)]
        head = self.model.collate(heads)
        tail = self.model.collate(tails)
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
        self.prefix = stems.then(
            self.model.record_prefix(
                head, states[:, :width], first=self.layers[0] + 1, prefix=stems
            )
        )
        last = [end - cut for end, cut in zip(ends, shared.cuts, strict=True)]
        at_subject = standing[torch.arange(len(last)), last]  # where the first δ is added [rows, d]
        self.start = at_subject.float() if at_subject.dtype.itemsize < 4 else at_subject
