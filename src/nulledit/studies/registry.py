"""The studies by name, and how one is run into a folder.

Every `StudySpec` in a module of this package is a study of the command line: a new one is a file.
"""

from __future__ import annotations

import json
import pkgutil
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nulledit.data.facts import suggest
from nulledit.errors import ConfigError, ReportError
from nulledit.report.document import Study
from nulledit.report.study import read_study, write_study
from nulledit.runs.folder import environment
from nulledit.studies.build import examples, figures, tables
from nulledit.studies.context import Lab
from nulledit.studies.declaration import StudySpec
from nulledit.studies.follow import follow
from nulledit.studies.scale import check_settings

STUDIES: dict[str, StudySpec] = {}


def register(spec: StudySpec) -> StudySpec:
    """Make `spec` known to the command line; ConfigError if its name is taken."""
    if STUDIES.setdefault(spec.name, spec) is not spec:
        raise ConfigError(f"a study {spec.name!r} is registered already")
    return spec


for _module in pkgutil.iter_modules([str(Path(__file__).parent)], "nulledit.studies."):
    for _spec in tuple(vars(import_module(_module.name)).values()):
        if isinstance(_spec, StudySpec):
            register(_spec)


def find_study(name: str) -> StudySpec:
    """A study by name; ConfigError that suggests near names."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name!r}{suggest(name, STUDIES)}; known: {', '.join(STUDIES)}")
    return STUDIES[name]


def run_study(spec: StudySpec, lab: Lab, folder: Path) -> Study:
    """Run `spec` and write its folder; what was edited or answered before is taken up."""
    spec.check(lab.sources)
    check_settings(lab.settings)
    wall, cpu = time.perf_counter(), time.process_time()
    found = [(part, results) for part in spec.parts if (results := follow(lab, part))]
    shown: dict[str, Any] = {
        "shows": " ".join(filter(None, (part.shows(results) for part, results in found))),
        "tables": tuple(table for part, results in found for table in tables(results, part)),
        "figures": tuple(figure for part, results in found for figure in figures(results, part)),
        "examples": tuple(
            example for part, results in found if part.examples for example in examples(results)
        ),
    }
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    settings = _settings(lab)
    here = ({**environment(lab.bench.base), "seed": lab.seed, "seconds": seconds},)
    earlier = _earlier(folder, settings)
    study = Study(
        name=spec.name,
        title=spec.title,
        question=spec.question,
        scale=lab.scale.name,
        settings=settings,
        environment=(*earlier, *here),
        seconds={
            name: spent + sum(e["seconds"][name] for e in earlier if "seconds" in e)
            for name, spent in seconds.items()
        },
        cannot_show=spec.cannot_show,
        notices=tuple(lab.notices),
        **shown,
    )
    write_study(folder, study)
    return study


def _earlier(folder: Path, settings: dict[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Environments of the calls before that made the same study here."""
    try:
        before = read_study(folder)
    except ReportError:
        return ()
    return before.environment if before.settings == json.loads(json.dumps(settings)) else ()


def _settings(lab: Lab) -> dict[str, Any]:
    named = {k: Path(v).name for k, v in vars(lab.sources).items() if v is not None}
    return {
        "model": lab.bench.name,
        "scale": lab.scale.name,
        "seed": lab.seed,
        "sources": named,
        "study": dict(lab.settings),
        "recipe": lab.recipe.to_dict(),
        "arms": {name: dict(changes) for name, changes in lab.scale.arms.items()},
    }
