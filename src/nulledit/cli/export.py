"""`nulledit export`: the edits of a run for others, as a checkpoint, an adapter or a delta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import Bars, echo, emit, prepare, say
from nulledit.cli.options import device_option, named, output_options, trust_option
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.export.updates import Export, FactsCost
    from nulledit.export.write import Kind

REFUSED = {
    "checkpoint": {"rank": "--rank", "dtype": "--dtype"},
    "lora": {"max_shard_size": "--max-shard-size"},
    "delta": {"max_shard_size": "--max-shard-size"},
}


@click.command(short_help="A run's edits as a checkpoint, a LoRA adapter or a delta.")
@click.argument("run", metavar="RUN")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["checkpoint", "lora", "delta"]),
    required=True,
    help="The whole model, PEFT's adapter, or factors for nulledit apply.",
)
@click.option("--out", metavar="FOLDER", required=True, help="Folder to make.")
@click.option("--rank", metavar="R", type=click.IntRange(1), help="Cut to so many dimensions.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    help="Of the factors.  [default: float32]",
)
@click.option("--max-shard-size", metavar="SIZE", help="Of a checkpoint's files.  [default: 50GB]")
@device_option
@trust_option
@output_options
def export(run: str, kind: Kind, out: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write the edits of RUN to FOLDER. RUN is only read, FOLDER must not exist.

    By a closed-form method, n facts change a matrix by a product of two factors of rank n: adapter
    and delta hold it whole. The adapter's rank is padded to one that servers accept, up to 512, and
    the update is cut beyond; what that costs is measured and printed. docs/export.md says more.

    \b
    $ nulledit export run --as lora --out adapter
    $ nulledit export run --as delta --out delta
    $ nulledit export run --as checkpoint --out model --max-shard-size 5GB
    """
    refused = named(given, REFUSED[kind])
    if refused:
        raise ConfigError(f"{', '.join(refused)} can't be given with --as {kind}")
    prepare(quiet=quiet)
    from nulledit.cli.loading import load_run
    from nulledit.export.updates import check_shard_size, refuse_existing
    from nulledit.export.write import SHARD, write_export
    from nulledit.report.tables import as_text

    refuse_existing(Path(out))
    check_shard_size(given["max_shard_size"] or SHARD)
    editor = load_run(
        run, given["device"], quiet=quiet, trust_remote_code=given["trust_remote_code"]
    )
    say(f"Writing {out}", quiet=quiet)
    asked = {name: given[name] for name in ("rank", "dtype", "max_shard_size")}
    with Bars(quiet=quiet) as bars:
        done = write_export(editor, out, kind, run=run, progress=bars, **asked)
    if as_json:
        emit(done.to_dict())
        return
    if done.layers:
        echo(as_text(layers_table(done), left=0) + "\n")
    echo("\n".join(lines_of(done)))


def layers_table(done: Export) -> tuple[Sequence[str], list[Sequence[str]]]:
    """One row per edited matrix."""
    from nulledit.report.tables import number

    whole = done.kind == "checkpoint"
    head = ["layer", "‖Δ‖/‖W₀‖", "rounding/‖Δ‖", "bytes"]
    if not whole:
        head[1:1] = ["rank", "of", "‖Δ−BA‖/‖Δ‖", "at the keys"]
    rows: list[Sequence[str]] = []
    for layer in done.layers:
        row = [str(layer.layer), number(layer.update_share)]
        row += [number(layer.rounding_share), f"{layer.bytes:,}"]
        if not whole:
            errors = [number(layer.error), number(layer.key_error)]
            row[1:1] = [str(layer.rank), str(layer.of), *errors]
        rows.append(row)
    total = sum(layer.bytes for layer in done.layers)
    rows.append(["all", *[""] * (len(head) - 2), f"{total:,}"])
    return head, rows


def lines_of(done: Export) -> list[str]:
    """What stands below the table."""
    what = {
        "checkpoint": f"The model in {done.dtype}",
        "lora": f"Adapter of rank {done.rank} in {done.dtype}",
        "delta": f"Delta in {done.dtype}",
    }[done.kind]
    lines = [f"{what}: {done.folder} ({done.bytes:,} bytes in all files)."]
    cut = [layer for layer in done.layers if layer.rank < layer.of]
    if cut:
        ranks = ", ".join(f"{x.layer} ({x.rank} of {x.of})" for x in cut)
        lines.append(f"Cut, so not exact: layer {ranks}.")
    if done.cost:
        lines += cost_lines(done.cost)
    if done.kind == "delta" and done.same_as_run:
        lines.append("Base + delta is the run's model to the bit.")
    elif done.kind == "delta":
        weights = sum(layer.shape[0] * layer.shape[1] for layer in done.layers)
        lines.append(
            f"Base + delta differs from the run's model in {done.differing:,} of {weights:,} "
            "edited weights." + exactly(done)
        )
    return lines


def exactly(done: Export) -> str:
    """How to have the run's model to the bit, where that can be."""
    # An update of full rank may lie halfway between two weights: the last bit of float64 decides.
    cut = any(layer.rank < layer.of or layer.of >= min(layer.shape) for layer in done.layers)
    return "" if cut or done.dtype == "float64" else " --dtype float64 gives it to the bit."


def cost_lines(cost: FactsCost) -> list[str]:
    """What the stored factors change for the facts."""
    held = (
        f"Facts that hold by argmax: {cost.stored_strict} of {cost.facts} as stored, "
        f"{cost.exact_strict} in the run's model."
    )
    loss = (
        f"Loss of their targets: {cost.stored_nll:.4f} nats a token as stored, "
        f"{cost.exact_nll:.4f} in the run's model; largest change {cost.worst:.2g}."
    )
    if math.isnan(cost.exact_nll) and math.isfinite(cost.worst):  # all are to be forgotten
        loss = f"Loss of the forgotten answers: largest change {cost.worst:.2g} nats a token."
    return [held, loss]
