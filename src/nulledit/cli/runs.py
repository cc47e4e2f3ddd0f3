"""One run of `nulledit edit`: edit, keep, evaluate base and edited model, write the folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nulledit import __version__
from nulledit.changes import some
from nulledit.cli.common import (
    Bars,
    Interrupted,
    convert_once,
    given_words,
    model_source,
    own_device,
    say,
)
from nulledit.cli.edit import FIXED, OF_EPOCH, changed
from nulledit.cli.measure import (
    Text,
    check_lengths,
    evaluate_both,
    in_other_forms,
    load_run,
    read_text,
)
from nulledit.config import Recipe, load_recipe
from nulledit.data.facts import Fact
from nulledit.distributed import Ranks
from nulledit.editor import Editor, EditReport
from nulledit.errors import CheckFailed, ConfigError, LedgerError, RankError
from nulledit.evaluation.diagnosis import Diagnosis, diagnose
from nulledit.evaluation.forms import form_name, other_system
from nulledit.evaluation.old_answers import disagreements, with_base_answers
from nulledit.evaluation.preservation import Preservation, preservation_report
from nulledit.evaluation.retry import joined, retry_failing
from nulledit.evaluation.runner import Evaluation
from nulledit.evaluation.tasks import read_tasks
from nulledit.files import recover_folder
from nulledit.gates.limits import Limits, Tasks, load_limits
from nulledit.gates.measure import GateReport, check
from nulledit.gates.warn import warnings_of
from nulledit.ledger.entries import Column
from nulledit.ledger.store import Store
from nulledit.methods import find_method
from nulledit.report import run as folder_of
from nulledit.report.holding import headline, legend, reasons
from nulledit.report.ledger import answer_of
from nulledit.report.page import SHOWN, answers_table
from nulledit.report.tables import as_text, preservation_table, rates_table
from nulledit.report.text import count


@dataclass(frozen=True)
class Result:
    """What one run did."""

    folder: Path
    """The run folder."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    lines: list[dict[str, Any]]
    """This run's lines of `results.jsonl`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {"run_folder": str(self.folder), **self.summary, "results": self.lines}


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
    limits = load_limits(given["gate"]) if given["gate"] else None
    if limits:
        _check_tasks(limits, given)
    if not given["run"] and ranks.from_first(ranks.first and _begun(folder, ranks))[0]:
        given = {**given, "run": given["out"]}  # by this very command, before a restart
    device = own_device(ranks, given["device"])
    if given["run"]:
        if ranks.first:
            recover_folder(folder / "model")
        ranks.barrier()
        editor = load_run(
            folder,
            device,
            quiet=quiet,
            trust_remote_code=given["trust_remote_code"],
            ranks=ranks,
        )
        if not editor.history.events:
            raise LedgerError(
                f"{folder}: no batch was finished here; begin again with --out {folder}"
            )
        if given["new_epoch"]:
            editor.next_epoch(epoch_recipe(editor, given), statistics=given["stats"])
    else:
        if ranks.first:
            check_fresh(folder)
        say(f"Loading {given['model']}", quiet=quiet)
        convert_once(given["model"], ranks)
        editor = Editor.from_pretrained(
            model_source(given["model"]),
            recipe=recipe,
            statistics=given["stats"],
            device=device,
            dtype=given["dtype"],
            quantize=given["quantize"] or "",
            seed=given["seed"] or 0,
            trust_remote_code=given["trust_remote_code"],
            ranks=ranks,
        )
    if given["retry"]:
        _check_retry(editor, ranks)
    seconds = {"load": time.perf_counter() - started}
    facts = _new(editor, facts, quiet=quiet)
    if given["old_answers"]:
        say("Asking the base for old answers", quiet=quiet)
        facts = with_base_answers(editor, facts)
    if given["new_epoch"] and not facts:
        say("Note: no fact is new, so no epoch is begun", quiet=quiet)
    text = None
    if not ranks.first:
        _take_part(editor, facts, given, folder, ranks)
        return None
    if not given["no_evaluate"]:
        text = read_text(editor, given["text"])
        check_lengths(editor, facts)
    held = len(editor.history.events)
    created, begins, attached = not folder.exists(), not given["run"], False
    try:
        with ExitStack() as stack:
            if begins:
                Store(folder / "ledger").discard()  # of a run that was killed in its first batch
            if begins and limits is None:
                attached = True
                editor.attach(folder)
            stack.enter_context(editor.writing())
            stack.enter_context(ranks.watched())
            work = partial(_edit, editor, facts, given, seconds, quiet=quiet)
            if limits is None:
                report = work()
            else:
                report = _gated(editor, work, given, limits, text, seconds, quiet=quiet)
                if begins:
                    attached = True
                    editor.attach(folder)
            with _timed(seconds, "save"):
                editor.keep_model(folder)
            return _finish(editor, folder, report, text, seconds, quiet=quiet)
    except KeyboardInterrupt as error:
        kept = _kept_batches(editor, folder, held)
        if attached and not kept:
            _take_back(folder, created)
        if begins and not kept:
            raise Interrupted(
                "interrupted before the first batch was finished: nothing was kept"
            ) from error
        again = _command(given, folder, kept)
        raise Interrupted(f"interrupted: {_kept(kept, folder)}; go on with: {again}") from error
    except RankError as error:
        kept = _kept_batches(editor, folder, held)
        if attached and not kept:
            _take_back(folder, created)
        raise error.advised(_advice(given, kept, folder)) from error
    except Exception:
        kept = _kept_batches(editor, folder, held)
        if attached and not kept:
            _take_back(folder, created)
        elif kept:
            again = _command(given, folder, kept)
            say(f"Note: {_kept(kept, folder)}; go on with: {again}", quiet=False)
        raise


def run_retry(given: dict[str, Any], *, quiet: bool) -> Result | str:
    """Write what does not hold in a run again, inside the limits if there are any.

    A text says why nothing was written. A refusal leaves run and ledger as they were.
    """
    started = time.perf_counter()
    folder = Path(given["run"])
    limits = load_limits(given["gate"]) if given["gate"] else None
    if limits:
        _check_tasks(limits, given)
    recover_folder(folder / "model")
    trust = given["trust_remote_code"]
    editor = load_run(folder, given["device"], quiet=quiet, trust_remote_code=trust)
    seconds = {"load": time.perf_counter() - started}
    text = read_text(editor, given["text"])
    held = len(editor.history.events)

    def work() -> EditReport:
        report = _again(editor, editor.facts, given["times"], quiet=quiet)
        seconds.update(report.seconds)
        return report

    try:
        with editor.writing():
            if limits is None:
                report = work()
            else:
                report = _gated(editor, work, given, limits, text, seconds, quiet=quiet)
            if not report.columns:
                helped = "no retry made more facts hold: the run is as it was"
                return helped if report.notices else "every fact holds: nothing was written"
            with _timed(seconds, "save"):
                editor.keep_model(folder)
            return _finish(editor, folder, report, text, seconds, quiet=quiet)
    except KeyboardInterrupt as error:
        kept = _kept(_kept_batches(editor, folder, held), folder)
        raise Interrupted(f"interrupted: {kept}; `nulledit retry` goes on") from error


def _take_part(
    editor: Editor,
    facts: Sequence[Fact],
    given: dict[str, Any],
    folder: Path,
    ranks: Ranks,
) -> None:
    """What a rank other than 0 does: the same edits, of which it keeps nothing."""
    held = len(editor.history.events)
    try:
        with ranks.watched():
            editor.edit(facts, shuffle=not given["no_shuffle"])
    except RankError as error:
        kept = _kept_batches(editor, folder, held)
        raise error.advised(_advice(given, kept, folder)) from error


def _begun(folder: Path, ranks: Ranks) -> bool:
    """Whether the launcher starts this command anew, and it has finished batches already."""
    store = Store(folder / "ledger")
    return ranks.launch.attempt > 0 and store.exists and store.events() > 0


def _advice(given: dict[str, Any], kept: int, folder: Path) -> str:
    if kept or given["run"]:
        again = _command(given, folder, kept)
        return f"{_kept(kept, folder)}; go on, started as before, with: {again}"
    return "no batch was finished: start the same command again"


def keep(editor: Editor, folder: Path) -> None:
    """Bring the model and the pages of a run to its ledger, after a change that edits nothing.

    The ledger has the change already: an error says so, lest the command be given again.
    """
    last = editor.history.events[-1]
    there = (
        f"the {last.kind} is in the ledger, as event {last.id}; the model and the report of "
        f"{folder} follow with the next change, the model also by `nulledit verify`"
    )
    try:
        _write_derived(editor, folder)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {there}") from error
    except Exception:
        say(f"Note: {there}", quiet=False)
        raise


def _write_derived(editor: Editor, folder: Path) -> None:
    editor.keep_model(folder)
    summary = folder_of.read_json(folder, "summary.json", None)
    if summary is None:
        return
    present = {c.id for c in editor.history.active}
    lines = folder_of.read_lines(folder)
    folder_of.write_run(
        folder,
        recipe=_recipe(editor).to_yaml(),
        environments=folder_of.read_json(folder, "environment.json", []),
        lines=[line | {"active": line["column"] in present} for line in lines],
        summary=summary | _state(editor),
    )


def _recipe(editor: Editor) -> Recipe:
    """Of the current epoch, whatever is to come next; before the first, of the one to open."""
    epochs = editor.history.epochs
    return Recipe.recorded(epochs[-1].recipe) if epochs else editor.recipe


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
    limits: Limits,
    text: Text | None,
    seconds: dict[str, float],
    *,
    quiet: bool,
) -> EditReport:
    """Do the `work` in memory; kept if the limits hold, else Refused."""
    windows = None
    if limits.needs("text"):
        windows = (text or read_text(editor, given["text"])).windows
    with editor.trial() as trial:
        report = work()
        say(f"Checking the edited model against {given['gate']}", quiet=quiet)
        with _timed(seconds, "gate"), Bars(quiet=quiet, prefix="gate: ") as bars:
            tasks = given["capability"]
            found = check(editor, limits, windows=windows, tasks=tasks, progress=bars)
        if not found.passed:
            raise Refused(found, given["run"] or given["out"])
        trial.keep()
    return report


def _check_retry(editor: Editor, ranks: Ranks) -> None:
    """Refuse what can't be written again, before anything is edited."""
    if not ranks.alone:
        raise ConfigError(
            "--retry works in one process: leave it out here, then call `nulledit retry RUN`"
        )
    method = find_method(editor.recipe.method.name)
    if method.by_gradient:
        raise ConfigError(f"--retry makes values stronger, and {method.name} optimises none")


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


def check_fresh(folder: Path) -> None:
    """Raise LedgerError unless a run may begin in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise LedgerError(f"{folder}: is a file; choose another --out")
    if not folder.exists() or not any(folder.iterdir()):
        return
    store = Store(folder / "ledger")
    alone = {p.name for p in folder.iterdir()} == {"ledger"}
    if alone and store.unfinished:
        return  # killed while it was made
    if not store.exists:
        raise LedgerError(f"{folder}: is not empty; choose another --out")
    if alone and not store.load().events:
        return  # killed before its first batch was finished
    raise LedgerError(
        f"{folder}: holds a run already; go on by --continue {folder}, or choose another --out"
    )


def as_page(result: Result) -> str:
    """What `edit` prints."""
    last = result.summary["runs"][-1]
    parts = []
    if result.lines:
        parts.append(as_text(answers_table(result.lines), left=5, most=38))
        if len(result.lines) > SHOWN:
            more = len(result.lines) - SHOWN
            parts.append(f"and {more} more in {result.folder / 'results.jsonl'}")
        parts += _holding(result)
    if last["after"]:
        parts.append(as_text(rates_table({"before": last["before"], "after": last["after"]})))
    for name, sides in last.get("others", {}).items():
        parts.append(f"Above: asked {last['asked']}, as edited. Asked {name}:")
        parts.append(as_text(rates_table(sides)))
    if last["layers"]:
        parts.append(as_text(preservation_table(last["layers"])))
    if last["text"]:
        parts.append(f"Perplexity, KL and ‖ΔK₀‖ are on {last['text']}.")
    spent = ", ".join(f"{stage} {value:.1f}" for stage, value in last["seconds"].items())
    place = shlex.quote(str(result.folder))
    parts.append(
        f"{count(last['facts'], 'fact')} in this run. Seconds: {spent}.\n"
        f"Report: {result.folder / 'report.md'}\n"
        f"Model:  {_place_of_model(result)}\n"
        f'Next:   nulledit ask {place} "..."\n'
        f"        nulledit edit MORE --continue {place}"
    )
    return "\n\n".join(parts)


def _holding(result: Result) -> list[str]:
    """How many facts hold, why the others don't, and what the marks mean."""
    told = reasons(result.lines, shlex.quote(str(result.folder)))
    parts = [headline(result.lines), *(f"  {fact}: {why}" for fact, why in told[:SHOWN])]
    if len(told) > SHOWN:
        parts.append(f"  and {len(told) - SHOWN} more in {result.folder / 'results.jsonl'}")
    said = legend(result.lines[:SHOWN])
    return [part for part in ("\n".join(filter(None, parts)), said) if part]


def _place_of_model(result: Result) -> str:
    base = result.summary.get("base", {})
    if base.get("quantized"):
        return f"{base['model'] or 'the base'} with the ledger; nulledit export writes the edits"
    return str(result.folder / "model")


def _edit(
    editor: Editor,
    facts: Sequence[Fact],
    given: dict[str, Any],
    seconds: dict[str, float],
    *,
    quiet: bool,
) -> EditReport:
    batches = count(-(-len(facts) // editor.recipe.batch_size), "batch")
    if facts:
        say(f"Editing {count(len(facts), 'fact')} in {batches}", quiet=quiet)
    with Bars(quiet=quiet) as bars:
        report = editor.edit(facts, shuffle=not given["no_shuffle"], progress=bars)
    if given["retry"]:
        report = joined(report, _again(editor, facts, given["retry"], quiet=quiet))
    seconds |= report.seconds
    return report


def _again(editor: Editor, facts: Sequence[Fact], times: int, *, quiet: bool) -> EditReport:
    with Bars(quiet=quiet) as bars:
        report = retry_failing(editor, facts, times, progress=bars)
    for notice in report.notices:
        say(f"Note: {notice}", quiet=quiet)
    return report


def _finish(
    editor: Editor,
    folder: Path,
    report: EditReport,
    text: Text | None,
    seconds: dict[str, float],
    *,
    quiet: bool,
) -> Result:
    """Evaluate what has no line in `results.jsonl` yet, and write the folder."""
    present = {c.id for c in editor.history.active}
    earlier = [
        line | {"active": line["column"] in present} for line in folder_of.read_lines(folder)
    ]
    told = {line["column"] for line in earlier}
    columns = [c for c in editor.history.present if c.id not in told]
    runs = folder_of.read_json(folder, "summary.json", {"runs": []})["runs"]
    number = len(runs) + 1
    before = after = None
    kept: dict[int, Preservation] = {}
    others: dict[str, dict[str, Any]] = {}
    if text and columns:
        facts = count(len(columns), "fact")
        say(f"Evaluating {facts} on the base and the edited model", quiet=quiet)
        with _timed(seconds, "evaluation"):
            before, after = evaluate_both(editor, [c.fact for c in columns], text, quiet=quiet)
            kept = {p.layer: p for p in preservation_report(editor, text.windows)}
            other = other_system(editor.encoder)
            asked = {form_name(other): other} if other else {}
            others = in_other_forms(editor, [c.fact for c in columns], asked, quiet=quiet)
    warnings = warnings_of(report.layers)
    for warning in warnings:
        say(f"Warning: {warning}", quiet=quiet)
    if answers := _replaced(editor, columns):
        say(f"Note: {answers}", quiet=quiet)
    notices = disagreements([c.fact for c in columns], before) if before else []
    for notice in notices:
        say(f"Note: {notice}", quiet=quiet)
    found = diagnose(editor, [c.fact for c in columns], after, before=before) if after else ()
    lines = _lines(columns, number, before, after, found)
    batches = sorted({c.batch for c in columns})
    layers = [asdict(r) | _error(kept.get(r.layer)) for r in report.layers]
    runs.append(
        {
            "run": number,
            "time": folder_of.now(),
            "facts": len(columns),
            "known": _known(columns),
            "batches": [batches[0], batches[-1]] if batches else [],
            "before": before.summary() if before else None,
            "after": after.summary() if after else None,
            "text": text.name if text and after else None,
            **({"asked": form_name(editor.encoder), "others": others} if others else {}),
            "layers": layers,
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "notices": [*report.notices, *notices, *warnings],
        }
    )
    summary = {**_state(editor), "runs": runs}
    environments = folder_of.read_json(folder, "environment.json", [])
    folder_of.write_run(
        folder,
        recipe=_recipe(editor).to_yaml(),
        environments=[*environments, {"run": number, **folder_of.environment(editor)}],
        lines=[*earlier, *lines],
        summary=summary,
    )
    return Result(folder, summary, lines)


def _replaced(editor: Editor, columns: Sequence[Column]) -> str:
    """One line on the answers of earlier edits that `columns` took the place of; empty for none."""
    by_id = {c.id: c.fact for c in editor.history.columns}
    answers = {
        (new.id, answer_of(old), answer_of(new))
        for old, new in ((by_id.get(c.replaces), c.fact) for c in columns)
        if old is not None and old.demand != new.demand
    }
    if not answers:
        return ""
    told = some((f"{i}: {old!r} -> {new!r}" for i, old, new in sorted(answers)), most=3)
    return f"{count(len(answers), 'earlier answer')} replaced ({told})"


def _state(editor: Editor) -> dict[str, Any]:
    return {
        "version": __version__,
        "state": editor.history.state_id,
        "base": asdict(editor.history.base),
        "facts": len(editor.facts),
        "batches": len(editor.history.batches),
    }


def _known(columns: Sequence[Column]) -> int | None:
    """How many facts the model said before; None where the method never asked it."""
    told = [c.outcome["known"] for c in columns]
    return None if None in told else sum(told)


def _error(kept: Preservation | None) -> dict[str, Any]:
    if kept is None:
        return {"error": None, "error_standard_error": None, "windows": None}
    return {
        "error": kept.error,
        "error_standard_error": kept.standard_error,
        "windows": kept.n,
    }


def _lines(
    columns: Sequence[Column],
    number: int,
    before: Evaluation | None,
    after: Evaluation | None,
    found: Sequence[Diagnosis],
) -> list[dict[str, Any]]:
    if before is None or after is None:
        return [folder_of.fact_line(c, number, None, None, says_target=None) for c in columns]
    then, now = before.rows(), after.rows()
    why = {diagnosis.fact_id: diagnosis.to_dict() for diagnosis in found}
    return [
        folder_of.fact_line(
            column,
            number,
            then[column.fact.id],
            now[column.fact.id],
            says_target=after.says_target.get(column.fact.id),
            diagnosis=why.get(column.fact.id),
        )
        for column in columns
    ]


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


def _take_back(folder: Path, created: bool) -> None:
    """Remove what a run made that has kept no batch; not what another one is making there."""
    with suppress(LedgerError):
        Store(folder / "ledger").discard()
    if created and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _kept_batches(editor: Editor, folder: Path, held: int) -> int:
    """How many batches this call has committed; with a gate none is before the end."""
    there = Store(folder / "ledger").exists
    return len(editor.history.events) - held if there else 0


def _kept(batches: int, folder: Path) -> str:
    return f"{count(batches, 'finished batch')} {'is' if batches == 1 else 'are'} kept in {folder}"


def _command(given: dict[str, Any], folder: Path, kept: int) -> str:
    """What goes on after `kept` batches of this call: the same command again.

    Without what the ledger has by then: model and seed, and what the first batch of an epoch fixes.
    """
    begun = kept > 0 or not given["new_epoch"]
    known = {*FIXED, "run", *(("new_epoch", *OF_EPOCH) if begun else ())}
    words = [*given_words(without=known), "--continue", str(folder)]
    return shlex.join(["nulledit", "edit", *words])


class _timed:
    """Adds the wall seconds inside to `seconds[stage]`."""

    def __init__(self, seconds: dict[str, float], stage: str):
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.start
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + spent
