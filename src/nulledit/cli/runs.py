"""`nulledit edit` and `nulledit retry` at work on one run: edit, try again, hold to the gates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from nulledit.cli.common import Bars, convert_once, own_device, say
from nulledit.cli.going_on import Kept, begun, edit_again, retry_again
from nulledit.cli.measure import Text, check_lengths, load_run, read_text
from nulledit.cli.options import model_source
from nulledit.cli.recipe_options import changed
from nulledit.cli.run_folder import Result, check_fresh, check_pages, finish, is_current, timed
from nulledit.config import Recipe, load_recipe
from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor, EditReport
from nulledit.errors import CheckFailed, ConfigError, LedgerError, RankError
from nulledit.evaluation.old_answers import with_base_answers
from nulledit.evaluation.retry import joined, retry_failing
from nulledit.evaluation.tasks import read_tasks
from nulledit.io.files import recover_folder
from nulledit.io.text import count
from nulledit.ledger.store import Store
from nulledit.methods import find_method
from nulledit.parallel.ranks import Ranks
from nulledit.runs.gate import GateReport, check
from nulledit.runs.limits import Limits, Tasks, load_limits


def run(
    facts: Sequence[Fact],
    recipe: Recipe | None,
    given: dict[str, Any],
    ranks: Ranks,
    *,
    quiet: bool,
) -> Result | None:
    """Begin a run (`recipe`) or go on with one (None). The ledger commits first, batch by batch.

    Of several ranks, rank 0 keeps the run; the others take part in its edits, and get None.
    """
    started = time.perf_counter()
    folder = Path(given["run"] or given["out"])
    limits = _limits(given)
    if not given["run"] and ranks.from_first(ranks.first and begun(folder, ranks))[0]:
        given = {**given, "run": given["out"]}  # by this very command, before a restart
    editor = _opened(folder, recipe, given, ranks, quiet=quiet)
    if given["retry"]:
        check_retry(editor.recipe, ranks)
    seconds = {"load": time.perf_counter() - started}
    asked, facts = {f.key for f in facts}, _new(editor, facts, quiet=quiet)
    if not given["no_evaluate"]:
        check_lengths(editor, facts)
    if given["old_answers"]:
        say("Asking the base for old answers", quiet=quiet)
        facts = with_base_answers(editor, facts)
        if not given["no_evaluate"]:
            check_lengths(editor, facts)
    if given["new_epoch"] and not facts:
        say("Note: no fact is new, so no epoch is begun", quiet=quiet)
    begins = not given["run"]
    kept = Kept(editor, folder, partial(edit_again, given, folder), begins=begins)
    if not ranks.first:
        _take_part(editor, facts, given, kept, ranks)
        return None
    text = None
    if not given["no_evaluate"]:
        text = read_text(editor, given["text"])
    with kept.told(), ExitStack() as stack:
        if begins:
            Store(folder / "ledger").discard()  # of a run that was killed in its first batch
            if limits is None:
                kept.attach()
        stack.enter_context(editor.writing())
        stack.enter_context(ranks.watched())
        work = partial(_edit, editor, facts, asked, given, seconds, quiet=quiet)
        report = _gated(editor, work, given, limits, text, seconds, quiet=quiet)
        if begins and limits is not None:
            kept.attach()
        return _saved(editor, folder, report, text, seconds, quiet=quiet)


def run_retry(given: dict[str, Any], *, quiet: bool) -> Result | str:
    """Write what does not hold in a run again, inside the limits if there are any.

    A text says why nothing was written. A refusal leaves run and ledger as they were.
    """
    started = time.perf_counter()
    folder = Path(given["run"])
    limits = _limits(given)
    check_pages(folder)
    recover_folder(folder / "model")
    trust = given["trust_remote_code"]
    editor = load_run(folder, given["device"], quiet=quiet, trust_remote_code=trust)
    _check_values(editor.recipe)
    seconds = {"load": time.perf_counter() - started}
    text = read_text(editor, given["text"])
    kept = Kept(editor, folder, retry_again)

    def work() -> EditReport:
        report = _again(editor, editor.facts, given["times"], quiet=quiet)
        seconds.update(report.seconds)
        return report

    with kept.told(), editor.writing():
        report = _gated(editor, work, given, limits, text, seconds, quiet=quiet)
        if not report.columns and is_current(editor, folder):
            return _nothing_written(editor, report)
        return _saved(editor, folder, report, text, seconds, quiet=quiet)


def _nothing_written(editor: Editor, report: EditReport) -> str:
    """Why a retry left the run as it was."""
    if all(fact.forget for fact in editor.facts):
        return "no fact in the model has an answer to write: nothing was written"
    if report.notices:
        return "no retry made more facts hold: the run is as it was"
    return "every fact holds: nothing was written"


def _limits(given: dict[str, Any]) -> Limits | None:
    """Those of --gate; ConfigError for some that could only fail."""
    if not given["gate"]:
        return None
    limits = load_limits(given["gate"])
    _check_tasks(limits, given)
    return limits


def _opened(
    folder: Path,
    recipe: Recipe | None,
    given: dict[str, Any],
    ranks: Ranks,
    *,
    quiet: bool,
) -> Editor:
    """The editor of the run that goes on, or of one that begins."""
    device, trust = own_device(ranks, given["device"]), given["trust_remote_code"]
    if given["run"]:
        if ranks.first:
            check_pages(folder)
            recover_folder(folder / "model")
        ranks.barrier()
        editor = load_run(folder, device, quiet=quiet, trust_remote_code=trust, ranks=ranks)
        if not editor.history.events:
            raise LedgerError(
                f"{folder}: no batch was finished here; begin again with --out {folder}"
            )
        if given["new_epoch"]:
            editor.next_epoch(epoch_recipe(editor, given), statistics=given["stats"])
        return editor
    if ranks.first:
        check_fresh(folder)
    say(f"Loading {given['model']}", quiet=quiet)
    convert_once(given["model"], ranks)
    return Editor.from_pretrained(
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


def _take_part(
    editor: Editor, facts: Sequence[Fact], given: dict[str, Any], kept: Kept, ranks: Ranks
) -> None:
    """What a rank other than 0 does: the same edits, of which it keeps nothing."""
    try:
        with ranks.watched():
            editor.edit(facts, shuffle=not given["no_shuffle"])
    except RankError as error:
        raise error.advised(kept.advice()) from error


def _saved(
    editor: Editor,
    folder: Path,
    report: EditReport,
    text: Text | None,
    seconds: dict[str, float],
    *,
    quiet: bool,
) -> Result:
    """Bring the run's model and its pages to the ledger."""
    with timed(seconds, "save"):
        editor.keep_model(folder)
    return finish(editor, folder, report, text, seconds, quiet=quiet)


def epoch_recipe(editor: Editor, given: dict[str, Any]) -> Recipe:
    """The recipe of a new epoch: a file's or the run's own, changed by flags."""
    recipe = load_recipe(given["recipe"]) if given["recipe"] else editor.recipe
    return changed(recipe, given)


class Refused(CheckFailed):
    """A gate said no; nothing was written."""

    def __init__(self, report: GateReport, name: str):
        """`report`: what it found on `name`."""
        broken = ", ".join(report.failed)
        super().__init__(
            f"{name}: {broken} failed; no model was written and the ledger is as before"
        )
        self.report = report


def _gated(
    editor: Editor,
    work: Callable[[], EditReport],
    given: dict[str, Any],
    limits: Limits | None,
    text: Text | None,
    seconds: dict[str, float],
    *,
    quiet: bool,
) -> EditReport:
    """Do the `work`; with limits in memory first, and kept if they hold, else Refused."""
    if limits is None:
        return work()
    windows = None
    if limits.needs("text"):
        windows = (text or read_text(editor, given["text"])).windows
    with editor.trial() as trial:
        report = work()
        say(f"Checking the edited model against {given['gate']}", quiet=quiet)
        with timed(seconds, "gate"), Bars(quiet=quiet, prefix="gate: ") as bars:
            tasks = given["capability"]
            found = check(editor, limits, windows=windows, tasks=tasks, progress=bars)
        if not found.passed:
            raise Refused(found, given["run"] or given["out"])
        trial.keep()
    return report


def check_retry(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what can't be written again, before anything is edited."""
    if not ranks.alone:
        raise ConfigError(
            "--retry works in one process: leave it out here, then call `nulledit retry RUN`"
        )
    _check_values(recipe)


def _check_values(recipe: Recipe) -> None:
    method = find_method(recipe.method.name)
    if method.by_gradient:
        raise ConfigError(f"a retry makes values stronger, and {method.name} optimises none")


def _check_tasks(limits: Limits, given: dict[str, Any]) -> None:
    """Refuse limits on tasks that could only fail, before hours are spent on edits."""
    for name, bound in limits.bounds.items():
        if not isinstance(bound, Tasks) or bound.optional:
            continue
        if not given["capability"]:
            raise ConfigError(
                f"{given['gate']}: {name} needs the tasks' files: give --capability DIR, or call "
                "it optional"
            )
        read_tasks(given["capability"], names=bound.tasks, limit=bound.items)


def _edit(
    editor: Editor,
    facts: Sequence[Fact],
    asked: Set[tuple[str, str]],
    given: dict[str, Any],
    seconds: dict[str, float],
    *,
    quiet: bool,
) -> EditReport:
    """Write `facts`, then again what does not hold of those with a key in `asked`."""
    batches = count(-(-len(facts) // editor.recipe.batch_size), "batch")
    if facts:
        say(f"Editing {count(len(facts), 'fact')} in {batches}", quiet=quiet)
    with Bars(quiet=quiet) as bars:
        report = editor.edit(facts, shuffle=not given["no_shuffle"], progress=bars)
    if given["retry"]:
        there = [f for f in editor.facts if f.key in asked]  # some since before an interruption
        report = joined(report, _again(editor, there, given["retry"], quiet=quiet))
    seconds |= report.seconds
    return report


def _again(editor: Editor, facts: Sequence[Fact], times: int, *, quiet: bool) -> EditReport:
    with Bars(quiet=quiet) as bars:
        report = retry_failing(editor, facts, times, progress=bars)
    for notice in report.notices:
        say(f"Note: {notice}", quiet=quiet)
    return report


def _new(editor: Editor, facts: Sequence[Fact], *, quiet: bool) -> list[Fact]:
    """Those of `facts` that are not in the model yet."""
    held = {f.key: f for f in editor.facts}

    def there(fact: Fact) -> bool:
        known = held.get(fact.key)
        if known is None or known.demand != fact.demand:
            return False
        return set(fact.prompts) <= set(known.prompts)

    new = [f for f in facts if not there(f)]
    if len(new) < len(facts):
        say(
            f"Note: {len(facts) - len(new)} of {len(facts)} facts are in the model already",
            quiet=quiet,
        )
    return new
