"""What `nulledit tune` leaves: a recipe with its evidence, and a report beside it.

NAME.yaml         the recipe, its evidence in comments; it comes last
NAME.tune.md      every candidate in its order, what was not tried, the judgement, the facts
NAME.tune.csv     the candidates in numbers
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from nulledit.io.jsonfiles import as_csv, write
from nulledit.io.text import count, plain
from nulledit.report.cells import ABSENT, heads, shown
from nulledit.report.document import Cell, Column, Document, Items, Part, StudyTable, Text, Value
from nulledit.report.markdown import markdown_page
from nulledit.tuning.measure import Measured
from nulledit.tuning.moves import said
from nulledit.tuning.objective import KINDS, difference, score, score_error
from nulledit.tuning.search import BOUND, NO_TIME, Candidate, Tuning

FORMULA = "H(efficacy, paraphrases, neighbours) - {weight:g} KL"
MEASURES = (
    *(Column(kind, kind, unit="%") for kind in KINDS),
    Column("kl", "KL", unit="mnat", digits=2),
    Column("worst", "worst 1 %", unit="%", digits=0),
    Column("growth", "growth of perplexity", unit="%", digits=2),
    Column("score", "score", digits=3),
)
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
    write(page_file, markdown_page(tuning_document(found, about)))
    write(table_file, as_csv(numbers_of(found)))
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


def tuning_document(found: Tuning, about: dict[str, str]) -> Document:
    """What the report shows."""
    nothing = "" if found.untried else "Not tried: nothing. No single change was taken any more."
    facts = [
        Items(tuple((f.id, f.subject) for f in side), title=f"{name} facts ({len(side)})")
        for name, side in (("Tuning", found.split.tuning), ("Report", found.split.report))
    ]
    return Document(
        f"Tuning of {about.get('model', 'a model')}",
        (
            Items(tuple(about.items())),
            *evidence(found),
            Text(nothing),
            *([untried_table(found)] if found.untried else []),
            *facts,
            Text(f"{count(found.split.left_out, 'fact')} of the file on neither side."),
        ),
    )


def evidence(found: Tuning) -> list[Part]:
    """What speaks for the recipe: in sentences, by candidate, and on facts that did not choose."""
    return [*map(Text, outline(found)), candidates_table(found), judged_table(found)]


def candidates_table(found: Tuning) -> StudyTable:
    """Every candidate with its measures; the winner is marked."""
    weight = found.settings.weight
    best = max(found.candidates, key=lambda c: score(c.measured.outcome, weight))
    rows: list[dict[str, Cell]] = []
    for place, c in enumerate(found.candidates):
        apart = difference(c.measured.outcome, best.measured.outcome, weight)
        rows.append(
            {
                "name": f"{_number(place)}{' (chosen)' if place == found.chosen else ''}",
                "changed": c.label,
                "from": "" if place == 0 else _number(c.base),
                **_cells(c.measured, weight),
                "apart": "best" if c is best else Value(*apart),
                "seconds": c.measured.seconds,
            }
        )
    columns = (
        *(Column("name", ""), Column("changed", "changed"), Column("from", "from")),
        *MEASURES,
        *(Column("apart", "to the best", digits=3), Column("seconds", "s", digits=0)),
    )
    caption = (
        f"{RULE} Seconds are wall time; values that an earlier candidate had optimised are not "
        "optimised again"
    )
    return StudyTable("candidates", "Candidates, in their order", caption, columns, tuple(rows))


def judged_table(found: Tuning) -> StudyTable:
    """The unedited model, the starting recipe and the winner on the report facts."""
    weight = found.settings.weight
    sides = {"starting recipe": found.started} | ({"chosen": found.judged} if found.chosen else {})
    none = ("kl", "worst", "growth", "score", "update")
    unedited: dict[str, Cell] = {"name": "unedited model", **dict.fromkeys(none, "")}
    rows = [unedited | {kind: Value.percent(found.unedited.rate(kind)) for kind in KINDS}]
    for name, m in sides.items():
        rows.append({"name": name, **_cells(m, weight), "update": m.update_share})
    columns = (Column("name", ""), *MEASURES, Column("update", "‖Δ‖/‖W₀‖", digits=3))
    caption = f"Score: {FORMULA.format(weight=weight)}"
    return StudyTable("judged", "Judged on the report facts", caption, columns, tuple(rows))


def untried_table(found: Tuning) -> StudyTable:
    """What was not measured, and why."""
    rows = [(u.label, f"changes {_number(u.base)}", u.reason) for u in found.untried]
    return StudyTable.of("untried", "Not tried", ("changed", "from", "why not"), rows)


def numbers_of(found: Tuning) -> list[dict[str, Any]]:
    """A row for each candidate on the tuning facts; start and winner on the report facts."""
    rows = [_row("tuning", i, c, c.measured, found) for i, c in enumerate(found.candidates)]
    rows.append(_row("report", 0, found.candidates[0], found.started, found))
    if found.chosen:
        rows.append(_row("report", found.chosen, found.winner, found.judged, found))
    return rows


def summary_of(found: Tuning, about: dict[str, str]) -> dict[str, Any]:
    """Plain data for --json."""
    rows, (gain, error) = numbers_of(found), found.gain
    return {
        "asked": about,
        "formula": FORMULA.format(weight=found.settings.weight),
        "facts": {
            "tuning": [fact.id for fact in found.split.tuning],
            "report": [fact.id for fact in found.split.report],
            "left_out": found.split.left_out,
        },
        "candidates": [row for row in rows if row["facts"] == "tuning"],
        "not_tried": [vars(u) for u in found.untried],
        "chosen": found.chosen,
        "recipe": found.winner.recipe.to_dict(),
        "report": {
            "unedited": {k: (r := found.unedited.rate(k)) and r.mean for k in KINDS},
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


def _cells(m: Measured, weight: float) -> dict[str, Cell]:
    return {
        **{kind: Value.percent(m.outcome.rate(kind)) for kind in KINDS},
        "kl": m.kl.value,
        "worst": 100 * m.kl.worst_share,
        "growth": 100 * m.growth,
        "score": Value(score(m.outcome, weight), score_error(m.outcome, weight)),
    }


def _line(m: Measured, weight: float) -> str:
    table = StudyTable("line", "", "", MEASURES, (_cells(m, weight),))
    cells = zip(heads(table), shown(table)[0], strict=False)  # but n
    return ", ".join(f"{head} {c.text} {c.error}".strip() for head, c in cells if c.text != ABSENT)


def _number(number: int) -> str:
    return f"candidate {number}" if number else "candidate 0, the start"
