"""`nulledit apply`: a delta on its base, or off again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from nulledit.cli.command import Call, command
from nulledit.cli.options import TRUST, arg, opt
from nulledit.errors import ConfigError


@command(
    "A delta on its base, or off again.",
    arg("delta", "DELTA"),
    arg("model", "MODEL"),
    opt("--out FOLDER", "Folder to make for the result.", required=True),
    opt("--remove", "MODEL is base + delta: give back the base.", bool),
    opt("--base BASE", "With --remove: the base, for its weights."),
    opt("--run RUN", "With --remove: the run whose ledger holds them."),
    opt("--max-shard-size SIZE", "Of one file.", str, "50GB"),
    TRUST,
)
def apply(call: Call) -> None:
    """Write MODEL with the edits of DELTA (nulledit export --as delta) to FOLDER.

    MODEL is the base: smollm2-135m, a local folder or a Hub id. Its hash, the delta's and the
    result's must be those of the delta's manifest. The result is an ordinary Hugging Face folder in
    the base's dtype.

    With --remove, MODEL is such a result and the base comes back, bit for bit. Subtraction would
    leave rounding behind: the original weights are taken from --base, or from the ledger of --run.
    Gated edits leave them in MODEL, so of those neither is needed.

    \b
    $ nulledit apply delta smollm2-135m --out edited
    $ nulledit apply delta edited --remove --run run --out base
    """
    base, run = call.base, call.run
    if not call.remove and (base or run):
        raise ConfigError("--base and --run go with --remove; without it, MODEL is the base")
    if base and run:
        raise ConfigError("--remove takes W₀ from one of two: give either --base or --run")
    call.prepare()
    from nulledit.export import apply_delta, remove_delta
    from nulledit.export.delta import read_manifest

    if call.remove and not (base or run) and not read_manifest(Path(call.delta)).neurons:
        raise ConfigError(
            "--remove needs the original weights: give either --base BASE or --run RUN"
        )

    what = ("Taking", "off") if call.remove else ("Putting", "on")
    call.say(f"{what[0]} {call.delta} {what[1]} {call.model}")
    options = {n: call.given[n] for n in ("max_shard_size", "trust_remote_code")}
    if call.remove:
        done = remove_delta(call.delta, call.model, call.out, base=base, run=run, **options)
        line = f"The base, bit for bit, without {done.facts} facts: {done.folder}"
    else:
        done = apply_delta(call.delta, call.model, call.out, **options)
        same = ", the run's model to the bit" if done.same_as_run else ""
        line = f"The base with {done.facts} facts{same}: {done.folder}"
    call.show({**asdict(done), "folder": str(done.folder)}, f"{line}\nWeights: {done.hash}")
