"""`nulledit report`: one page of runs and studies."""

from __future__ import annotations

from pathlib import Path

from nulledit.cli.command import Call, command
from nulledit.cli.options import arg, opt


@command(
    "One HTML page of runs and studies.",
    arg("folders", "FOLDER...", nargs=-1),
    opt(
        "--out FILE", "Where to write it.  [default: FOLDER/report.html; ./report.html for several]"
    ),
    opt("--title TEXT", "Heading of a page of several folders.  [default: Report]"),
    opt("--force", "Overwrite a file that is not such a page.", bool),
)
def report(call: Call) -> None:
    """Make one self-contained HTML page of run folders (`edit`) and study folders (`study`).

    Every fact of a run, to be chosen by what became of it; tables with the best values marked,
    figures drawn again from their numbers, settings and environment. Two runs or more are compared,
    too: on the facts they share, with paired bootstrap intervals, and fact by fact, side by side;
    that comparison is printed. The page needs no network and no scripts; --json prints its numbers,
    too.

    \b
    $ nulledit report run
    $ nulledit report run-a run-b --out compared.html
    """
    from nulledit.runs.compared_facts import parted
    from nulledit.runs.report import check_page, collect, write_report

    folders = [Path(folder) for folder in call.folders]
    alone = len({folder.resolve() for folder in folders}) == 1
    file = Path(call.out or (folders[0] / "report.html" if alone else "report.html"))
    check_page(file, force=call.force, way="give --force")
    call.say(f"Reading {len(folders)} folder{'s' * (len(folders) > 1)}")
    collected = collect(folders)
    write_report(collected, file, title=call.title or "Report", force=call.force)
    compared = [*collected.compared.tables] if collected.compared else []
    if collected.facts and (table := parted(collected.facts)):
        compared.append(table)
    call.show(
        lambda: {"report": str(file), **collected.to_dict()},
        lambda: [*compared, f"Report: {file} ({file.stat().st_size / 1000:.0f} kB)"],
    )
