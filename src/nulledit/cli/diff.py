"""`nulledit diff`: two states of one base model side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import echo, emit, prepare
from nulledit.cli.options import device_option, output_options, trust_option

if TYPE_CHECKING:
    from nulledit.runs.diff import Difference, FactDifference

SHOWN = 50  # facts in the table


@click.command(short_help="Two runs, or two states of one: facts, norms, probabilities.")
@click.argument("first", metavar="RUN[@EVENT]")
@click.argument("second", metavar="RUN[@EVENT]")
@device_option
@trust_option
@output_options
def diff(
    first: str,
    second: str,
    device: Any,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """What differs between two runs on one base model, or between two states of one run.

    RUN@N is the model behind event N of `nulledit log RUN`, RUN@0 the base. The table shows facts
    that only one has or that they answer differently, with the probability of each answer in both.

    \b
    $ nulledit diff run other
    $ nulledit diff run@3 run
    """
    prepare(quiet=quiet)
    from nulledit.cli.loading import load_run
    from nulledit.ledger.store import Store
    from nulledit.report.tables import as_text
    from nulledit.runs.diff import columns_at, difference, read_state

    (a, at_a), (b, at_b) = read_state(first), read_state(second)
    other = Store(b / "ledger").load()
    editor = load_run(a, device, quiet=quiet, trust_remote_code=trust_remote_code)
    found = difference(
        editor,
        other,
        first=columns_at(editor.history, at_a, first),
        second=columns_at(other, at_b, second),
    )
    if as_json:
        return emit(_plain(found, first, second))
    parts = []
    if found.facts:
        parts.append(as_text(_facts_table(found, first, second), left=2, most=48))
        if len(found.facts) > SHOWN:
            parts.append(f"and {len(found.facts) - SHOWN} more, with --json")
    parts.append(f"{len(found.facts)} facts differ, {found.common} are in both.")
    if found.layers:
        rows: list[Sequence[str]] = [
            [str(x.layer), f"{x.first:.4f}", f"{x.second:.4f}", f"{x.apart:.4f}"]
            for x in found.layers
        ]
        head = ["layer", f"‖Δ‖/‖W₀‖, {first}", second, "apart"]
        parts.append(as_text((head, rows)))
    return echo("\n\n".join(parts))


def _facts_table(found: Difference, first: str, second: str) -> tuple[Sequence[str], Any]:
    rows: list[Sequence[str]] = []
    for item in found.facts[:SHOWN]:
        fact = item.first or item.second
        assert fact is not None
        for i, (answer, (p, q)) in enumerate(item.probabilities.items()):
            rows.append(
                [
                    "" if i else fact.render(fact.prompt),
                    answer,
                    _taught(item, answer, first, second),
                    f"{p:.3f}",
                    f"{q:.3f}",
                ]
            )
    return ["prompt", "answer", "taught in", f"p, {first}", f"p, {second}"], rows


def _taught(item: FactDifference, answer: str, first: str, second: str) -> str:
    names = [
        f"{name}{' (to forget)' if fact.forget else ''}"
        for name, fact in ((first, item.first), (second, item.second))
        if fact and fact.target == answer
    ]
    return ", ".join(names)


def _plain(found: Difference, first: str, second: str) -> dict[str, Any]:
    return {
        "first": first,
        "second": second,
        "common": found.common,
        "facts": [
            {
                "first": x.first.to_dict() if x.first else None,
                "second": x.second.to_dict() if x.second else None,
                "probabilities": [
                    {"answer": answer, "first": p, "second": q}
                    for answer, (p, q) in x.probabilities.items()
                ],
            }
            for x in found.facts
        ],
        "layers": [vars(x) for x in found.layers],
    }
