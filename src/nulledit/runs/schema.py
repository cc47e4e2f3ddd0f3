"""What the JSON of a run's folder must look like, which may come from anywhere."""

from __future__ import annotations

from typing import Any

from nulledit.evaluation.measures import OF_FACTS
from nulledit.io.settings import Whole
from nulledit.io.shapes import Finite, Measured, has, left_out, list_of, named, or_none, that


def _is_row(row: Any) -> bool:
    """Whether the answer, and nothing else, is a text or nothing."""
    texts = {name for name, value in row.items() if isinstance(value, str)}
    return texts <= {"answer"} and isinstance(row.get("answer"), str | None)


def _belongs_together(run: Any) -> bool:
    """Of chat prompts, `others` says of the same facts asked otherwise, `asked` how they were."""
    asked = not run.get("others") or isinstance(run.get("asked"), str)
    both = (run["before"] is None) == (run["after"] is None)
    return asked and both and len(run["batches"]) in (0, 2)


_ROW = that(named(str | bool | Measured), "a fact's measures and its answer", _is_row)
_RATE = or_none(
    that(
        has(mean=Measured, standard_error=Measured, n=Whole),
        *("a mean, its error and n", lambda rate: len(rate) == 3),
    )
)
_SHARE = {"value": Measured, "standard_error": Measured, "tokens": Whole}
_SIDE = has(
    rates=that(named(_RATE), "measures, not an answer", lambda rates: "answer" not in rates),
    perplexity=left_out(or_none(has(**_SHARE))),
    kl=left_out(or_none(has(**_SHARE, worst_share=Measured))),
    opening_rate=left_out(
        has(
            **_SHARE,
            **dict.fromkeys(("worst", "any", "any_standard_error"), Measured),
            worst_fact=str,
            gates=Whole,
            units=Whole,
        )
    ),
    **{measure.name: left_out(_RATE) for measure in OF_FACTS},
)
_LAYER = has(
    **dict.fromkeys(("layer", "protected", "d_in"), Whole),
    **dict.fromkeys(("update_share", "free_share", "rounding_share"), Measured),
    **dict.fromkeys(("error", "error_standard_error", "free_share_error"), left_out(Measured)),
    neurons=left_out(or_none(Whole)),
)
_RUN = has(
    run=Whole,
    time=str,
    facts=Whole,
    known=or_none(Whole),
    batches=list_of(Whole),
    before=or_none(_SIDE),
    after=or_none(_SIDE),
    text=or_none(str),
    layers=list_of(_LAYER),
    displaced=left_out(list_of(has(batch=Whole, layers=named(Measured)))),
    seconds=named(Finite),
    notices=list_of(str),
    others=left_out(named(has(before=_SIDE, after=_SIDE))),
)
_PROBES = list_of(that(list_of(str), "a prompt and its answer", lambda probe: len(probe) == 2))
SUMMARY = has(
    version=str,
    state=str,
    base=has(model=or_none(str), hash=str, dtype=str),
    facts=Whole,
    batches=Whole,
    runs=list_of(that(_RUN, "a run whose parts belong together", _belongs_together)),
)
"""The content of `summary.json`."""
ENVIRONMENTS = list_of(named(Any))
"""The content of `environment.json`."""
LINE = has(
    id=str,
    run=Whole,
    column=Whole,
    prompt=str,
    target=str,
    before=or_none(_ROW),
    after=or_none(_ROW),
    says_target=or_none(bool),
    relation=left_out(or_none(str)),
    neighbours=left_out(has(lost=_PROBES, gained=_PROBES)),
    diagnosis=left_out(or_none(has(line=str, causes=list_of(has(name=str))))),
)
"""One line of `results.jsonl`; lines from before it was looked for have no diagnosis."""
