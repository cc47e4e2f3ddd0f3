"""The folder of a run: what was asked, with what, and what came of it; each file whole or old."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit._version import __version__
from nulledit.errors import ReportError
from nulledit.io.jsonfiles import as_csv, as_json, write
from nulledit.io.shapes import misfit
from nulledit.io.untrusted import (
    MAX_DOCUMENT,
    MAX_LINES,
    MAX_SETTINGS,
    check_values,
    parse_json,
    parse_yaml,
    read_text,
)
from nulledit.report.figures import figure_of
from nulledit.report.images import as_png, as_svg
from nulledit.report.markdown import markdown_page
from nulledit.runs.document import RunFolder, run_document
from nulledit.runs.schema import ENVIRONMENTS, LINE, SUMMARY
from nulledit.runs.tables import rate_rows, rates_spec

if TYPE_CHECKING:
    from nulledit.editing.engine import EditEngine
    from nulledit.evaluation.queries import Query
    from nulledit.ledger.records import Column

FILES = (
    *("recipe.yaml", "environment.json", "results.jsonl", "summary.json", "report.md"),
    *("figure.png", "figure.svg", "figure.csv"),
)


def environment(editor: EditEngine) -> dict[str, Any]:
    """Versions, machine and model that results depend on, beside the recipe and the facts."""
    import safetensors
    import torch
    import transformers

    from nulledit.models.placement import devices_of

    return {
        "nulledit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "system": platform.platform(),
        "device": ", ".join(devices_of(editor.model)),
        "threads": torch.get_num_threads(),
        "dtype": editor.history.base.dtype,
        "seed": editor.seed,
        "model": editor.history.base.model,
        "model_hash": editor.history.base.hash,
        **({"model_file_sha256": found} if (found := editor.history.base.file_sha256) else {}),
        "time": now(),
    }


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def fact_line(
    column: Column,
    run: int,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    *,
    says_target: bool | None,
    diagnosis: Mapping[str, Any] | None = None,
    moved: Sequence[tuple[Query, bool]] = (),
) -> dict[str, Any]:
    """One line of `results.jsonl`, of an active column.

    `before` and `after` are rows of an evaluation, or None.
    `diagnosis`: why the fact does not hold; None where it does.
    `moved`: its neighbours that are answered otherwise than before, with whether they are right.
    """
    fact = column.fact
    return {
        "id": fact.id,
        "run": run,
        "batch": column.batch,
        "column": column.id,
        "active": True,
        "subject": fact.subject,
        "prompt": fact.render(fact.prompt),
        "target": fact.target,
        "old_answer": fact.old_answer,
        **({"relation": fact.relation} if fact.relation else {}),
        "before": before,
        "after": after,
        "says_target": says_target,
        "diagnosis": diagnosis,
        "neighbours": {
            what: [[query.prompt, query.answer] for query, now in moved if now is said]
            for what, said in (("lost", False), ("gained", True))
        },
        "outcome": column.outcome.to_dict(),
    }


def read_run(folder: Path, name: str) -> RunFolder:
    """The run of a folder; ReportError if it lacks a file or one can't be read."""
    missing = [f for f in ("summary.json", "results.jsonl") if not (folder / f).is_file()]
    if missing:
        raise ReportError(f"{folder}: no run here (no {' and no '.join(missing)})")
    recipe, settings = folder / "recipe.yaml", {}
    if recipe.exists():
        text = read_text(recipe, most=MAX_SETTINGS, error=ReportError)
        settings = parse_yaml(text, source=str(recipe), error=ReportError)
    if not isinstance(settings, dict) or not isinstance(settings.get("method", {}), dict):
        raise ReportError(f"{recipe}: not a recipe; move the file away")
    summary = read_json(folder, "summary.json", {})
    if not isinstance(summary, dict) or not {"runs", "base", "version"} <= set(summary):
        raise ReportError(
            f"{folder / 'summary.json'}: not the summary of a run; edit again into a new folder"
        )
    environment = read_json(folder, "environment.json", [])
    return RunFolder(name, summary, read_lines(folder), settings, environment)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of `results.jsonl`, none if there is no such file; ReportError for others."""
    file = folder / "results.jsonl"
    if not file.exists():
        return []
    text = read_text(file, most=MAX_LINES, error=ReportError)
    check_values(text, source=str(file), error=ReportError)
    lines = []
    for number, raw in enumerate(text.split("\n"), 1):  # U+2028 may stand in a JSON text
        if raw:
            where = f"{file}: line {number}"
            line = parse_json(raw, source=where, error=ReportError)
            if wrong := misfit(LINE, line):
                raise ReportError(f"{where}: no result of a fact ({wrong}); {_WAY_OUT}")
            lines.append(line)
    return lines


def read_json(folder: Path, name: str, default: Any) -> Any:
    """The content of a JSON file in the folder, or `default` if there is none.

    ReportError if it is too large, not JSON, or not what `write_run` writes under this name.
    """
    file = folder / name
    if not file.exists():
        return default
    text = read_text(file, most=MAX_DOCUMENT, error=ReportError)
    found = parse_json(text, source=str(file), error=ReportError)
    if (known := _KNOWN.get(name)) and (wrong := misfit(known[0], found)):
        raise ReportError(f"{file}: not {known[1]} ({wrong}); {_WAY_OUT}")
    return found


_KNOWN: Mapping[str, tuple[Any, str]] = {
    "summary.json": (SUMMARY, "the summary of a run"),
    "environment.json": (ENVIRONMENTS, "a run's environments"),
}
_WAY_OUT = "move the file away, or edit again into a new folder"


def write_run(
    folder: Path,
    *,
    recipe: str,
    environments: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    """Write every file of the run but the ledger and the model."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "recipe.yaml", recipe)
    write(folder / "environment.json", as_json(environments))
    write(folder / "results.jsonl", "".join(as_json(line, indent=None) for line in lines))
    evaluated = [run for run in summary["runs"] if run["after"]]
    if evaluated:
        _write_figure(folder, {side: evaluated[-1][side] for side in ("before", "after")})
    run = RunFolder("Edited facts", summary, lines, {}, environments)
    write(folder / "report.md", markdown_page(run_document(run), figures="figure"))
    write(folder / "summary.json", as_json(summary))  # last: it counts the run


def _write_figure(folder: Path, sides: Mapping[str, Mapping[str, Any]]) -> None:
    head = ("metric", "score", "side", "mean", "standard_error", "n")
    write(folder / "figure.csv", as_csv(rate_rows(sides), head))
    spec = rates_spec(sides)
    figure = figure_of(spec, spec.points)
    write(folder / "figure.png", as_png(figure))
    write(folder / "figure.svg", as_svg(figure))
