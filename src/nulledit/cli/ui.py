"""`nulledit ui`: a local web page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nulledit.cli.command import Call, command
from nulledit.cli.options import MODEL, STATS, arg, given_options, opt
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.api.run import Run
    from nulledit.runs.talk import Talk

NEEDS = ("starlette", "uvicorn", "python_multipart")
"""Packages of the extra `ui`."""


@command(
    "A local web page: look, try, edit, undo.",
    arg("run", "RUN|MODEL"),
    opt(
        "--port N", "Where it is served.  [default: any that is free]", click.IntRange(0, 65535), 0
    ),
    "Of a model without a run:",
    opt("--out RUN", "Folder to make for its run.", fixed="run"),
    opt("--recipe FILE|NAME", "See nulledit info for names.  [default: the model's]", fixed="run"),
    STATS,
    "Model:",
    MODEL,
)
def ui(call: Call) -> None:
    """Show RUN in a browser: its facts and their stories, base and edited answers side by side,
    edits with a preview, undo and redo, limits, and the commands that hand it over.

    A model's name in the place of RUN, with --out, begins an empty run.

    The page is served to this machine alone, under an address with a secret token, which is
    printed; Ctrl-C ends it. It needs no network: pip install "nulledit[ui]".

    \b
    $ nulledit ui run
    $ nulledit ui smollm2-135m --out run
    """
    there = _is_run(Path(call.run))
    _check(call, there)
    call.prepare()
    from nulledit.ui.serve import serve

    folder = Path(call.run if there else call.out)

    def opened(talk: Talk) -> Run:
        from nulledit.api.run import Run

        if (folder / "ledger" / "ledger.db").is_file():
            return call.open(folder, writing=True, talk=talk)
        return Run.create(folder, call.editor(call.run, recipe=call.recipe), talk=talk)

    serve(
        folder,
        opened,
        name=folder.resolve().name,
        port=call.port,
        ready=lambda address: call.show(
            {"run_folder": str(folder), "address": address},
            f"Open {address}\nCtrl-C ends it.",
        ),
    )


def _is_run(folder: Path) -> bool:
    """Whether a run is named, not a model; ConfigError for a folder that is neither."""
    if (folder / "ledger").is_dir():
        return True
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: neither a run nor a model (expected {folder / 'ledger'}, or "
            f"{folder / 'config.json'}); give a run's folder, or MODEL --out RUN"
        )
    return False


def _check(call: Call, there: bool) -> None:
    """Packages and options, before anything is loaded."""
    from importlib.util import find_spec

    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise ConfigError(
            f'{", ".join(missing)} not installed: the page needs pip install "nulledit[ui]"'
        )
    if there:
        if refused := [option.flag for option in given_options() if option.fixed]:
            raise ConfigError(
                f"{', '.join(refused)} can't be given with a run: model and recipe are those of "
                f"{call.run}"
            )
        if not (Path(call.run) / "ledger" / "ledger.db").is_file():
            raise ConfigError(f"{call.run}: no run here; give a run's folder, or MODEL --out RUN")
        return
    if not call.out:
        raise ConfigError(
            f"{call.run}: no run is there; if it is a model, give --out RUN, a folder to make for "
            "its run"
        )
    from nulledit.api.run import Run
    from nulledit.config import read_recipe
    from nulledit.ledger.store import Store
    from nulledit.statistics.found import check_there

    store = Store(Path(call.out) / "ledger")
    if store.exists and store.events():
        raise ConfigError(f"{call.out}: is a run already; show it by: nulledit ui {call.out}")
    Run.check_fresh(call.out)
    read_recipe(call.recipe, call.run)
    if call.stats:
        check_there(call.stats)
