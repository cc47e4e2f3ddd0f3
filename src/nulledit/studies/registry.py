"""The studies by name, and how one is run into a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nulledit.data.facts import suggest
from nulledit.errors import ConfigError
from nulledit.report.run import environment
from nulledit.report.study import Study, write_study
from nulledit.studies.behaviour import CAPABILITY, CATEGORIES, DRIFT
from nulledit.studies.building import StudySpec
from nulledit.studies.instead import INSTEAD
from nulledit.studies.lab import Lab
from nulledit.studies.one_batch import CORPUS, PRESERVATION, THRESHOLD
from nulledit.studies.sizes import ORDER, SCALE
from nulledit.studies.streams import PROJECTION, TABLE1

STUDIES: Mapping[str, StudySpec] = {
    spec.name: spec
    for spec in (
        TABLE1,
        PROJECTION,
        CAPABILITY,
        DRIFT,
        CATEGORIES,
        THRESHOLD,
        PRESERVATION,
        CORPUS,
        SCALE,
        ORDER,
        INSTEAD,
    )
}


def find_study(name: str) -> StudySpec:
    """A study by name; ConfigError that suggests near names."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name!r}{suggest(name, STUDIES)}; known: {', '.join(STUDIES)}")
    return STUDIES[name]


def run_study(spec: StudySpec, lab: Lab, folder: Path) -> Study:
    """Run `spec` and write its folder; what was edited or measured before is taken up."""
    spec.check(lab.sources)
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = spec.run(lab)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    study = Study(
        name=spec.name,
        title=spec.title,
        question=spec.question,
        scale=lab.scale.name if lab.scale.name in ("small", "paper") else "small",
        settings=_settings(lab),
        environment=(environment(lab.bench.base),),
        seconds=seconds,
        shows=outcome.shows,
        cannot_show=spec.cannot_show,
        notices=tuple(lab.notices),
        tables=tuple(outcome.tables),
        figures=tuple(outcome.figures),
        examples=tuple(outcome.examples),
    )
    write_study(folder, study)
    return study


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
