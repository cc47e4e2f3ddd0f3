"""The folder of a study: what was compared, what came of it; written and read here only.

STUDY/study.json           everything but the figures' points
STUDY/figures/NAME.csv     x, y, error, n, series, panel (and low, high), one point a line
STUDY/figures/NAME.png, NAME.svg, STUDY/study.md    drawn from these
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from nulledit._version import __version__
from nulledit.errors import ReportError
from nulledit.io.jsonfiles import as_json, write
from nulledit.io.shapes import is_shallow
from nulledit.io.text import without_folders
from nulledit.io.untrusted import MAX_DOCUMENT, check_values, one_line, parse_json, read_text
from nulledit.report.captions import chosen_examples, flat, sentence
from nulledit.report.document import (
    FORMAT,
    Details,
    Document,
    Items,
    Part,
    Study,
    Text,
)
from nulledit.report.markdown import markdown_page
from nulledit.report.points import Point, points_csv, read_points


def study_document(study: Study, about: str | None = None, source: str = "") -> Document:
    """A study as it is shown; `about`: what was run, if said otherwise; `source`: where it lies."""
    claims = {"It shows": study.shows, "It cannot show": study.cannot_show}
    parts: list[Part] = [
        Text(study.question, "question"),
        Text(sentence(study) if about is None else about, "quiet"),
        Items(
            tuple(map(without_folders, study.notices)), tone="note", most=25, more="in study.json"
        ),
        Items(tuple((name, said) for name, said in claims.items() if said), tone="limits"),
        *study.tables,
        *study.figures,
        *chosen_examples(study.examples),
    ]
    return Document(study.title, (*parts, *settings_of(study, source)))


def settings_of(study: Study, source: str = "") -> tuple[Part, ...]:
    """What a page ends with: settings, environment, and where they lie."""
    return (
        Details("Settings", (flat(study.settings),) if study.settings else ()),
        Details("Environment", tuple(map(flat, study.environment))),
        Text(source and f"Source: {source}", "quiet"),
    )


def write_study(folder: Path, study: Study) -> None:
    """Write every file of a study's folder; `study.json` comes last."""
    from nulledit.report.figures import figure_of
    from nulledit.report.images import as_png, as_svg

    folder = Path(folder)
    place = folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    for spec in study.figures:
        write(place / f"{spec.name}.csv", points_csv(spec.points))
        figure = figure_of(spec, spec.points)
        write(place / f"{spec.name}.svg", as_svg(figure))
        write(place / f"{spec.name}.png", as_png(figure))
    page = study_document(study)
    last = Text("Settings, environment and every number are in study.json and figures/.")
    write(folder / "study.md", markdown_page(replace(page, parts=(*page.parts, last))))
    write(folder / "study.json", as_json(study.to_dict(points=False)))


def read_study(folder: Path) -> Study:
    """The study of a folder, with its figures' points. ReportError if it can't be read."""
    from pydantic import TypeAdapter, ValidationError

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
        if not is_shallow(plain):
            raise ValueError("nested too deep")
        given = {key: value for key, value in plain.items() if key != "format"}
        if unknown := set(given) - {f.name for f in fields(Study)}:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        study: Study = TypeAdapter(Study).validate_python(given)
        figures = tuple(replace(f, points=_points(f.name, Path(folder))) for f in study.figures)
        return replace(study, figures=figures)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        wrong = f"{at}: {first['msg']}, found {first['input']!r}"
    except ValueError as error:
        wrong = str(error)
    raise ReportError(one_line(f"{file}: not a study ({wrong}); run the study again"))


def _points(name: str, folder: Path) -> tuple[Point, ...]:
    file = folder / "figures" / f"{name}.csv"
    if not file.is_file():
        raise ReportError(f"{file} is missing: the figure's numbers are kept there; run it again")
    text = read_text(file, most=MAX_DOCUMENT, error=ReportError)
    check_values(text, source=str(file), error=ReportError)
    return read_points(text)
