"""`nulledit edit`: facts into a model, batch after batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from nulledit.cli.common import echo, emit, facts_of, meet, meet_early, prepare
from nulledit.cli.options import (
    MODEL_OPTIONS,
    Sectioned,
    chat_options,
    facts_options,
    gate_options,
    model_options,
    model_source,
    named,
    output_options,
    seed_option,
    skip_option,
)
from nulledit.cli.recipe_options import FIELDS, FIXED, OF_EPOCH, make_recipe
from nulledit.errors import ConfigError, RankError
from nulledit.parallel.launch import Launch

if TYPE_CHECKING:
    pass


class _Edit(Sectioned):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Model and run": (
            *("model", "out", "run", "new_epoch", *MODEL_OPTIONS),
            *("retry", "dry_run"),
        ),
        "Facts": ("limit", "skip", "on_conflict", "skip_bad", "old_answers", "no_shuffle", "seed"),
        "Recipe": ("recipe", "stats", *FIELDS, "layers", "null_space", "chat", "system", "changes"),
        "Evaluation": ("text", "no_evaluate", "gate", "capability"),
    }


@click.command(cls=_Edit, short_help="Write facts into a model.")
@click.argument("facts", metavar="FACTS")
@click.option("--model", metavar="MODEL", help="smollm2-135m, a local folder or a Hub id.")
@click.option("--out", metavar="RUN", help="Folder to make for the run.")
@click.option("--continue", "run", metavar="RUN", help="Write more facts into this run.")
@click.option(
    "--new-epoch", is_flag=True, help="With --continue: another recipe or statistics from here on."
)
@click.option(
    "--recipe", metavar="FILE|NAME", help="See nulledit info for names.  [default: the model's]"
)
@click.option("--stats", metavar="PATH", help="Statistics of the model's keys.  [default: found]")
@seed_option("Of contexts and of the queue's order.  [default: 0]", default=None)
@click.option("--no-shuffle", is_flag=True, help="Keep the file's order over several batches.")
@facts_options
@skip_option
@click.option("--batch-size", metavar="N", type=int, help="Facts solved together.")
@click.option("--layers", metavar="LIST", help="Edited layers, as 4,5,6 or 4-8, from 0.")
@click.option("--method", metavar="NAME", help="See nulledit methods.")
@click.option(
    "--project",
    type=click.Choice(["own", "none", "inside", "after"]),
    help="Null-space projection: as published, off, within the solve, or of the finished update.",
)
@click.option(
    "--learning-rate", metavar="X", type=float, help="Of the values, in units of the hidden state."
)
@click.option("--steps", metavar="N", type=int, help="Forward passes per fact.")
@click.option("--clamp", metavar="X", type=float, help="Largest ‖δ‖/‖h‖.")
@click.option("--l2", metavar="X", type=float, help="Ridge on the update.")
@click.option("--null-space", metavar="RULE=VALUE", help="absolute=0.02, leakage=0.1, median=1.")
@chat_options
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any other field of a recipe, such as values.kl_weight=0; repeatable.",
)
@model_options
@click.option(
    "--text",
    metavar="FILE",
    help="Text for perplexity, KL and preservation.  [default: one that comes with nulledit]",
)
@click.option(
    "--retry",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    help="Write what does not hold again, up to N times, each time stronger.  [default: 0]",
)
@click.option(
    "--old-answers",
    is_flag=True,
    help="Take what the base says as the old answer of facts that name none.",
)
@click.option("--no-evaluate", is_flag=True, help="Edit only.")
@gate_options
@click.option("--dry-run", is_flag=True, help="Estimate time and memory; edit nothing.")
@output_options
def edit(facts: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write the facts of a file into a model.

    FACTS is YAML, JSON, JSON lines or CSV, of nulledit's own records or CounterFact's, EasyEdit's
    or zsRE's (see `nulledit facts check`). The run folder gets the edited model (RUN/model, an
    ordinary Hugging Face folder), the ledger and a report of what changed and what did not.

    What computes is decided by a recipe; the options under Recipe change single fields of it.

    Every batch is kept as it ends: after an interruption, go on with --continue, which takes model,
    recipe and statistics from the run's ledger. With --gate all is kept at the end, or nothing.
    Started by torchrun, several processes share the facts of each batch.

    \b
    $ nulledit edit facts.yaml --model smollm2-135m --out run
    $ nulledit edit more.yaml --continue run
    $ nulledit edit more.yaml --continue run --new-epoch --method memit-history
    $ nulledit edit more.yaml --continue run --gate default
    $ torchrun --nproc-per-node 8 -m nulledit edit facts.yaml --model gpt2 --out run
    """
    meet_early(given["device"])
    quiet = quiet or Launch.of().rank > 0
    _check(given)
    found = facts_of(facts, given, quiet=quiet)
    recipe = None if given["run"] else make_recipe(given)
    prepare(quiet=quiet)
    ranks = meet(given["device"])
    from nulledit.api.run import Refused, check_retry
    from nulledit.cli import runs
    from nulledit.cli.run_page import show, show_refusal

    if given["retry"] and recipe:
        check_retry(recipe, ranks)
    if given["dry_run"]:
        if not ranks.first:
            return None
        from nulledit.cli import estimate

        name = model_source(given["model"])
        size = estimate.estimate(name, found.facts, recipe, dtype=given["dtype"], given=given)
        return emit(size) if as_json else echo(estimate.as_page(size))
    try:
        with ranks.watched():
            result = runs.edit(found.facts, recipe, given, ranks, quiet=quiet)
    except RankError as error:  # before the first batch began
        raise error.advised("start the same command again") from error
    except Refused as error:
        show_refusal(error.report, as_json=as_json)
        raise
    if result:
        show(result, as_json=as_json)
    return None


def _check(given: dict[str, Any]) -> None:
    """Options that belong together, before anything is read."""
    if given["run"]:
        refused = named(given, FIXED)
        if refused:
            raise ConfigError(
                f"{', '.join(refused)} can't be given with --continue: model and seed are those of "
                f"{given['run']}"
            )
        refused = named(given, OF_EPOCH)
        if refused and not given["new_epoch"]:
            raise ConfigError(
                f"{', '.join(refused)} can't be given with --continue: recipe and statistics are "
                f"those of {given['run']}; add --new-epoch to change them from here on"
            )
        if given["new_epoch"] and not refused:
            raise ConfigError(
                "--new-epoch changes nothing: give another --recipe, --method, --stats or setting"
            )
        return
    if given["new_epoch"]:
        raise ConfigError("--new-epoch belongs to --continue RUN")
    if not given["model"]:
        raise ConfigError("give --model MODEL and --out RUN, or --continue RUN")
    if not given["out"] and not given["dry_run"]:
        raise ConfigError("give --out RUN, a folder to make for the run")
    if given["text"] and not Path(given["text"]).exists():
        raise ConfigError(f"{given['text']}: no such file")
