"""Norm-anchor scaling of values (NAS, arXiv:2602.02543).

Where a stream of edits grows, W's output and the values that are asked of it grow each other. NAS
writes z = (h − v₀) + v*: v₀ is what W gives now, v* = v₀ + δ, and v* is scaled to the mean length
that v* has for a fixed sample of facts in the unedited model. Where it is over twice that mean
before, δ is dropped.

The published sample is 1,000 facts of CounterFact; ours are 25 that the package ships.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nulledit.config import ChatSettings, ValueSettings
from nulledit.data.facts import Fact
from nulledit.data.readers import read_facts
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.values import optimise_values, plan_rows
from nulledit.errors import FactError, StatisticsError
from nulledit.io.files import cache_folder, write_text
from nulledit.io.untrusted import MAX_SETTINGS, parse_json, read_text
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder
from nulledit.parallel.ranks import Ranks

FORMAT = 1  # raise it when the same inputs come to give another length
LONGEST_LEFT_OUT = 0.05
"""Of the sample's values, as published: a few outliers would move the mean."""
TOO_LONG = 2.0  # times the mean: such a v* is not scaled, δ is dropped
TINY = 1e-300
BARE = ("{}",)


@cache
def sample() -> tuple[Fact, ...]:
    """The facts whose values say how long values are."""
    shipped = resources.files("nulledit") / "assets" / "facts" / "norm_sample.yaml"
    with resources.as_file(shipped) as file:
        return read_facts(file).facts


def usable(encoder: RowEncoder) -> list[Fact]:
    """The sample's facts that the tokenizer and the model's context can take; FactError if none."""
    found, last = [], None
    for fact in sample():
        try:
            plan_rows(fact, encoder, BARE)
            found.append(fact)
        except FactError as error:
            last = error
    if last is not None and not found:
        raise FactError(f"values.norm_anchor: no fact of the sample can be used: {last}")
    return found


def value_lengths(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    layer: int,
    first: int,
    settings: ValueSettings,
    positions: int,
    progress: Callable[[int], None],
) -> list[float]:
    """‖v*‖ of each of `facts` at `layer`, optimised on bare prompts as published.

    `first`: the first edited layer. The others are as for `optimise_values`.
    """
    if not facts:
        return []
    values = optimise_values(
        model,
        facts,
        range(len(facts)),
        layers=[layer],
        contexts=BARE,
        settings=settings,
        positions=positions,
        done=lambda found: progress(len(found)),
    )
    walk = LayerwiseForward(model, facts, first=first, contexts=BARE, bare_weight=1.0)
    hidden, added = walk.standing(layer)
    z = torch.stack([value.z.cpu().double() for value in values], dim=1)
    lengths: list[float] = (z - hidden + added).norm(dim=0).tolist()
    return lengths


def mean_length(lengths: Sequence[float]) -> float:
    """Of the sample's v*, without the longest."""
    kept = sorted(lengths)[: len(lengths) - int(LONGEST_LEFT_OUT * len(lengths))]
    return sum(kept) / len(kept)


def anchored(z: Tensor, hidden: Tensor, added: Tensor, length: float) -> Tensor | None:
    """`z` [d] with its v* scaled to `length`; None where v* is too long.

    `hidden` is h and `added` v₀ [d] each, as `LayerwiseForward.standing` gives them.
    """
    beside = hidden - added
    v = z - beside
    norm = float(v.norm())
    return None if norm > TOO_LONG * length else beside + v * (length / max(norm, TINY))


@dataclass(frozen=True)
class LengthRecord:
    """What a sample's mean length depends on; kept in the cache beside the model's statistics."""

    model_hash: str
    """Of the unedited weights."""
    reading: str
    """Of its configuration, and of how its tokenizer reads the sample."""
    layer: int
    """Where values stand."""
    settings: ValueSettings
    """How they were optimised."""
    chat: ChatSettings | None
    """The form of their prompts."""
    mlp_out: str
    """Path of W in a block."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a chat form as in recipes."""
        return asdict(self) | {"chat": self.chat and self.chat.to_dict()}

    @property
    def file(self) -> Path:
        """Its place by a hash of all of it and of the sample."""
        content = json.dumps([FORMAT, self.to_dict(), [fact.to_dict() for fact in sample()]])
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cache_folder() / "statistics" / self.model_hash[:16] / f"value-length-{name}.json"

    def read(self) -> float | None:
        """The length, if it was measured before; StatisticsError if the file is damaged."""
        if not self.file.is_file():
            return None
        text = read_text(self.file, most=MAX_SETTINGS, error=StatisticsError, what="length")
        data = parse_json(text, source=str(self.file), error=StatisticsError)
        found = data.get("length") if isinstance(data, dict) else None
        if not isinstance(found, float) or not 0 < found < float("inf"):
            raise StatisticsError(
                f"{self.file}: length is {found!r}; expected a number above 0: delete the file"
            )
        return found

    def write(self, length: float, facts: int) -> None:
        """Keep a `length` measured on so many `facts`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"length": length, "facts": facts, **self.to_dict()}
        write_text(self.file, json.dumps(content, indent=2) + "\n")


def usual_length(
    record: LengthRecord,
    model: EditableModel,
    ranks: Ranks,
    *,
    first: int,
    positions: int,
    counter: Callable[[int], Callable[[int], None]],
) -> float:
    """Mean ‖v*‖ of the sample in `model`, which has no edits now; it is kept in `record`.

    `first`: the first edited block. `counter` makes the callback that counts facts done.
    """
    facts = usable(model.encoder)
    mine = facts[ranks.rank :: ranks.size]
    lengths = value_lengths(
        model,
        mine,
        layer=record.layer,
        first=first,
        settings=record.settings,
        positions=positions,
        progress=counter(len(mine)),
    )
    length = mean_length([x for note, _ in ranks.gather(lengths) for x in note])
    if ranks.first:
        record.write(length, len(facts))
    return length
