"""Other relations of the edited subjects: does the model say there what its base would?

An edit is found by its subject, so whatever else is asked of that subject may change with it.
KnowEdit (arXiv:2401.01286) and RippleEdits (arXiv:2307.12976) call it relation specificity. The
base's likeliest next token is the reference, so no answer has to be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from nulledit.data.facts import Fact, quote
from nulledit.errors import FactError
from nulledit.evaluation.measures import AT_RELATIONS
from nulledit.evaluation.reading import divergences, side_by_side
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen

ByFact = Mapping[str, float]


def relation_states(
    model: EditableModel, facts: Sequence[Fact], *, positions: int = 2048
) -> dict[str, Tensor]:
    """Prompt of `other_relations` -> the normed state [d] that predicts its next token, on the CPU.

    `positions` bounds the tokens that run together; results don't depend on it. FactError for a
    prompt longer than the model's context.
    """
    rows: dict[str, tuple[int, ...]] = {}
    for fact in facts:
        for probe in fact.other_relations:
            try:
                rows[probe.prompt] = model.encoder.encode(probe.prompt).ids
            except FactError as error:
                raise FactError(f"fact {quote(fact.id)}, other_relations: {error}") from error
    prompts, found = list(rows), dict[str, Tensor]()
    with frozen(model.model), torch.no_grad():
        for chunk in chunks_by_length([len(ids) for ids in rows.values()], positions):
            asked = [prompts[i] for i in chunk]
            normed = model.run_normed(model.collate([rows[prompt] for prompt in asked]))
            last = normed[range(len(asked)), [len(rows[prompt]) - 1 for prompt in asked]]
            found |= zip(asked, last.cpu(), strict=True)
    return found


def kept_relations(
    model: EditableModel,
    facts: Sequence[Fact],
    base: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
) -> dict[str, ByFact]:
    """Measure -> fact id -> mean over its `other_relations`, of facts that have some.

    `base` and `now`: `relation_states` of the model without its edits, and with them. Relation
    specificity: the share of prompts whose likeliest next token is the base's. Relation KL:
    KL(base ‖ now) of the next token, nats; nan where the model's numbers are broken. Empty where no
    fact has such prompts; ValueError for a prompt that `base` lacks.
    """
    if not now:
        return {}
    if missing := [prompt for prompt in now if prompt not in base]:
        raise ValueError(f"the base was not asked {quote(missing[0])}: ask it about the same facts")
    before, after = torch.stack([base[p] for p in now]), torch.stack(list(now.values()))
    kept: dict[str, float] = {}
    apart: dict[str, float] = {}
    for at, log_p, log_q in side_by_side(model, before.to(model.device), after.to(model.device)):
        asked, moved = list(now)[at], divergences(log_p, log_q)
        same = (log_p.argmax(-1) == log_q.argmax(-1)) & moved.isfinite()
        kept |= zip(asked, same.double().tolist(), strict=True)
        apart |= zip(asked, moved.double().tolist(), strict=True)
    return {
        name: {
            fact.id: fmean(values[probe.prompt] for probe in fact.other_relations)
            for fact in facts
            if fact.other_relations
        }
        for name, values in zip(AT_RELATIONS, (kept, apart), strict=True)
    }
