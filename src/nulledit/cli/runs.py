"""`nulledit edit` and `nulledit retry` at work on one run: what is opened, and what goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nulledit.api.editor import Editor
from nulledit.api.run import Run
from nulledit.cli.common import Bars, convert_once, own_device, say
from nulledit.cli.going_on import Kept, begun, edit_again, retry_again
from nulledit.cli.options import model_source
from nulledit.cli.recipe_options import changed
from nulledit.config import Recipe, load_recipe
from nulledit.data.facts import Fact
from nulledit.editing.call_log import Progress
from nulledit.parallel.ranks import Ranks
from nulledit.runs.limits import Limits, load_limits
from nulledit.runs.pages import Result
from nulledit.runs.talk import Talk


class Terminal(Talk):
    """Notices and progress bars on stderr."""

    def __init__(self, *, quiet: bool):
        """`quiet`: neither."""
        self.quiet = quiet

    def say(self, message: str) -> None:
        """A line about what goes on."""
        say(message, quiet=self.quiet)

    @contextmanager
    def progress(self, prefix: str = "") -> Iterator[Progress]:
        """Bars, one after the other."""
        with Bars(quiet=self.quiet, prefix=prefix) as bars:
            yield bars


def edit(
    facts: Sequence[Fact],
    recipe: Recipe | None,
    given: dict[str, Any],
    ranks: Ranks,
    *,
    quiet: bool,
) -> Result | None:
    """Begin a run (`recipe`) or go on with one (None); None on ranks other than the first."""
    started, folder = time.perf_counter(), Path(given["run"] or given["out"])
    limits = _limits(given)
    if not given["run"] and ranks.from_first(ranks.first and begun(folder, ranks))[0]:
        given = {**given, "run": given["out"]}  # by this very command, before a restart
    run = _opened(folder, recipe, given, ranks, Terminal(quiet=quiet))
    run.seconds["load"] = time.perf_counter() - started
    if given["new_epoch"] and not run.new(facts):
        say("Note: no fact is new, so no epoch is begun", quiet=quiet)
    with Kept(run, partial(edit_again, given, folder)).told():
        return run.edit(
            facts,
            shuffle=not given["no_shuffle"],
            retry=given["retry"],
            old_answers=given["old_answers"],
            evaluate=not given["no_evaluate"],
            text=given["text"],
            limits=limits,
            tasks=given["capability"],
        )


def retry(given: dict[str, Any], *, quiet: bool) -> Result | str:
    """Write what does not hold in a run again; a text says why nothing was written."""
    limits = _limits(given)
    run = Run.open(
        given["run"],
        device=given["device"],
        trust_remote_code=given["trust_remote_code"],
        talk=Terminal(quiet=quiet),
    )
    with Kept(run, retry_again).told():
        return run.retry(
            given["times"], text=given["text"], limits=limits, tasks=given["capability"]
        )


def _limits(given: dict[str, Any]) -> Limits | None:
    """Those of --gate; ConfigError for some that could only fail."""
    limits = load_limits(given["gate"]) if given["gate"] else None
    Run.check(limits, given["capability"])
    return limits


def _opened(
    folder: Path, recipe: Recipe | None, given: dict[str, Any], ranks: Ranks, talk: Terminal
) -> Run:
    """The run that goes on, or one that begins."""
    device, trust = own_device(ranks, given["device"]), given["trust_remote_code"]
    if given["run"]:
        talk.say(f"Loading the model of {folder}")
        run = Run.open(folder, device=device, trust_remote_code=trust, ranks=ranks, talk=talk)
        if given["new_epoch"]:
            run.editor.next_epoch(_epoch_recipe(run.editor, given), statistics=given["stats"])
        return run
    if ranks.first:
        Run.check_fresh(folder)  # before minutes of loading
    talk.say(f"Loading {given['model']}")
    convert_once(given["model"], ranks)
    editor = Editor.from_pretrained(
        model_source(given["model"]),
        recipe=recipe,
        statistics=given["stats"],
        device=device,
        dtype=given["dtype"],
        quantize=given["quantize"] or "",
        seed=given["seed"] or 0,
        trust_remote_code=trust,
        ranks=ranks,
    )
    return Run.create(folder, editor, talk=talk)


def _epoch_recipe(editor: Editor, given: dict[str, Any]) -> Recipe:
    """The recipe of a new epoch: a file's or the run's own, changed by flags."""
    recipe = load_recipe(given["recipe"]) if given["recipe"] else editor.recipe
    return changed(recipe, given)
