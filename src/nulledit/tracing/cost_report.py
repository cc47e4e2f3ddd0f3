"""The folder of costs by block.

FOLDER/report.md            what was measured and suggested, and a table by block
FOLDER/costs.png, .svg      costs and drives by block
FOLDER/costs.csv            all numbers by block
FOLDER/summary.json         settings, numbers, suggestion, seconds; it comes last
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nulledit.io.jsonfiles import as_csv, as_json, write
from nulledit.io.text import count
from nulledit.report import document as doc
from nulledit.report.markdown import markdown_page
from nulledit.tracing.costs import UNIT, BlockCost, Costs
from nulledit.tracing.suggestion import FLAT

NOT_SAID = (
    "The suggestion is where to begin: a value's cost is of a value as long as the state it is "
    "added to, to second order and in no direction that is known. It says what a value does to "
    "other text, not how well a fact can be written there. Try the blocks beside it on facts that "
    "you keep for it."
)


def cost_summary(found: Costs, model: str) -> dict[str, Any]:
    """Plain data: how it was measured, every block, the suggestion, the time."""
    told = found.suggestion
    return {
        "model": model,
        "by": "cost",
        "text": found.text,
        "settings": asdict(found.settings),
        "threshold": found.threshold,
        "depth": found.depth,
        "facts": {"counted": found.facts, "at_first_token": list(found.at_first_token)},
        "blocks": [asdict(block) for block in found.blocks],
        "suggestion": {
            "layers": list(told.layers),
            "recipe_line": told.recipe_line,
            "gated": {"layer": told.gated, "recipe_line": told.gated_line},
        },
        "seconds": {"wall": found.wall_seconds, "cpu": found.cpu_seconds},
    }


def cost_document(found: Costs, model: str) -> doc.Document:
    """What a terminal and the folder's page show."""
    told, settings, first = found.suggestion, found.settings, found.at_first_token
    parts: list[doc.Part] = []
    if told.gated is not None:
        said = f"For gated edits a value costs least in block {told.gated}:"
        parts += [doc.Text(said), doc.Code(told.gated_line)]
    if told.layers:
        said = (
            "For methods that change W it costs least in "
            f"{'layer' if len(told.layers) == 1 else 'layers'} "
            f"{'–'.join(map(str, dict.fromkeys((told.layers[0], told.layers[-1]))))} (up to "
            f"{100 * (FLAT - 1):.0f} % more than in the cheapest):"
        )
        parts += [doc.Text(said), doc.Code(told.recipe_line)]
    parts += [
        doc.Text(NOT_SAID),
        doc.Picture("costs.png", "Costs and drives by block"),
        cost_table(found),
        doc.Text(
            f"{count(found.facts, 'fact')}; {found.text}: {settings.tokens} tokens for second "
            f"moments, {settings.windows} windows of {settings.window} tokens for gradients and "
            f"drives, seed {settings.seed}. {found.cpu_seconds:.0f} CPU-seconds, "
            f"{found.wall_seconds:.0f} of wall time."
        ),
        doc.Items(first, title="Left out, since the subject is the text's first token", most=20),
    ]
    return doc.Document(f"Cost of a value in {model}", tuple(parts))


def cost_table(found: Costs) -> doc.StudyTable:
    """A row for each block."""
    columns = (
        doc.Column("layer", "layer"),
        doc.Column("keys", "cost in W", better="low", digits=2),
        doc.Column("inputs", "neuron", better="low", digits=2),
        doc.Column("past_gate", "past its gate", better="low", digits=3),
        doc.Column("text_rare", "drive by text", better="low", digits=3),
        doc.Column("rivals", "by a fact", better="low", digits=3),
        doc.Column("rival", "at most", better="low", digits=2),
        doc.Column("text_open", "text opens", better="low", digits=2),
        doc.Column("facts_open", "facts open", unit="%", digits=2),
    )
    caption = (
        "Costs are in 1e-4 nats a token of text, means over facts: of a value that W writes, of "
        "one written by a neuron that answers in proportion, and of the part of that where the "
        "neuron's gate is open. Drives are shares of what a gate's own subject drives: exceeded "
        "by one token of text in 1000 (median fact), the largest by another fact's subject (mean "
        f"over facts) and the largest of all. A gate is open above {found.threshold:g}: so many of "
        "10,000 pairs of a fact and a token of text open it, and so many % of pairs of facts. "
        "Standard errors are in costs.csv"
    )
    rows = tuple(_row(block) for block in found.blocks)
    used = {key for row in rows for key, cell in row.items() if cell is not None}
    return doc.StudyTable(
        "costs",
        "By block",
        caption,
        tuple(column for column in columns if column.key in used),
        tuple({k: cell for k, cell in row.items() if k in used} for row in rows),
    )


def _row(block: BlockCost) -> dict[str, doc.Cell]:
    gates = block.gates
    row: dict[str, doc.Cell] = {
        "layer": str(block.layer),
        "keys": block.keys.mean / UNIT if block.keys else None,
        "inputs": block.inputs.mean / UNIT if block.inputs else None,
    }
    if gates is not None:
        row |= {
            "past_gate": gates.past_gate.mean / UNIT,
            "text_rare": gates.text_rare,
            "rivals": gates.rivals.mean if gates.rivals else None,
            "rival": gates.rival,
            "text_open": gates.text_open / UNIT,
            "facts_open": 100 * gates.facts_open,
        }
    return row


def write_costs(folder: Path, found: Costs, model: str) -> None:
    """Write every file of the folder; `summary.json` comes last."""
    from nulledit.report.images import as_png, as_svg
    from nulledit.tracing.cost_figure import cost_figure

    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "costs.csv", as_csv([_flat(asdict(block)) for block in found.blocks]))
    figure = cost_figure(found)
    write(folder / "costs.svg", as_svg(figure))
    write(folder / "costs.png", as_png(figure))
    write(folder / "report.md", markdown_page(cost_document(found, model)))
    write(folder / "summary.json", as_json(cost_summary(found, model)))


def _flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= (
            _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
        )
    return found
