"""`nulledit export`: the edits of a run for others, by Hugging Face's formats or llama.cpp's."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, RUN, given_options, least, opt
from nulledit.errors import ConfigError, HubError
from nulledit.export.write import DEFAULT, EXPORTS, OPTIONS, write_export
from nulledit.io.text import count

if TYPE_CHECKING:
    from nulledit.export.same_shape import SameShape
    from nulledit.export.updates import Export, FactsCost
    from nulledit.report.document import StudyTable


@command(
    "A checkpoint, a LoRA adapter, GGUF or a delta.",
    RUN,
    opt(
        "--as",
        "Factors for nulledit apply, PEFT's adapter, or the whole model; for llama.cpp and Ollama "
        f"the whole model or an adapter.  [default: {DEFAULT}]",
        tuple(EXPORTS),
        DEFAULT,
        name="kind",
    ),
    opt("--out FOLDER", "Folder to make.", required=True),
    opt("--rank R", "Cut to so many dimensions.", least(1)),
    opt(
        "--dtype",
        "Of the factors.  [default: of a delta what makes it exact, else float32]",
        ("float32", "float64", "bfloat16", "float16"),
    ),
    opt(
        "--type",
        "Of a GGUF file's edited matrices, or factors.  [default: f16, of factors f32]",
        ("f32", "f16", "bf16", "q8_0"),
        name="tensor_type",
    ),
    opt(
        "--gguf FILE",
        "The base as GGUF, which a GGUF export is made from.  [default: the file that the run was "
        "begun from]",
    ),
    opt(
        "--experts",
        "Adapters of mixtures: fused for PEFT, each for servers.  [default: fused]",
        ("fused", "each"),
    ),
    opt("--max-shard-size SIZE", "Of a checkpoint's files.  [default: 50GB]"),
    opt(
        "--same-shape",
        "Gated edits: a whole model of the base's shape, its least used units replaced.",
        bool,
    ),
    opt(
        "--text FILE",
        "Gated edits: text that says which units are least used, and the price.  [default: one "
        "that comes with nulledit]",
    ),
    opt("--push REPO", "Upload FOLDER to the Hub, too, as NAME or OWNER/NAME."),
    opt("--private", "Of a repository that --push makes.", bool),
    PLACED,
)
def export(call: Call) -> None:
    """Write the edits of RUN to FOLDER. RUN is only read, FOLDER must not exist.

    By default as a delta: a few kilobytes a fact, and base + delta is the run's model to the bit.
    By a closed-form method, n facts change a matrix by a product of two factors of rank n: adapter
    and delta hold it whole. The adapter's rank is padded to one that servers accept, up to 512, and
    the update is cut beyond; what that costs is measured and printed. docs/export.md says more.

    \b
    $ nulledit export run --out delta
    $ nulledit export run --as lora --out adapter
    $ nulledit export run --as checkpoint --out model --max-shard-size 5GB
    $ nulledit export run --as gguf --gguf base.gguf --out model
    $ nulledit export run --as lora --out adapter --push me/adapter
    """
    given = {option.name: option for option in given_options() if option.name in OPTIONS}
    refused = [
        option.flag for name, option in given.items() if name not in EXPORTS[call.kind].options
    ]
    if refused:
        raise ConfigError(f"{', '.join(refused)} can't be given with --as {call.kind}")
    if call.private and not call.push:
        raise ConfigError("--private is of a repository: give --push as well")
    call.prepare()
    from nulledit.export.push import check_repo, push
    from nulledit.export.updates import in_the_way, refuse_existing, shard_bytes

    if in_the_way(Path(call.out), Path(call.run)):
        raise ConfigError(f"--out {call.out} is where the run lies; give another folder")
    refuse_existing(Path(call.out))
    if call.push:
        check_repo(call.push)
    if call.max_shard_size:
        shard_bytes(call.max_shard_size)
    run = call.open()
    call.say(f"Writing {call.out}")
    with call.progress() as tell:
        options = {name: call.given[name] for name in given}
        done = write_export(run.editor, call.out, call.kind, run=call.run, progress=tell, **options)
    address, unshared = "", None
    if call.push:
        call.say(f"Uploading {call.out} to {call.push}")
        try:
            address = push(call.out, call.push, private=call.private)
        except HubError as error:
            unshared = error
    lines = [*lines_of(done), *starts(done, run.editor.history.base.model)]
    lines += [f"On the Hub: {address}"] if address else []
    tables = [layers_table(done)] if done.layers else []
    told = done.to_dict() | ({"address": address} if address else {})
    call.show(told, [*tables, "\n".join(lines)])
    if unshared:
        raise unshared


def layers_table(done: Export) -> StudyTable:
    """One row per edited matrix."""
    from nulledit.report.document import StudyTable
    from nulledit.report.tables import number

    whole = not any(layer.of for layer in done.layers)
    head = ["layer", "‖Δ‖/‖W₀‖", "rounding/‖Δ‖", "bytes"]
    if not whole:
        head[1:1] = ["rank", "of", "‖Δ−BA‖/‖Δ‖", "at the keys"]
    rows: list[Sequence[str]] = []
    several = len({layer.layer for layer in done.layers}) < len(done.layers)
    for layer in done.layers:
        name = layer.parameter.removesuffix(".weight").rpartition(".")[2]
        row = [f"{layer.layer} {name}" if several else str(layer.layer)]
        row.append(number(layer.update_share))
        row += [number(layer.rounding_share), f"{layer.bytes:,}"]
        if not whole:
            errors = [number(layer.error), number(layer.key_error)]
            row[1:1] = [str(layer.rank), str(layer.of), *errors]
        rows.append(row)
    total = sum(layer.bytes for layer in done.layers)
    rows.append(["all", *[""] * (len(head) - 2), f"{total:,}"])
    return StudyTable.of("layers", "", head, rows)


def lines_of(done: Export) -> list[str]:
    """What stands below the table."""
    what = EXPORTS[done.kind].line.format(rank=done.rank, dtype=done.dtype)
    lines = [f"{what}: {done.folder} ({done.bytes:,} bytes in all files)."]
    if done.same_shape:
        lines += shape_lines(done.same_shape)
    cut = [layer for layer in done.layers if layer.rank < layer.of]
    if cut:
        ranks = ", ".join(f"{x.layer} ({x.rank} of {x.of})" for x in cut)
        lines.append(f"Cut, so not exact: layer {ranks}.")
    if done.cost:
        lines += cost_lines(done.cost)
    if done.same_as_run:
        lines.append("Base + delta is the run's model to the bit.")
    elif done.same_as_run is not None:
        weights = sum(layer.shape[0] * layer.shape[1] for layer in done.layers)
        lines.append(
            f"Base + delta differs from the run's model in {done.differing:,} of {weights:,} "
            "edited weights." + exactly(done)
        )
    return lines


def starts(done: Export, base: str) -> list[str]:
    """Commands that serve what was written, or share it."""
    from nulledit.export.ranks import SERVED
    from nulledit.runs.folder import read_json

    lines = EXPORTS[done.kind].start
    if done.kind == "lora":
        config = read_json(done.folder, "adapter_config.json", {})
        fused = config.get("target_parameters")
        if done.rank not in SERVED or config.get("lora_bias") or fused:  # servers don't take it
            lines = lines[-1:]
    slots = {"folder": done.folder, "base": base or "BASE", "rank": done.rank}
    words = [[word.format(**slots) for word in shlex.split(line)] for line in lines]
    return [f"    {shlex.join(line)}" for line in words]


def exactly(done: Export) -> str:
    """How to have the run's model to the bit, where that can be."""
    # An update of full rank may lie halfway between two weights: the last bit of float64 decides.
    cut = any(layer.rank < layer.of or layer.of >= min(layer.shape) for layer in done.layers)
    return "" if cut or done.dtype == "float64" else " --dtype float64 gives it to the bit."


def shape_lines(found: SameShape) -> list[str]:
    """What stands in the place of what, and what that costs other text."""
    from nulledit.report.tables import number

    lines = [
        f"Block {at.layer}: {count(len(at.units), 'neuron')} in the place of as many of "
        f"{at.of:,} units, which hold {number(100 * at.share)} % of Σ E[a²]‖column‖² on text."
        for at in found.layers
    ]
    kl, grown = found.kl, found.grown_kl
    price = (
        f"KL from the base per token: {kl.value:.3g} ± {kl.standard_error:.2g} mnat, with neurons "
        f"besides the units {grown.value:.3g} ± {grown.standard_error:.2g} ({kl.tokens:,} tokens, "
        f"those of {found.text} that did not choose them)."
    )
    return [*lines, price]


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
