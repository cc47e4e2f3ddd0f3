"""A study's page, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from nulledit.io.text import markdown, plain, shorten
from nulledit.report.cells import notes, shown, study_table
from nulledit.report.document import Example, FigureSpec, Study, StudyTable
from nulledit.report.tables import as_markdown, spoken
from nulledit.report.words import chosen_examples, figure_caption, sentence

LONGEST = 300  # columns of a generated text


def study_page(study: Study) -> str:
    """A study as a page, its figures beside it in `figures/`."""
    parts = [
        f"# {markdown(study.title)}",
        markdown(study.question),
        markdown(sentence(study)),
        "\n".join(f"- {markdown(notice)}" for notice in study.notices),
    ]
    for title, said in (("It shows", study.shows), ("It cannot show", study.cannot_show)):
        if said:
            parts.append(f"**{title}:** {markdown(said)}")
    for table in study.tables:
        parts += _study_table(table)
    for spec in study.figures:
        parts += _study_figure(spec)
    for title, examples in chosen_examples(study.examples):
        parts += [f"## {title}", _examples(examples)]
    parts.append("Settings, environment and every number are in `study.json` and `figures/`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _study_table(table: StudyTable) -> list[str]:
    left = {i for i, cells in enumerate(zip(*shown(table), strict=True)) if not cells[0].numeric}
    said = ". ".join(part for part in (table.caption.rstrip("."), *notes(table)) if part)
    return [
        f"## {markdown(table.title)}",
        as_markdown(study_table(table), left=left),
        markdown(said) + ".",
    ]


def _study_figure(spec: FigureSpec) -> list[str]:
    caption = markdown(figure_caption(spec))
    return [
        f"![{caption}](figures/{spec.name}.png)",
        f"{caption} [CSV](figures/{spec.name}.csv)",
    ]


def _examples(examples: Sequence[Example]) -> str:
    rows: list[Sequence[str]] = [
        [shorten(plain(c), LONGEST) for c in (e.arm, e.prompt, e.target, *map(spoken, said))]
        for e in examples
        for said in [(e.before, e.after)]
    ]
    return as_markdown((["arm", "prompt", "target", "before", "after"], rows), left=5)
