"""`nulledit edit`: facts into a model, batch after batch."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nulledit.cli.command import Call, command
from nulledit.cli.common import convert_once, meet, meet_early, own_device
from nulledit.cli.options import (
    FACTS,
    FORMS,
    GATE,
    MODEL,
    SKIP,
    STATS,
    arg,
    changed,
    given_options,
    least,
    model_source,
    opt,
    parse_layers,
    parse_null_space,
    seed,
)
from nulledit.errors import ConfigError, RankError

if TYPE_CHECKING:
    from nulledit.api.run import Run
    from nulledit.config import Recipe
    from nulledit.data.readers import FactFile
    from nulledit.parallel.ranks import Ranks
    from nulledit.runs.limits import Limits
    from nulledit.runs.pages import Result


@command(
    "Write facts into a model, or more facts into a run.",
    arg("facts", "FACTS"),
    "Model and run:",
    opt("--model MODEL", "smollm2-135m, a local folder, a GGUF file or a Hub id.", fixed="run"),
    opt("--out RUN", "Folder to make for the run.", fixed="run"),
    opt("--continue RUN", "Write more facts into this run.", name="run"),
    opt(
        "--new-epoch",
        "With --continue: another recipe or statistics from here on.",
        bool,
        fixed="epoch",
    ),
    MODEL,
    opt(
        "--retry N",
        "Write what does not hold again, up to N times, each time stronger.  [default: 0]",
        least(0),
        0,
    ),
    opt("--dry-run", "Estimate time and memory; edit nothing.", bool, fixed="run"),
    "Facts:",
    FACTS,
    SKIP,
    opt(
        "--old-answers", "Take what the base says as the old answer of facts that name none.", bool
    ),
    opt("--no-shuffle", "Keep the file's order over several batches.", bool),
    seed("Of contexts and of the order of facts.  [default: 0]", None, fixed="run"),
    "Recipe:",
    opt(
        "--recipe FILE|NAME", "See nulledit info for names.  [default: the model's]", fixed="epoch"
    ),
    STATS,
    opt("--batch-size N", "Facts solved together.", int, field="batch_size"),
    opt(
        "--batching",
        "What makes a batch: facts in the seed's order, or those with like keys.",
        ("order", "keys"),
        field="batching",
    ),
    opt("--method NAME", "See nulledit methods.", field="method.name"),
    opt(
        "--project",
        "Null-space projection: as published, off, within the solve, or of the finished update.",
        ("own", "none", "inside", "after"),
        field="method.projection",
    ),
    opt(
        "--learning-rate X",
        "Adam's step size for values.",
        float,
        field="values.learning_rate",
    ),
    opt(
        "--steps N",
        "Forward passes per fact and round (values.rounds), at most.",
        int,
        field="values.steps",
    ),
    opt("--clamp X", "Largest ‖δ‖/‖h‖.", float, field="values.clamp"),
    opt(
        "--relation-weight X",
        "How firmly other facts of a subject are held, such as 4.  [default: 0, not at all]",
        float,
        field="values.relation_weight",
    ),
    opt(
        "--rewordings N",
        "Other wordings of each prompt in values, such as 6: more paraphrases hold, in more time.",
        int,
        field="values.rewordings",
    ),
    opt("--l2 X", "Ridge on the update.", float, field="method.l2"),
    opt(
        "--layers LIST",
        "Edited layers, as 4,5,6 or 4-8, from 0; gated edits take the last.",
        field="layers",
        read=parse_layers,
    ),
    opt(
        "--null-space RULE=VALUE",
        "absolute=0.02, leakage=0.1, median=1.",
        field="null_space",
        read=parse_null_space,
    ),
    FORMS,
    opt(
        "--set FIELD=VALUE",
        "Any other field of a recipe, such as values.kl_weight=0; repeatable.",
        name="changes",
        multiple=True,
        fixed="epoch",
    ),
    "Evaluation:",
    opt(
        "--text FILE",
        "Text for perplexity, KL and preservation.  [default: one that comes with nulledit]",
    ),
    opt("--no-evaluate", "Edit only.", bool),
    GATE,
)
def edit(call: Call) -> None:
    """Write the facts of a file into a model.

    FACTS is YAML, JSON, JSON lines or CSV, of nulledit's own records or CounterFact's, EasyEdit's
    or zsRE's (see `nulledit facts check`). The run folder gets the edited model (RUN/model, an
    ordinary Hugging Face folder), the ledger and a report of what changed and what did not.

    A recipe decides what an edit computes; the options under Recipe change single fields of it.

    Every batch is kept as it ends: after an interruption, go on with --continue, which takes model,
    recipe and statistics from the run's ledger. With --gate all is kept at the end, or nothing.
    Started by torchrun, several processes share the facts of each batch.

    \b
    $ nulledit edit facts.yaml --model smollm2-135m --out run
    $ nulledit edit more.yaml --continue run
    $ nulledit edit facts.yaml --model smollm2-135m --method alphaedit --out other-run
    $ nulledit edit more.yaml --continue run --gate default
    $ torchrun --nproc-per-node 8 -m nulledit edit facts.yaml --model gpt2 --out run
    """
    meet_early(call.device)
    _check(call)
    found = call.read_facts(call.facts)
    call.prepare()
    recipe = None if call.run else changed(call.own_recipe(call.recipe, call.model), call.given)
    ranks = meet(call.device)
    from nulledit.cli.run_page import refusal_shown, show
    from nulledit.evaluation.retry import check_retry

    if call.retry and recipe:
        check_retry(recipe, ranks)
    if call.dry_run and recipe:
        return _estimate(call, found, recipe) if ranks.first else None
    try:
        with ranks.watched(), refusal_shown(call):
            result = _edited(call, found, recipe, ranks)
    except RankError as error:  # before the first batch began
        raise error.advised("start the same command again") from error
    if result:
        show(call, result)
    return None


def _check(call: Call) -> None:
    """Options that belong together, before anything is read."""
    given = given_options()
    if call.run:
        refused = [option.flag for option in given if option.fixed == "run"]
        if refused:
            raise ConfigError(
                f"{', '.join(refused)} can't be given with --continue: model and seed are those of "
                f"{call.run}"
            )
        refused = [o.flag for o in given if o.fixed == "epoch" and o.name != "new_epoch"]
        if refused and not call.new_epoch:
            raise ConfigError(
                f"{', '.join(refused)} can't be given with --continue: recipe and statistics are "
                f"those of {call.run}; add --new-epoch to change them from here on"
            )
        if call.new_epoch and not refused:
            raise ConfigError(
                "--new-epoch changes nothing: give another --recipe, --method, --stats or setting"
            )
        return
    if call.new_epoch:
        raise ConfigError("--new-epoch belongs to --continue RUN")
    if not call.model:
        raise ConfigError("give --model MODEL and --out RUN, or --continue RUN")
    if not call.out and not call.dry_run:
        raise ConfigError("give --out RUN, a folder to make for the run")
    if call.text and not Path(call.text).exists():
        raise ConfigError(f"{call.text}: no such file")


def _estimate(call: Call, found: FactFile, recipe: Recipe) -> None:
    """Show what the edit would take."""
    from nulledit.evaluation.costs import estimate_edit
    from nulledit.io.text import count
    from nulledit.report.document import StudyTable

    size = estimate_edit(
        model_source(call.model),
        found.facts,
        recipe,
        device=call.device,
        dtype=call.dtype,
        trust_remote_code=call.trust_remote_code,
        retries=call.retry,
        old_answers=call.old_answers,
        evaluate=not call.no_evaluate,
        text=call.text,
    )
    cells = [[stage, f"{value:.1f}"] for stage, value in size["seconds"].items()]
    cells.append(["in all (at most)", f"{size['seconds_in_all']:.1f}"])
    line = (
        f"{count(size['facts'], 'fact')} in {count(size['batches'], 'batch')}, layers "
        f"{', '.join(map(str, size['layers']))}; {count(size['rows'], 'row')} with "
        f"{size['tokens']} tokens; {size['gflops']} GFLOP/s measured"
    )
    low, high = size["seconds_usual"]
    close = (
        f"Usually {low:.0f} to {high:.0f} s, as values end once they hold. Peak memory: about "
        f"{size['peak_bytes'] / 1e9:.1f} GB. Nothing was edited; whether there are statistics was "
        "not looked up."
    )
    call.show(size, lambda: [line, StudyTable.of("cost", "", ["stage", "seconds"], cells), close])


def _edited(call: Call, found: FactFile, recipe: Recipe | None, ranks: Ranks) -> Result | None:
    """Begin a run (`recipe`) or go on with one (None); None on ranks other than the first."""
    from nulledit.cli.going_on import begun, edit_again, followed

    started, folder = time.perf_counter(), Path(call.run or call.out)
    limits = limits_of(call)
    if not call.run and ranks.from_first(ranks.first and begun(folder, ranks))[0]:
        call.given["run"] = call.out  # by this very command, before a restart
    run = _opened(call, folder, recipe, ranks)
    run.seconds["load"] = time.perf_counter() - started
    if call.new_epoch and not run.new(found.facts):
        call.say("Note: no fact is new, so no epoch is begun")
    with followed(run, partial(edit_again, folder)):
        return run.edit(
            found.facts,
            shuffle=not call.no_shuffle,
            retry=call.retry,
            old_answers=call.old_answers,
            evaluate=not call.no_evaluate,
            text=call.text,
            limits=limits,
            tasks=call.capability,
        )


def limits_of(call: Call) -> Limits | None:
    """Those of --gate; ConfigError for some that could only fail."""
    from nulledit.runs.gate import check_tasks
    from nulledit.runs.limits import load_limits

    limits = load_limits(call.gate) if call.gate else None
    check_tasks(limits, call.capability)
    return limits


def _opened(call: Call, folder: Path, recipe: Recipe | None, ranks: Ranks) -> Run:
    """The run that goes on, or one that begins."""
    from nulledit.api.run import Run
    from nulledit.config import load_recipe

    if call.run:
        run = call.open(writing=True, ranks=ranks)
        if call.new_epoch:
            own = load_recipe(call.recipe) if call.recipe else run.editor.recipe
            run.editor.next_epoch(changed(own, call.given), statistics=call.stats)
        return run
    if ranks.first:
        Run.check_fresh(folder)  # before minutes of loading
    convert_once(call.model, ranks)
    device = own_device(ranks, call.device)
    editor = call.editor(call.model, recipe=recipe, device=device, ranks=ranks)
    if recipe and recipe.chat and recipe.chat.optional and editor.recipe.chat:
        call.say(
            "Note: facts are written in the model's chat template and as plain text; --plain for "
            "plain text alone, in less time"
        )
    return Run.create(folder, editor, talk=call.talk)
