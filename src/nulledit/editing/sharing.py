"""The values of a batch, shared out among the ranks and brought together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nulledit.data.facts import SLOT, Fact
from nulledit.editing.descent import Value
from nulledit.ledger.records import ValueOutcome
from nulledit.parallel.ranks import Message, Ranks, shares


def dealt(
    ranks: Ranks, wordings: Sequence[Fact], groups: Sequence[int], missing: Sequence[int]
) -> list[int]:
    """Those of the requests `missing` whose values this rank optimises; groups stay whole."""
    if ranks.alone:
        return list(missing)
    members: dict[int, list[int]] = {}
    for i in missing:
        members.setdefault(groups[i], []).append(i)
    costs = [float(sum(_length(wordings[i]) for i in mine)) for mine in members.values()]
    of_group = list(members.values())
    return sorted(i for number in shares(costs, ranks.size)[ranks.rank] for i in of_group[number])


def gathered(ranks: Ranks, mine: Mapping[int, Value]) -> dict[int, Value]:
    """The values of all ranks, by request."""
    return {
        i: value
        for message in ranks.gather(*_message_of(mine))
        for i, value in _values_of(message).items()
    }


def of_first(ranks: Ranks, values: Mapping[int, Value]) -> dict[int, Value]:
    """Those that rank 0 has, by request."""
    return _values_of(ranks.from_first(*_message_of(values)))


def _length(wording: Fact) -> int:
    """Characters that run again and again in a step: what comes after the subject."""
    return sum(len(p) - p.find(SLOT) + len(wording.target) for p in wording.prompts)


def _message_of(values: Mapping[int, Value]) -> Message:
    notes = {str(i): x.outcome.to_dict() for i, x in values.items()}
    return notes, {str(i): x.z for i, x in values.items()}


def _values_of(message: Message) -> dict[int, Value]:
    notes, tensors = message
    return {int(i): Value(tensors[i], ValueOutcome.from_dict(note)) for i, note in notes.items()}
