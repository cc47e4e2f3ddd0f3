"""Folders to one page: read each, compare the runs, write the page whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nulledit.errors import ReportError
from nulledit.io.jsonfiles import write
from nulledit.report.document import Document, Listing, Study
from nulledit.report.html import html_page, is_ours
from nulledit.report.study import read_study, study_document
from nulledit.runs.compare import compared_document, comparison, evaluated
from nulledit.runs.compared_facts import compared_facts
from nulledit.runs.document import RunFolder, run_document, run_study
from nulledit.runs.folder import read_run


@dataclass(frozen=True)
class Collected:
    """What a page is made of."""

    folders: tuple[tuple[str, str, Study, Document], ...]
    """Folder as given, `run` or `study`, its numbers, and what is shown of it."""
    compared: Study | None
    """The runs beside each other; None for fewer than two."""
    runs: tuple[RunFolder, ...] = ()
    """Those that are compared."""

    @cached_property
    def facts(self) -> Listing | None:
        """Every fact of the runs that are compared, side by side."""
        return compared_facts(self.runs) if self.compared else None

    def documents(self) -> list[Document]:
        """In the order of the page: the comparison comes first."""
        own = [document for _, _, _, document in self.folders]
        if self.compared and (facts := self.facts):
            return [compared_document(self.runs, self.compared, facts), *own]
        return own

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every figure's points."""
        return {
            "folders": [
                {"folder": folder, "kind": kind, **study.to_dict()}
                for folder, kind, study, _ in self.folders
            ],
            "comparison": (
                {**self.compared.to_dict(), "facts": [dict(row) for row in self.facts.items]}
                if self.compared and self.facts
                else None
            ),
        }


def collect(folders: Sequence[Path]) -> Collected:
    """Read run and study folders, each once; ReportError for a folder that is neither."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    found: list[tuple[str, str, Study, Document]] = []
    runs: list[RunFolder] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        if (folder / "study.json").is_file():
            study = read_study(folder)
            page = study_document(study, source=name)
            found.append((str(folder), "study", study, page))
        elif (folder / "summary.json").is_file():
            run = read_run(folder, name)
            runs.append(run)
            try:
                study = run_study(run)
                page = run_document(run, study, name)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ReportError(
                    f"{folder}: not a run's files ({type(error).__name__}: {error}); "
                    "edit again into a new folder"
                ) from error
            found.append((str(folder), "run", study, page))
        else:
            what = "is no folder" if not folder.is_dir() else "holds no run and no study"
            raise ReportError(
                f"{folder}: {what}; expected a folder with summary.json (of `nulledit edit`) or "
                "study.json (of `nulledit study`)"
            )
    try:
        return Collected(tuple(found), comparison(runs), tuple(evaluated(runs)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"the runs can't be compared ({error}); give them one by one") from error


def write_report(collected: Collected, file: Path, *, title: str, force: bool = False) -> None:
    """Write the page; ReportError if another kind of file is in the way, unless `force`."""
    check_page(file, force=force)
    write(file, html_page(title, collected.documents()))


def check_page(file: Path, *, force: bool = False, way: str = "remove it") -> None:
    """ReportError if no page can be written to `file`; over what is none only with `force`.

    `way`: what can be done about that, besides another name.
    """
    if file.is_dir():
        raise ReportError(f"{file}: is a folder; a page needs the name of a file")
    if file.exists() and not force:
        with file.open(encoding="utf-8", errors="replace") as held:
            if not is_ours(held.read(500)):
                raise ReportError(
                    f"{file}: is there and not made by `nulledit report`; name another file, or "
                    f"{way}"
                )


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's own name, with as much of what it is in as tells two of one name apart."""
    parts = [folder.resolve().parts[1:] or ("run",) for folder in folders]
    names: list[str] = []
    for own in parts:
        ends = ["/".join(own[-n:]) for n in range(1, len(own) + 1)]
        others = ["/".join(other) for other in parts if other != own]
        names.append(next((e for e in ends if not any(_ends(o, e) for o in others)), ends[-1]))
    return names


def _ends(path: str, end: str) -> bool:
    return f"/{path}".endswith(f"/{end}")
