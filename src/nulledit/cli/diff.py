"""`nulledit diff`: two states of one base model side by side."""

from __future__ import annotations

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, arg


@command(
    "Two runs, or two states of one.",
    arg("first", "RUN[@EVENT]"),
    arg("second", "RUN[@EVENT]"),
    PLACED,
)
def diff(call: Call) -> None:
    """What differs between two runs on one base model, or between two states of one run.

    RUN@N is the model after event N of `nulledit log RUN`, RUN@0 the base. The table shows facts
    that only one has or that they answer differently, with the probability of each answer in both.

    \b
    $ nulledit diff run other
    $ nulledit diff run@3 run
    """
    call.prepare()
    from nulledit.ledger.store import Store
    from nulledit.runs.diff import columns_at, difference, difference_page, read_state

    first, second = call.first, call.second
    (a, at_a), (b, at_b) = read_state(first), read_state(second)
    other, own = Store(b / "ledger").load(), Store(a / "ledger")
    if own.exists:  # an event that never was is told before the model is loaded
        columns_at(own.read(), at_a, first)
    columns_at(other, at_b, second)
    run = call.open(a)
    found = difference(
        run.editor,
        other,
        first=columns_at(run.history, at_a, first),
        second=columns_at(other, at_b, second),
    )
    call.show(
        lambda: {"first": first, "second": second, **found.to_dict()},
        lambda: difference_page(found, first, second),
    )
