"""`nulledit apply`: a delta on its base, or off again."""

from __future__ import annotations

from dataclasses import asdict

import click

from nulledit.cli.common import echo, emit, prepare, say
from nulledit.cli.options import output_options, trust_option
from nulledit.errors import ConfigError


@click.command(short_help="Put a delta on its base, or take it off.")
@click.argument("delta", metavar="DELTA")
@click.argument("model", metavar="MODEL")
@click.option("--out", metavar="FOLDER", required=True, help="Folder to make for the result.")
@click.option("--remove", is_flag=True, help="MODEL is base + delta: give back the base.")
@click.option("--base", metavar="BASE", help="With --remove: the base, for its weights.")
@click.option("--run", metavar="RUN", help="With --remove: the run whose ledger holds them.")
@click.option(
    "--max-shard-size", metavar="SIZE", default="50GB", show_default=True, help="Of one file."
)
@trust_option
@output_options
def apply(
    delta: str,
    model: str,
    out: str,
    remove: bool,
    base: str | None,
    run: str | None,
    max_shard_size: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write MODEL with the edits of DELTA (nulledit export --as delta) to FOLDER.

    MODEL is the base: smollm2-135m, a local folder or a Hub id. Its hash, the delta's and the
    result's must be those of the delta's manifest. The result is an ordinary Hugging Face folder in
    the base's dtype.

    With --remove, MODEL is such a result and the base comes back, bit for bit. Subtraction would
    leave rounding behind: the original weights are taken from --base, or from the ledger of --run.

    \b
    $ nulledit apply delta smollm2-135m --out edited
    $ nulledit apply delta edited --remove --run run --out base
    """
    if not remove and (base or run):
        raise ConfigError("--base and --run go with --remove; without it, MODEL is the base")
    if remove and (base is None) == (run is None):
        raise ConfigError(
            "--remove needs the original weights: give either --base BASE or --run RUN"
        )
    prepare(quiet=quiet)
    from nulledit.export import apply_delta, remove_delta

    options = {"max_shard_size": max_shard_size, "trust_remote_code": trust_remote_code}
    say(
        f"{'Taking' if remove else 'Putting'} {delta} {'off' if remove else 'on'} {model}",
        quiet=quiet,
    )
    if remove:
        done = remove_delta(delta, model, out, base=base, run=run, **options)  # type: ignore[arg-type]
    else:
        done = apply_delta(delta, model, out, **options)  # type: ignore[arg-type]
    if as_json:
        emit({**asdict(done), "folder": str(done.folder)})
        return
    if remove:
        echo(f"The base, bit for bit, without {done.facts} facts: {done.folder}")
    else:
        same = ", the run's model to the bit" if done.same_as_run else ""
        echo(f"The base with {done.facts} facts{same}: {done.folder}")
    echo(f"Weights: {done.hash}")
