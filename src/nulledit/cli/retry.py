"""`nulledit retry`: facts of a run that do not hold, written again with stronger settings."""

from __future__ import annotations

from nulledit.cli.command import Call, command
from nulledit.cli.options import GATE, PLACED, RUN, TEXT, least, opt


@command(
    "Write what does not hold again, with stronger settings.",
    RUN,
    opt("--times N", "Rounds at most, each stronger than the one before.", least(1), 1),
    GATE,
    TEXT,
    PLACED,
)
def retry(call: Call) -> None:
    """Ask every fact of RUN, and write those again that do not hold.

    Each round takes twice the steps, a third more room for the values and a margin one nat wider;
    method, layers and statistics stay those of the run. Says what it changed. With --gate the
    result is kept only inside the limits; else the run stays as it was, with exit code 1.

    \b
    $ nulledit retry run
    $ nulledit retry run --times 2 --gate default
    """
    call.prepare()
    from nulledit.cli.edit import limits_of
    from nulledit.cli.going_on import followed, retry_again
    from nulledit.cli.run_page import refusal_shown, show

    limits = limits_of(call)
    run = call.open(writing=True)
    with refusal_shown(call), followed(run, retry_again):
        result = run.retry(call.times, text=call.text, limits=limits, tasks=call.capability)
    if isinstance(result, str):
        call.show({"run_folder": call.run, "notice": result}, result)
    else:
        show(call, result)
