"""What `nulledit tune` leaves: a recipe with its evidence, and a report beside it.

NAME.yaml         the recipe, its evidence in comments; it comes last
NAME.tune.md      every candidate in its order, what was not tried, the judgement, the facts
NAME.tune.csv     the candidates in numbers
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nulledit.data.facts import Fact
from nulledit.evaluation.stats import Rate
from nulledit.io.jsonfiles import write
from nulledit.io.text import count, markdown, plain
from nulledit.report.tables import Table, as_markdown, number
from nulledit.tuning.measure import Measured
from nulledit.tuning.moves import said
from nulledit.tuning.objective import KINDS, Outcome, difference, score, score_error
from nulledit.tuning.search import BOUND, NO_TIME, Candidate, Tuning

FORMULA = "H(efficacy, paraphrases, neighbours) - {weight:g} KL"
TEXT = ("KL (mnat)", "worst 1 %", "perplexity")
RULE = (
    "A candidate whose score is less than one standard error of the paired difference below the "
    "best ties with it; of those that tie, the one with the smallest KL is taken, then the one "
    "with the fewest steps."
)


def beside(recipe: Path) -> tuple[Path, Path]:
    """The report's files, Markdown and CSV, of a recipe's file."""
    return recipe.with_name(f"{recipe.stem}.tune.md"), recipe.with_name(f"{recipe.stem}.tune.csv")


def write_tuning(file: Path, found: Tuning, about: dict[str, str]) -> None:
    """Write the report, then the recipe; each whole or not at all.

    `about`: what was asked (model, facts, text, seed, start), for people.
    """
    page_file, table_file = beside(file)
    write(page_file, page(found, about))
    write(table_file, as_csv(found))
    write(file, recipe_text(found, about))


def recipe_text(found: Tuning, about: dict[str, str]) -> str:
    """The winner as YAML that `load_recipe` reads, with the evidence in comments."""
    lines = [
        "Made by nulledit tune.",
        *(f"{name}: {told}" for name, told in about.items()),
        *outline(found),
        "Batch size and all settings that the report does not name are the starting recipe's.",
    ]
    head = "\n".join(f"# {plain(line)}" for line in lines)
    return f"{head}\n{found.winner.recipe.to_yaml()}"


def outline(found: Tuning) -> list[str]:
    """What was done and found, in sentences."""
    split, weight = found.split, found.settings.weight
    winner = found.winner
    lines = [
        f"Score: {FORMULA.format(weight=weight)}, means over facts, KL there in nats; ± is a "
        "standard error.",
        f"{count(len(found.candidates), 'candidate')} on {len(split.tuning)} tuning facts, judged "
        f"on {len(split.report)} report facts of other subjects; {untried_in_words(found)}; "
        f"{found.seconds:.0f} s of wall time, {found.cpu_seconds:.0f} CPU-seconds.",
        f"Chosen: {_number(found.chosen)} ({path_of(found)}).",
        f"On the tuning facts, which flatter what they chose: {_line(winner.measured, weight)}.",
        f"On the report facts: {_line(found.judged, weight)}.",
    ]
    if found.chosen == 0:
        lines.append("It is the starting recipe: no other that was tried was taken.")
        return lines
    lines.append(f"Starting recipe on the report facts: {_line(found.started, weight)}.")
    gain, error = found.gain
    verdict = "a tie by its standard error"
    if abs(gain) >= error and gain != 0:
        verdict = "better" if gain > 0 else "worse: think twice before you use it"
    lines.append(f"Chosen above start on the report facts: {gain:+.3f} ± {error:.3f}, {verdict}.")
    return lines


def untried_in_words(found: Tuning) -> str:
    """How many candidates were not measured, and why."""
    total = len(found.untried)
    reasons = {NO_TIME: "for lack of time", BOUND: "for the bound on candidates"}
    counts = Counter(reasons.get(u.reason, "for lack of what they need") for u in found.untried)
    why = ", ".join(f"{n} {reason}" for reason, n in counts.items())
    return f"{total} not tried ({why})" if total else "nothing left to try"


def path_of(found: Tuning) -> str:
    """The changes that lead from the starting recipe to the winner."""
    labels: list[str] = []
    at = found.chosen
    while at:
        labels.append(found.candidates[at].label)
        at = found.candidates[at].base
    return ", then ".join(reversed(labels)) or found.candidates[0].label


def page(found: Tuning, about: dict[str, str]) -> str:
    """The report as Markdown."""
    weight = found.settings.weight
    parts = [
        f"# Tuning of {markdown(about.get('model', 'a model'))}",
        "\n".join(f"- {markdown(name)}: {markdown(told)}" for name, told in about.items()),
        *map(markdown, outline(found)),
        "## Candidates, in their order",
        as_markdown(candidates_table(found), left=(1, 2)),
        f"{RULE} Seconds are wall time; values that an earlier candidate had optimised are not "
        "optimised again.",
        "## Judged on the report facts",
        as_markdown(judged_table(found)),
        f"Score: {markdown(FORMULA.format(weight=weight))}.",
        "## Not tried",
    ]
    if found.untried:
        parts.append(as_markdown(untried_table(found), left=3))
    else:
        parts.append("Nothing: the search ended where no single change was taken any more.")
    for title, facts in (("Tuning", found.split.tuning), ("Report", found.split.report)):
        parts += [f"## {title} facts ({len(facts)})", _names(facts)]
    parts.append(f"{count(found.split.left_out, 'fact')} of the file on neither side.")
    return "\n\n".join(parts) + "\n"


def candidates_table(found: Tuning) -> Table:
    """Every candidate with its measures; the winner is marked."""
    head = ["", "changed", "from", *KINDS, *TEXT, "score", "to the best", "s"]
    weight = found.settings.weight
    best = max(found.candidates, key=lambda c: score(c.measured.outcome, weight))
    rows: list[Sequence[str]] = []
    for place, c in enumerate(found.candidates):
        m = c.measured
        apart = (
            "best"
            if c is best
            else _plus_minus(*difference(m.outcome, best.measured.outcome, weight))
        )
        mark = f"{_number(place)}{' (chosen)' if place == found.chosen else ''}"
        rows.append(
            [
                mark,
                c.label,
                "" if place == 0 else _number(c.base),
                *_measures(m, weight),
                apart,
                f"{m.seconds:.0f}",
            ]
        )
    return head, rows


def judged_table(found: Tuning) -> Table:
    """The unedited model, the starting recipe and the winner on the report facts."""
    weight = found.settings.weight
    unedited = [*(_rate(found.unedited.rate(kind)) for kind in KINDS), *[""] * len(TEXT), "", ""]
    rows: list[Sequence[str]] = [["unedited model", *unedited]]
    sides = {"starting recipe": found.started}
    if found.chosen:
        sides["chosen"] = found.judged
    for name, m in sides.items():
        rows.append([name, *_measures(m, weight), f"{m.update_share:.3f}"])
    return ["", *KINDS, *TEXT, "score", "‖Δ‖/‖W₀‖"], rows


def untried_table(found: Tuning) -> Table:
    """What was not measured, and why."""
    rows: list[Sequence[str]] = [
        [u.label, f"changes {_number(u.base)}", u.reason] for u in found.untried
    ]
    return ["changed", "from", "why not"], rows


def as_csv(found: Tuning) -> str:
    """A row for each candidate on the tuning facts; start and winner on the report facts."""
    rows = [
        _row("tuning", number, c, c.measured, found) for number, c in enumerate(found.candidates)
    ]
    rows.append(_row("report", 0, found.candidates[0], found.started, found))
    if found.chosen:
        rows.append(_row("report", found.chosen, found.winner, found.judged, found))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    # Nothing is written for what there is not, rather than nan.
    writer.writerows({k: "" if v is None or v != v else v for k, v in r.items()} for r in rows)
    return text.getvalue()


def summary_of(found: Tuning, about: dict[str, str]) -> dict[str, Any]:
    """Plain data for --json."""
    rows = [_row("tuning", i, c, c.measured, found) for i, c in enumerate(found.candidates)]
    gain, error = found.gain
    return {
        "asked": about,
        "formula": FORMULA.format(weight=found.settings.weight),
        "facts": {
            "tuning": [fact.id for fact in found.split.tuning],
            "report": [fact.id for fact in found.split.report],
            "left_out": found.split.left_out,
        },
        "candidates": rows,
        "not_tried": [vars(u) for u in found.untried],
        "chosen": found.chosen,
        "recipe": found.winner.recipe.to_dict(),
        "report": {
            "unedited": {kind: _mean(found.unedited, kind) for kind in KINDS},
            "start": _row("report", 0, found.candidates[0], found.started, found),
            "chosen": _row("report", found.chosen, found.winner, found.judged, found),
            "gain": {"mean": gain, "standard_error": error},
        },
        "seconds": {"wall": found.seconds, "cpu": found.cpu_seconds},
    }


def _row(side: str, number: int, c: Candidate, m: Measured, found: Tuning) -> dict[str, Any]:
    weight = found.settings.weight
    recipe = c.recipe
    row: dict[str, Any] = {
        "facts": side,
        "candidate": number,
        "from": c.base,
        "stage": c.stage,
        "changed": c.label,
        "layers": said(recipe.layers),
        "learning_rate": recipe.values.learning_rate,
        "steps": recipe.values.steps,
        "clamp": recipe.values.clamp,
        "null_space": f"{recipe.null_space.rule}={recipe.null_space.value:g}",
    }
    for kind in KINDS:
        rate = m.outcome.rate(kind)
        row |= {kind: rate and rate.mean, f"{kind}_se": rate and rate.standard_error}
        row[f"{kind}_n"] = rate.n if rate else 0
    return row | {
        "kl_mnat": m.kl.value,
        "kl_mnat_se": m.kl.standard_error,
        "kl_worst_share": m.kl.worst_share,
        "perplexity_growth": m.growth,
        "score": score(m.outcome, weight),
        "score_se": score_error(m.outcome, weight),
        "update_share": m.update_share,
        "passes": m.passes,
        "optimised": m.optimised,
        "seconds": round(m.seconds, 3),
        "cpu_seconds": round(m.cpu_seconds, 3),
        "chosen": number == found.chosen,
    }


def _measures(m: Measured, weight: float) -> list[str]:
    rates = [_rate(m.outcome.rate(kind)) for kind in KINDS]
    own = _plus_minus(score(m.outcome, weight), score_error(m.outcome, weight), sign="")
    kl = m.kl
    text = [number(kl.value), f"{100 * kl.worst_share:.0f} %", f"{100 * m.growth:+.2f} %"]
    return [*rates, *text, own]


def _line(m: Measured, weight: float) -> str:
    kinds = [f"{kind} {_rate(m.outcome.rate(kind))}" for kind in KINDS if m.outcome.rate(kind)]
    own = _plus_minus(score(m.outcome, weight), score_error(m.outcome, weight), sign="")
    return (
        f"score {own}: {', '.join(kinds)}, KL {number(m.kl.value)} mnat a token "
        f"({100 * m.kl.worst_share:.0f} % of it in the worst 1 %), perplexity "
        f"{100 * m.growth:+.2f} %"
    )


def _mean(outcome: Outcome, kind: str) -> float | None:
    rate = outcome.rate(kind)
    return rate.mean if rate else None


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "absent"
    return f"{100 * rate.mean:.1f} ± {100 * rate.standard_error:.1f} %"


def _plus_minus(value: float, error: float, sign: str = "+") -> str:
    return f"{value:{sign}.3f} ± {error:.3f}"


def _number(number: int) -> str:
    return f"candidate {number}" if number else "candidate 0, the start"


def _names(facts: Sequence[Fact]) -> str:
    return "\n".join(f"- {markdown(f.id)}: {markdown(f.subject)}" for f in facts)
