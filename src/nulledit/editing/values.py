"""The value z of a fact: the hidden state that makes the model say its target.

z = h + δ at the subject's last token after the last edited block, δ by gradient descent (ROME,
arXiv:2202.05262, Eq. 4; MEMIT, arXiv:2210.07229, Section 4.3). The published code runs the whole
model, one fact at a time, and computes logits everywhere. Here, with the same result:

- what no δ changes is computed once and kept (`kept_rows.py`);
- logits are computed only where the loss reads them; no weight has a gradient (`reads.py`);
- facts run together, as many as fit; one that is done leaves, another one begins (`descent.py`).

Where a norm stands between W and the stream, no hidden state can be written through it: there the
value is of W's output, and the norm and the blocks above run after it. W's output may have any
size, the norm takes it away; so δ is counted in units in which it is as long as the hidden state,
and step size, clamp and decay mean what they mean elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from nulledit.config import ValueSettings
from nulledit.data.facts import Fact
from nulledit.editing.contexts import reworded
from nulledit.editing.descent import Descent, Value, measured
from nulledit.editing.kept_rows import Job, KeptRows
from nulledit.editing.reads import leads_of
from nulledit.editing.unlearning import lessons_of
from nulledit.errors import ModelError
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import differentiating, frozen
from nulledit.models.tokens import Row, RowEncoder

Work = Callable[[KeptRows, Sequence[int], int], Iterable[Mapping[int, Value]]]
"""Values as they come, by number in the rows that are kept, of facts whose places in the whole are
given, in steps of at most so many tokens."""
KEPT = 4
"""Token positions held ready for each that runs in a step."""


def plan_rows(
    fact: Fact, encoder: RowEncoder, contexts: Sequence[str], worded: Sequence[str] = ()
) -> tuple[Row, ...]:
    """Rewriting rows of a fact: each training prompt in each prefix context, with the target, and
    bare in the form beside the encoder's own.

    After them, its prompts as they are `worded` otherwise, bare.
    """
    asked = [(p, form, context) for p in fact.prompts for form, context in encoder.placed(contexts)]
    asked += [(p, encoder, "{}") for p in worded]
    return tuple(
        form.encode_template(prompt, fact.subject, context=context, target=fact.target)
        for prompt, form, context in asked
    )


def wordings(
    facts: Sequence[Fact], groups: Sequence[int], contexts: Sequence[str], n: int
) -> list[tuple[str, ...]]:
    """Other wordings of each fact's prompts, at most `n` of each, without repeats.

    Left out are those after which another fact of its group says something else: one δ can't say
    both. A fact to forget has none.
    """
    found = [
        dict.fromkeys(p for own in fact.prompts for p in reworded(own, n, contexts))
        if not fact.forget
        else {}
        for fact in facts
    ]
    answers: dict[tuple[int, str], set[str]] = {}
    for fact, group, worded in zip(facts, groups, found, strict=True):
        for prompt in (*fact.prompts, *worded):
            answers.setdefault((group, fact.render(prompt)), set()).add(fact.target)
    return [
        tuple(p for p in worded if len(answers[group, fact.render(p)]) == 1)
        for fact, group, worded in zip(facts, groups, found, strict=True)
    ]


def optimise_values(
    model: EditableModel,
    facts: Sequence[Fact],
    groups: Sequence[int],
    *,
    layers: Sequence[int],
    contexts: Sequence[str],
    settings: ValueSettings,
    positions: int,
    done: Callable[[Mapping[int, Value]], None] = lambda found: None,
) -> list[Value]:
    """Optimise one δ per group for `facts` at block `layers`, or one at each of several together.

    `groups[i]` is the group of fact i: facts on one key share δ and sum their losses. `contexts`
    are templates with one slot, the bare "{}" first. `positions` bounds how many token positions
    run through the upper blocks together, and rows of `KEPT` times as many are held ready; on an
    accelerator it halves itself when memory runs out.
    `done` receives values as they come, whole groups, by place in `facts`.
    """
    return _by_chunks(
        model,
        _jobs(model, facts, groups, contexts, settings),
        lambda kept, _members, bound: Descent(kept, settings, bound).run(),
        layers=layers,
        positions=positions,
        kept=KEPT,
        done=done,
    )


def measure_values(
    model: EditableModel,
    facts: Sequence[Fact],
    values: Sequence[Value],
    *,
    layer: int,
    contexts: Sequence[str],
    settings: ValueSettings,
    positions: int,
) -> list[Value]:
    """`values` of `facts` whose z was changed, with the outcomes that describe it as it is now.

    They are of one block, `layer`. The other arguments are as for `optimise_values`.
    """
    return _by_chunks(
        model,
        _jobs(model, facts, range(len(facts)), contexts, settings),
        lambda kept, members, _bound: [measured(kept, settings, [values[i] for i in members])],
        layers=[layer],
        positions=positions,
    )


def _jobs(
    model: EditableModel,
    facts: Sequence[Fact],
    groups: Sequence[int],
    contexts: Sequence[str],
    settings: ValueSettings,
) -> list[Job]:
    jobs = []
    asked: dict[int, list[str]] = {}  # group -> prompts of all its facts
    for fact, group in zip(facts, groups, strict=True):
        asked.setdefault(group, []).extend(fact.prompts)
    worded = wordings(facts, groups, contexts, settings.rewordings)
    for fact, group, others in zip(facts, groups, worded, strict=True):
        lessons = lessons_of(model, fact, contexts) if fact.forget else ()
        rows = tuple(x.row for x in lessons)
        rows = rows or plan_rows(fact, model.encoder, contexts, others)
        drift = model.encoder.encode_template(settings.kl_prompt, fact.subject).upto_subject()
        shared = rows[0].upto_subject().ids == drift.ids
        n = len(model.encoder.placed(contexts))
        in_context = len(fact.prompts) * n  # rows after them share no beginning
        labels = tuple(i % n if i < in_context else -1 for i in range(len(rows)))
        relations = tuple(
            model.encoder.encode_template(prompt, fact.subject)
            for prompt in settings.held_relations
            if not any(_begin_alike(prompt, own) for own in asked[group])
        )
        drift_row = None if shared else drift
        jobs.append(Job(fact.id, rows, lessons, labels, drift_row, group, relations))
    return jobs


def _begin_alike(prompt: str, other: str) -> bool:
    """Whether one is how the other begins: they ask for the same."""
    return prompt.startswith(other) or other.startswith(prompt)


def _by_chunks(
    model: EditableModel,
    jobs: Sequence[Job],
    work: Work,
    *,
    layers: Sequence[int],
    positions: int,
    kept: int = 1,
    done: Callable[[Mapping[int, Value]], None] = lambda found: None,
) -> list[Value]:
    """What `work` gives for each chunk of `jobs` and their places, in the order of `jobs`.

    `kept`: how many times `positions` a chunk may have.
    """
    values: dict[int, Value] = {}

    def tell(found: Mapping[int, Value]) -> None:
        values.update(found)
        done(found)

    waiting = list(range(len(jobs)))
    while waiting:
        members = _next_chunk(jobs, waiting, kept * positions, whole=not model.columns)
        try:
            _run_chunk(model, jobs, members, work, layers, positions, tell)
        except torch.OutOfMemoryError:
            if len({jobs[i].group for i in members}) == 1:
                raise ModelError(
                    f"fact {jobs[members[0]].fact_id}: not enough memory for its rows"
                ) from None
            positions = max(1, positions // 2)
        waiting = [i for i in waiting if i not in values]
    return [values[i] for i in range(len(jobs))]


def _run_chunk(
    model: EditableModel,
    jobs: Sequence[Job],
    members: Sequence[int],
    work: Work,
    layers: Sequence[int],
    positions: int,
    tell: Callable[[Mapping[int, Value]], None],
) -> None:
    """Tell what `work` gives of `members`, by place in `jobs`; nothing is held afterwards."""
    with differentiating():
        kept = KeptRows(model, [jobs[i] for i in members], layers)
        for found in work(kept, members, positions):
            tell({members[f]: value for f, value in found.items()})


def _next_chunk(
    jobs: Sequence[Job], waiting: Sequence[int], positions: int, *, whole: bool
) -> list[int]:
    """The shortest of `waiting`, groups kept whole, that fit `positions` token positions.

    `whole`: rows run from their start, not from the subject's last token.
    """
    groups: dict[int, list[int]] = {}
    for i in waiting:
        groups.setdefault(jobs[i].group, []).append(i)

    def length(members: Sequence[int]) -> int:
        rows = (row for i in members for row in jobs[i].all_rows)
        return max(len(row.ids) - 1 - (0 if whole else row.subject_last) for row in rows)

    chunk: list[int] = []
    for group in sorted(groups.values(), key=length):
        together = chunk + group
        longest = length(together)
        rows = sum(len(jobs[i].all_rows) for i in together)
        if chunk and rows * longest > positions:
            break
        chunk = together
    return chunk


@torch.no_grad()
def bare_leads(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    positions: int,
) -> list[float]:
    """For each of `facts`, the least lead of a target token at its bare prompts, in nats.

    As the model is; infinite for a fact to forget. `positions` bounds the tokens that run together.
    """
    rows = [
        (i, row)
        for i, fact in enumerate(facts)
        if not fact.forget
        for row in plan_rows(fact, model.encoder, ("{}",))
    ]
    leads = [math.inf] * len(facts)
    with frozen(model.model):
        for part in chunks_by_length([len(row.ids) for _, row in rows], positions):
            chosen = [rows[k] for k in part]
            ids = [row.ids[:-1] for _, row in chosen]
            normed = model.run_normed(model.collate(ids))
            for at, (i, row) in enumerate(chosen):
                logits = model.logits(normed[at, row.target_start - 1 : len(row.ids) - 1])
                target = torch.tensor(row.target_ids, device=logits.device)
                leads[i] = min(leads[i], float(leads_of(logits.float(), target).min()))
    return leads
