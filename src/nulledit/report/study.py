"""The folder of a study: what was compared, what came of it; written and read here only.

STUDY/study.json           everything but the figures' points
STUDY/figures/NAME.csv     x, y, error, n, series, panel (and low, high), one point a line
STUDY/figures/NAME.png, NAME.svg, STUDY/study.md    drawn from these
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from nulledit._version import __version__
from nulledit.errors import ReportError
from nulledit.io.jsonfiles import as_json, write
from nulledit.io.shapes import misfit
from nulledit.io.untrusted import MAX_DOCUMENT, check_values, one_line, parse_json, read_text
from nulledit.report.document import (
    FORMAT,
    Column,
    Example,
    FigureSpec,
    Study,
    StudyTable,
    Value,
    check_name,
)
from nulledit.report.points import points_csv, read_points
from nulledit.report.schema import STUDY


def write_study(folder: Path, study: Study) -> None:
    """Write every file of a study's folder; `study.json` comes last."""
    from nulledit.report.figures import figure_of
    from nulledit.report.images import as_png, as_svg
    from nulledit.report.markdown import study_page

    folder = Path(folder)
    place = folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    for spec in study.figures:
        write(place / f"{spec.name}.csv", points_csv(spec.points))
        figure = figure_of(spec, spec.points)
        write(place / f"{spec.name}.svg", as_svg(figure))
        write(place / f"{spec.name}.png", as_png(figure))
    write(folder / "study.md", study_page(study))
    write(folder / "study.json", as_json(study.to_dict(points=False)))


def read_study(folder: Path) -> Study:
    """The study of a folder, with its figures' points. ReportError if it can't be read."""
    file = Path(folder) / "study.json"
    if not file.exists():
        raise ReportError(f"{folder}: no study here (expected {file})")
    text = read_text(file, most=MAX_DOCUMENT, error=ReportError)
    plain = parse_json(text, source=str(file), error=ReportError)
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != FORMAT:
        raise ReportError(
            f"{file}: study format {found!r}, and nulledit {__version__} reads {FORMAT}: "
            "use the version that wrote it, or run the study again"
        )
    try:
        if missing := [f.name for f in fields(Study) if f.name not in plain]:
            raise ValueError(f"lacks {', '.join(missing)}")
        if wrong := misfit(STUDY, plain):
            raise ValueError(wrong)
        return _study(plain, Path(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = one_line(f"{file}: not a study ({error}); run the study again")
        raise ReportError(said) from error


def _study(plain: dict[str, Any], folder: Path) -> Study:
    given = {key: value for key, value in plain.items() if key != "format"}
    if unknown := set(given) - {f.name for f in fields(Study)}:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    given["tables"] = tuple(_table(t) for t in given["tables"])
    given["figures"] = tuple(_figure(f, folder) for f in given["figures"])
    given["examples"] = tuple(Example(**e) for e in given["examples"])
    given["notices"] = tuple(given["notices"])
    given["environment"] = tuple(given["environment"])
    return Study(**given)


def _table(plain: dict[str, Any]) -> StudyTable:
    columns = tuple(Column(**c) for c in plain["columns"])
    rows = tuple(
        {k: Value(**v) if isinstance(v, dict) else v for k, v in row.items()}
        for row in plain["rows"]
    )
    return StudyTable(**{**plain, "columns": columns, "rows": rows})


def _figure(plain: dict[str, Any], folder: Path) -> FigureSpec:
    check_name(plain["name"])
    file = folder / "figures" / f"{plain['name']}.csv"
    if not file.is_file():
        raise ReportError(f"{file} is missing: the figure's numbers are kept there; run it again")
    text = read_text(file, most=MAX_DOCUMENT, error=ReportError)
    check_values(text, source=str(file), error=ReportError)
    points = read_points(text)
    return FigureSpec(**{**plain, "log": tuple(plain["log"]), "points": points})
