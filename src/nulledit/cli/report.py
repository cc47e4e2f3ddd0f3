"""`nulledit report`: one page of runs and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nulledit.cli.common import echo, emit, say
from nulledit.cli.options import output_options


@click.command(short_help="One HTML page of runs and studies.")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True)
@click.option(
    "--out",
    metavar="FILE",
    help="Where to write it.  [default: FOLDER/report.html; ./report.html for several]",
)
@click.option("--title", help="Heading of a page of several folders.  [default: Report]")
@click.option("--force", is_flag=True, help="Overwrite a file that is not such a page.")
@output_options
def report(
    folders: tuple[str, ...],
    out: str | None,
    title: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make one self-contained HTML page of run folders (`edit`) and study folders (`study`).

    Tables with the best values marked, figures drawn again from their numbers, answers before and
    after, settings and environment. Two runs or more are compared, too, on the facts they share,
    with paired bootstrap intervals. The page needs no network; --json prints its numbers, too.

    \b
    $ nulledit report run
    $ nulledit report run-a run-b --out compared.html
    """
    from nulledit.runs.report import collect, write_report

    say(f"Reading {len(folders)} folder{'s' * (len(folders) > 1)}", quiet=quiet)
    collected = collect([Path(folder) for folder in folders])
    file = Path(out) if out else _default(folders)
    write_report(collected, file, title=title or "Report", force=force)
    if as_json:
        data: dict[str, Any] = {"report": str(file), **collected.to_dict()}
        emit(data)
        return
    echo(f"Report: {file} ({file.stat().st_size / 1000:.0f} kB)")


def _default(folders: tuple[str, ...]) -> Path:
    one = len({Path(folder).resolve() for folder in folders}) == 1
    return Path(folders[0]) / "report.html" if one else Path("report.html")
