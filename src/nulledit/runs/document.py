"""A run as a study, which is plain data, and as the document that is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nulledit.io.text import count, percent, without_folders
from nulledit.report.document import (
    Document,
    Example,
    Heading,
    Items,
    Part,
    Study,
    StudyTable,
    Text,
    Value,
)
from nulledit.report.study import settings_of
from nulledit.runs.fact_list import fact_list
from nulledit.runs.holding import headline, held, neighbours_changed, reasons
from nulledit.runs.tables import (
    SHOWN,
    answers_table,
    layers_table,
    of_text,
    rates_spec,
    rates_tables,
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run that a page is made of."""

    name: str
    """As the page calls it."""
    summary: Mapping[str, Any]
    """`summary.json`."""
    lines: Sequence[Mapping[str, Any]]
    """`results.jsonl`."""
    recipe: Mapping[str, Any]
    """`recipe.yaml`."""
    environment: Sequence[Mapping[str, Any]]
    """`environment.json`."""

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """Those of its runs that were evaluated, oldest first."""
        return [run for run in self.summary["runs"] if run["after"]]

    @property
    def measured(self) -> Mapping[str, Any] | None:
        """What the last evaluation found, if nothing has changed the run since."""
        if not self.evaluated:
            return None
        last, now = self.evaluated[-1], self.summary["state"]
        found: Mapping[str, Any] = last["after"]
        return found if last.get("state", now) == now else None


def run_study(run: RunFolder) -> Study:
    """The run as a study: rates, preservation, figure, what the model says."""
    seconds = [r["seconds"] for r in run.summary["runs"]]
    last = run.evaluated[-1] if run.evaluated else None
    notices = [n for r in run.summary["runs"] for n in r["notices"]]
    if last is None:
        notices.append("Not evaluated: `nulledit evaluate` measures it.")
    tables = [table for call in run.evaluated for table in _rates(run, call, whole=True)]
    if last and last["layers"]:
        tables.append(layers_table(last["layers"]))
    return Study(
        name="run",
        title=run.name,
        question="",
        scale="small",
        settings=run.recipe,
        environment=tuple(run.environment),
        seconds={"wall": sum(sum(s.values()) for s in seconds)} if seconds else {},
        shows="",
        cannot_show="",
        notices=tuple(notices),
        tables=tuple(tables),
        figures=(rates_spec({side: last[side] for side in ("before", "after")}),) if last else (),
        examples=examples(run),
        nulledit=run.summary["version"],
    )


def run_document(run: RunFolder, study: Study | None = None, source: str = "") -> Document:
    """The run as it is shown, its last call first.

    With its `study` it is whole: every fact in one list, differences fact by fact, and settings,
    which the page in the run's folder leaves to the files beside it.
    """
    base = run.summary["base"]
    parts: list[Part] = [
        Text(run_sentence(run), "quiet"),
        Text(
            f"Weights of the base {base['hash'][:12]}, state {run.summary['state'][:12]}. The "
            "settings are in recipe.yaml, every fact in results.jsonl.",
            "quiet",
        ),
    ]
    if study is not None:
        present = [line for line in run.lines if line.get("active", True)]
        parts += [
            Text(headline(present) or "Not evaluated.", "strong"),
            Text(side_effects(present, run.measured)),
            fact_list(run.lines),
        ]
        if run.evaluated and run.measured is None:
            since = "The run has changed since it was evaluated: `nulledit evaluate` measures it."
            parts.insert(-1, Text(since))
    for call in reversed(run.summary["runs"]):
        end = f"-{call['run']}"
        tables = [t for t in study.tables if t.name.endswith(end)] if study else None
        parts += call_parts(run, call, tables=tables)
    if study is not None:
        parts += settings_of(study, source)
    return Document(run.name, tuple(parts))


def call_parts(
    run: RunFolder,
    call: Mapping[str, Any],
    *,
    tables: Sequence[StudyTable] | None = None,
    folder: str = "RUN",
) -> Iterator[Part]:
    """One call of `edit`: which facts hold, answers, rates, layers.

    `tables`: its rates, on a page that lists the facts and their answers by itself. `folder`: the
    run's, in what to do next.
    """
    lines = [line for line in run.lines if line["run"] == call["run"]]
    first, final = call["batches"] if call["batches"] else (0, 0)
    which = f"batches {first} to {final}" if final > first else f"batch {first}"
    which = which if final else "no new batch"
    yield Heading(f"Run {call['run']}: {count(call['facts'], 'fact')}, {which}")
    spent = ", ".join(f"{stage} {value:.1f}" for stage, value in call["seconds"].items())
    yield Text(f"{call['time']}. Seconds: {spent}.", "quiet")
    if call["known"]:
        known = f"The model said {call['known']} of them before"
        yield Text(f"{known}; they were written all the same.")
    if tables is None or len(run.summary["runs"]) > 1:  # else the page begins with it
        yield Text(headline(lines) if call["after"] else "Not evaluated.", "strong")
        yield Text(side_effects(lines, call["after"]))
    if lines and tables is None:
        yield answers_table(lines, f"answers-{call['run']}")
        if wrong := tuple(reasons(lines, folder)):
            title = "What does not hold, and why"
            yield Items(wrong, title=title, most=SHOWN, more="in results.jsonl")
    if call["after"]:
        yield from _rates(run, call, whole=False) if tables is None else tables
        for i, (name, sides) in enumerate(call.get("others", {}).items()):
            yield from rates_tables(sides, name=f"{call['run']}-{i}", which=f". Asked {name}")
        if call is run.evaluated[-1]:
            yield rates_spec({side: call[side] for side in ("before", "after")})
    if call["layers"]:
        yield layers_table(call["layers"], f"layers-{call['run']}")
    if shares := [
        (share, d["batch"], layer)
        for d in call.get("displaced", ())
        for layer, share in d["layers"].items()
        if share is not None
    ]:
        most, batch, layer = max(shares)
        yield Text(
            "Outputs at the keys of facts before a batch moved by at most "
            f"{percent(most)} (batch {batch}, layer {layer}).",
            "quiet",
        )
    notices = tuple(map(without_folders, call["notices"]))
    yield Items(notices, title="Notices", tone="note", most=SHOWN, more="in summary.json")


def side_effects(lines: Sequence[Mapping[str, Any]], after: Mapping[str, Any] | None) -> str:
    """What else changed: facts whose neighbours did, and KL on other text; empty if not asked."""
    said = []
    if (moved := neighbours_changed(lines)) is not None:
        said.append(
            f"strict answers of neighbours of {count(moved, 'fact')} changed"
            if moved
            else "no neighbour's strict answer changed"
        )
    kl = of_text(after, "kl")
    if isinstance(kl, Value) and kl.mean is not None:
        said.append(f"KL on other text {kl.mean:.2g} mnat a token")
    text = ", ".join(said)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def run_sentence(run: RunFolder) -> str:
    """What was run, in one sentence."""
    summary = run.summary
    base, about = summary["base"], dict(run.environment[-1]) if run.environment else {}
    method = (run.recipe.get("method") or {}).get("name")
    words = [
        f"{count(summary['facts'], 'fact')} in",
        without_folders(base["model"]) if base["model"] else "a model in memory",
        f"({base['dtype']})",
        f"written by {method}" if method else "written",
        f"in {count(summary['batches'], 'batch')}",
        f"on {about['device']}" if about.get("device") else "",
        f"with nulledit {summary['version']}",
    ]
    when = summary["runs"][-1]["time"][:10] if summary["runs"] else ""
    return " ".join(w for w in words if w) + (f", {when}." if when else ".")


def examples(run: RunFolder) -> tuple[Example, ...]:
    """Each evaluated fact that is in the model: its text before and after."""
    return tuple(
        Example(
            arm="",
            prompt=line["prompt"],
            target=line["target"],
            before=(line["before"] or {}).get("answer"),
            after=line["after"].get("answer"),
            holds=held(line),
        )
        for line in run.lines
        if line["after"] and line.get("active", True)
    )


def _rates(run: RunFolder, call: Mapping[str, Any], *, whole: bool) -> list[StudyTable]:
    lines = [line for line in run.lines if line["run"] == call["run"] and line["after"]]
    which = f" of run {call['run']}" if len(run.evaluated) > 1 else ""
    if call.get("others"):
        which += f". Asked {call['asked']}, as edited"
    return rates_tables(
        {"before": call["before"], "after": call["after"]},
        name=str(call["run"]),
        which=which,
        text=call["text"],
        lines=lines if whole else None,
    )
