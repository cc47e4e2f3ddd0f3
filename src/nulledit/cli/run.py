"""`nulledit run`: one file for a pipeline."""

from __future__ import annotations

from typing import Any

from nulledit.cli.command import Call, command
from nulledit.cli.common import emit
from nulledit.cli.options import arg, model_source, opt
from nulledit.errors import ConfigError
from nulledit.io.text import count


@command(
    "Edit, check, export and report, as one YAML file says.",
    arg("job", "[JOB]"),
    opt("--dry-run", "Check the file, estimate time and memory; edit nothing.", bool),
    opt("--schema", "Print the JSON Schema of such files.", bool),
)
def run(call: Call) -> None:
    """Do what a job's file says: a model, facts, recipe, limits, exports, a report.

    Everything that needs no model is checked first. If a limit is broken nothing is written and the
    exit code is 1; 2 says that something can't be, 130 that it was interrupted. The same command
    goes on with a run that is there: facts that it has are left out.

    \b
    $ nulledit run job.yaml
    $ nulledit run job.yaml --dry-run
    $ nulledit run --schema > job.schema.json

    \b
    model: smollm2-135m
    facts: [facts.yaml]
    out: run
    gate: default
    exports: [{kind: lora, out: adapter}]
    report: report.html
    """
    if call.schema:
        return emit(job_schema())
    if call.job is None:
        raise ConfigError("give a job's file: nulledit run job.yaml (--schema says what it holds)")
    from nulledit.api.job import inputs_of, load_job, run_job

    job = load_job(call.job)
    call.prepare()
    if call.dry_run:
        from nulledit.evaluation.costs import estimate_edit

        inputs = inputs_of(job)
        size = estimate_edit(
            model_source(job.model),
            inputs.facts,
            inputs.recipe,
            device=job.device,
            dtype=job.dtype,
            retries=job.retry,
            old_answers=job.old_answers,
            text=job.text,
        )
        return call.show(size, lambda: [_told(size)])
    from nulledit.cli.export import lines_of
    from nulledit.cli.run_page import page_of, refusal_shown

    with refusal_shown(call):
        done = run_job(job, talk=call.talk)

    def shown() -> list[Any]:
        parts: list[Any] = list(page_of(done.result)) if done.result else []
        parts += ["\n".join(lines_of(export)) for export in done.exports]
        return [*parts, *([f"Page: {done.report}"] if done.report else [])]

    return call.show(done.to_dict, shown)


def _told(size: dict[str, Any]) -> str:
    low, high = size["seconds_usual"]
    return (
        f"{count(size['facts'], 'fact')} in {count(size['batches'], 'batch')}: at most "
        f"{size['seconds_in_all']:.0f} s and about {size['peak_bytes'] / 1e9:.1f} GB at the peak. "
        f"Usually {low:.0f} to {high:.0f} s. Nothing was edited."
    )


def job_schema() -> dict[str, Any]:
    """The JSON Schema of jobs."""
    from nulledit.api.job import ExportJob, Job
    from nulledit.cli.recipe import described

    found = described(Job)
    found["$defs"] = {"ExportJob": described(ExportJob)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found
