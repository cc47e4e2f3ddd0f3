"""`nulledit retry`: facts of a run that do not hold, written again with stronger settings."""

from __future__ import annotations

from typing import Any

import click

from nulledit.cli.common import echo, emit, prepare
from nulledit.cli.options import device_option, gate_options, output_options, trust_option


@click.command(short_help="Write what does not hold again, stronger.")
@click.argument("run", metavar="RUN")
@click.option(
    "--times",
    metavar="N",
    type=click.IntRange(1),
    default=1,
    help="Rounds at most, each stronger than the one before.  [default: 1]",
)
@gate_options
@click.option(
    "--text", metavar="FILE", help="For perplexity and KL.  [default: one that comes along]"
)
@device_option
@trust_option
@output_options
def retry(as_json: bool, quiet: bool, **given: Any) -> None:
    """Ask every fact of RUN, and write those again that do not hold.

    Each round takes twice the steps, a third more room for the values and a margin one nat wider;
    method, layers and statistics stay those of the run. Says what it changed. With --gate the
    result is kept only inside the limits; else the run stays as it was, with exit code 1.

    \b
    $ nulledit retry run
    $ nulledit retry run --times 2 --gate default
    """
    prepare(quiet=quiet)
    from nulledit.api.run import Refused
    from nulledit.cli import runs
    from nulledit.cli.run_page import show, show_refusal

    try:
        result = runs.retry(given, quiet=quiet)
    except Refused as error:
        show_refusal(error.report, as_json=as_json)
        raise
    if isinstance(result, str):
        emit({"run_folder": given["run"], "notice": result}) if as_json else echo(result)
    else:
        show(result, as_json=as_json)
