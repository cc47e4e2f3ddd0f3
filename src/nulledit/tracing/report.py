"""The folder of a causal trace.

FOLDER/report.md              what was asked, found and suggested, and what that does not say
FOLDER/heatmap.png, .svg      mean effects by place and layer
FOLDER/effects.csv            the same in numbers: kind, place, layer, mean, standard_error, n
FOLDER/facts.csv              each traced fact with its probabilities, clean and corrupted
FOLDER/summary.json           settings, means, suggestion, seconds; it comes last
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nulledit.evaluation.stats import Rate
from nulledit.io.jsonfiles import as_csv, as_json, write
from nulledit.io.text import count
from nulledit.report import document as doc
from nulledit.report.markdown import markdown_page
from nulledit.tracing.location import Location
from nulledit.tracing.trace import LAST

NOT_SAID = (
    "The suggestion is where to begin, not where editing works best: by Hase et al. "
    "(arXiv:2301.04213), causal tracing tells nothing about which layer is best to edit. Try the "
    "line beside other ranges on facts that you keep for it (efficacy, generalization, "
    "specificity, perplexity), and take what does best there."
)


def summary_of(found: Location, model: str) -> dict[str, Any]:
    """Plain data: what was asked, the means, the suggestion, the time."""
    questions = found.questions
    return {
        "model": model,
        "settings": {**asdict(found.settings), "window": found.window},
        "depth": found.depth,
        "embedding_spread": found.spread,
        "facts": {
            "asked": questions.asked,
            "known": len(questions.known),
            "without_an_answer": questions.unnamed,
            "unknown": list(questions.unknown),
            "end_with_their_subject": list(questions.at_the_end),
        },
        "clean": asdict(found.clean),
        "corrupted": asdict(found.corrupted),
        "suggestion": {
            **asdict(found.suggestion),
            "recipe_line": found.suggestion.recipe_line,
        },
        "seconds": {
            "wall": found.wall_seconds,
            "cpu": found.cpu_seconds,
            "cpu_per_fact": found.cpu_seconds / len(found.traces),
        },
    }


def said(found: Location) -> list[str]:
    """What was found and what it suggests, in sentences."""
    questions, suggestion = found.questions, found.suggestion
    n = count(len(found.traces), "fact")
    lines = [f"The model says the answer of {len(questions.known)} of {questions.asked} facts."]
    if questions.unnamed:
        lines.append(
            f"{count(questions.unnamed, 'fact')} of these name no old answer: what the model says "
            "was traced, whether true or not."
        )
    if questions.at_the_end:
        left = count(len(questions.at_the_end), "fact")
        lines.append(f"Left out: {left} whose prompt ends with the subject.")
    lines.append(
        f"p(answer): {_rate(found.clean)} as the prompts are, {_rate(found.corrupted)} with noise "
        f"on the subjects ({n})."
    )
    first = max(
        e.rate.mean
        for e in found.effects()
        if (e.kind, e.place) == ("mlp", LAST) and e.layer < suggestion.lowest
    )
    written = "Layer 0's MLP output alone" if found.window == 1 else "MLP outputs from layer 0 on"
    lines.append(
        f"{written}, put back at the subject's last token: up to {first:+.3f}. Not counted below: "
        "layer 0's MLP sees little but the token that the noise was put on."
    )
    near = f"{suggestion.effect:.3f} ± {suggestion.standard_error:.3f}"
    where = f"the {found.window} layers around {suggestion.peak}"
    if found.window == 1:
        where = f"layer {suggestion.peak}"
    if not suggestion.layers:
        lines.append(
            f"No layers are suggested: the largest effect of other MLP outputs there, {near} for "
            f"{where}, does not stand out from zero."
        )
        return lines
    lines.append(
        f"Other MLP outputs there do most in {where}: {near}. With the facts drawn anew, that peak "
        f"lies between {suggestion.low} and {suggestion.high} (95 %)."
    )
    return lines


def location_document(found: Location, model: str) -> doc.Document:
    """What the folder's page shows."""
    settings, suggestion, n = found.settings, found.suggestion, len(found.traces)
    parts: list[doc.Part] = [doc.Text(sentence) for sentence in said(found)]
    if suggestion.layers:
        line = "A line for a recipe, a range that ends at the peak (after MEMIT, arXiv:2210.07229):"
        parts += [doc.Text(line), doc.Code(suggestion.recipe_line), doc.Text(NOT_SAID)]
    parts += [
        doc.Picture("heatmap.png", "Effects by place and layer"),
        effects_table(found),
        doc.Text(
            f"{count(settings.draws, 'draw')} of noise a fact, {settings.noise:g} times "
            f"{found.spread:.4g} (standard deviation of the subjects' embeddings), seed "
            f"{settings.seed}; windows of {count(found.window, 'layer')}; the answer's first "
            "token. ROME, arXiv:2202.05262."
        ),
        doc.Text(
            f"{found.cpu_seconds:.1f} CPU-seconds, {found.wall_seconds:.1f} of wall time: "
            f"{found.cpu_seconds / n:.2f} CPU-seconds a traced fact, asking included."
        ),
    ]
    left = {"not known": found.questions.unknown, "at the end": found.questions.at_the_end}
    out = tuple((why, ", ".join(ids)) for why, ids in left.items() if ids)
    return doc.Document(f"Causal trace of {model}", (*parts, doc.Items(out, title="Left out")))


def effects_table(found: Location) -> doc.StudyTable:
    """Both kinds of effects by layer, at the subject's last token."""
    rates = {(e.kind, e.layer): e.rate for e in found.effects() if e.place == LAST}
    columns = (
        doc.Column("layer", "layer"),
        doc.Column("state", "state", digits=3),
        doc.Column("mlp", f"window of {found.window}", digits=3),
    )
    rows: tuple[dict[str, doc.Cell], ...] = tuple(
        {
            "layer": str(i),
            **{kind: doc.Value(**asdict(rates[kind, i])) for kind in ("state", "mlp")},
        }
        for i in range(found.depth)
    )
    caption = (
        "Mean change of p(answer) over facts. A window has its layer in the middle and is shorter "
        "at both ends. All places are in effects.csv"
    )
    title = "Effects at the subject's last token"
    return doc.StudyTable("effects", title, caption, columns, rows)


def write_location(folder: Path, found: Location, model: str) -> None:
    """Write every file of the folder; `summary.json` comes last."""
    from nulledit.report.images import as_png, as_svg
    from nulledit.tracing.heatmap import heat_map

    folder.mkdir(parents=True, exist_ok=True)
    effects = [
        {"kind": e.kind, "place": e.place, "layer": e.layer, **asdict(e.rate)}
        for e in found.effects()
    ]
    write(folder / "effects.csv", as_csv(effects))
    facts = [
        {
            "id": t.question.fact_id,
            "answer": t.question.text,
            "given": t.question.given,
            "clean": t.clean,
            "corrupted": t.corrupted,
        }
        for t in found.traces
    ]
    write(folder / "facts.csv", as_csv(facts))
    figure = heat_map(found)
    write(folder / "heatmap.svg", as_svg(figure))
    write(folder / "heatmap.png", as_png(figure))
    write(folder / "report.md", markdown_page(location_document(found, model)))
    write(folder / "summary.json", as_json(summary_of(found, model)))


def _rate(rate: Rate) -> str:
    return f"{rate.mean:.3f} ± {rate.standard_error:.3f}"
