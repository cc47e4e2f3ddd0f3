"""What one could do instead of editing: facts in the prompt, or a LoRA trained on them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nulledit.baselines import LoraBaseline, LoraSettings, in_context
from nulledit.config import ContextSettings
from nulledit.data.facts import Fact
from nulledit.editing.editor import Editor
from nulledit.errors import ConfigError
from nulledit.evaluation.measures import PREFERENCE, STRICT
from nulledit.evaluation.runner import evaluate
from nulledit.report.document import Column, StudyTable
from nulledit.studies.context import Lab, hash_of, told
from nulledit.studies.methods_table import follow, unedited
from nulledit.studies.results import (
    Outcome,
    StudySpec,
    Work,
    rate_cells,
    rate_columns,
    text_cells,
    text_columns,
)
from nulledit.studies.scale import chosen
from nulledit.studies.stream import StreamPlan

MEASURES = (*PREFERENCE, *STRICT)


def plans(lab: Lab) -> list[StreamPlan]:
    """The edited arms."""
    queue = lab.facts(lab.settings["facts"], skip=lab.settings["skip"])
    return [lab.plan(arm, queue) for arm in chosen(lab.settings)]


def run_instead(lab: Lab) -> Outcome:
    """Editing against the prompt against LoRA, on the same questions."""
    edited = plans(lab)
    queue = edited[0].facts
    base_rows, base_text = unedited(lab, queue)
    columns = [Column("arm", "what"), *rate_columns(MEASURES)]
    if base_text is not None:
        columns += text_columns(2)
    columns += [
        Column("seconds", "once", None, "s/fact", 2),
        Column("tokens", "tokens/question", None, "", 0),
    ]
    base = {**rate_cells(base_rows, MEASURES), **text_cells(base_text, base_text)}
    rows: list[dict[str, Any]] = [{"arm": "unedited", **base, "tokens": 0}]
    for plan in edited:
        arm = follow(lab, plan, [len(queue)])
        text = text_cells(arm.text[len(queue)], base_text)
        known = arm.own_seconds is not None and arm.value_seconds is not None
        spent = (arm.own_seconds or 0) + (arm.value_seconds or 0) if known else None
        rows.append(_row(f"edited: {plan.label}", arm.end, text, spent, 0))
    for crowd in lab.settings["crowds"]:
        label = (
            "in the prompt: its own" if crowd == 0 else f"in the prompt: its own and {crowd} more"
        )
        found, tokens = _prompted(lab, queue, crowd)
        rows.append(_row(label, found, {}, None, tokens))
    lora = _lora(lab, queue)
    if lora is not None:
        text = text_cells(lora["text"], base_text)
        rows.append(_row("LoRA", lora["rows"], text, lora["seconds"] / len(queue), 0))
    caption = (
        f"{len(queue)} facts, the same questions for all. In the prompt, a neighbour's question "
        "gets the same statements in front as the fact's own; weights, and so other text, stay as "
        "they are. A LoRA is trained batch after batch; nothing holds the rest of the model in "
        "place. Seconds of editing count values that were optimised in this study's own stream."
    )
    table = StudyTable("instead", "Instead of editing", caption, tuple(columns), tuple(rows))
    said = []
    for row in rows[1:]:
        cells = [row[m] for m in ("efficacy_strict", "generalization_strict", "specificity")]
        said.append(
            f"{row['arm']}: "
            + " / ".join("absent" if c is None else f"{c.mean:.1f}" for c in cells)
        )
    return Outcome(
        "Strict efficacy / strict generalization / specificity (%): " + "; ".join(said) + ".",
        [table],
    )


def _row(
    label: str, rows: Any, text: Mapping[str, Any], seconds: float | None, tokens: float
) -> dict[str, Any]:
    return {
        "arm": label,
        **rate_cells(rows, MEASURES),
        **text,
        "seconds": seconds,
        "tokens": tokens,
    }


def _prompted(lab: Lab, queue: Sequence[Fact], crowd: int) -> tuple[Any, float]:
    settings = {"facts": hash_of([f.to_dict() for f in queue]), "crowd": crowd, "seed": lab.seed}

    def ask(editor: Editor) -> Any:
        return in_context(editor.editable, queue, crowd=crowd, seed=lab.seed, generate=False).rows()

    rows = lab.of_unedited("in-context", settings, ask)
    lengths = [
        len(lab.bench.model.encoder.encode(f"{fact.render(fact.prompt)} {fact.target}").ids) + 4
        for fact in queue
    ]
    return rows, (crowd + 1) * sum(lengths) / len(lengths)


def _lora(lab: Lab, queue: Sequence[Fact]) -> Any:
    """Rows, text and seconds of a LoRA on the whole queue; None without PEFT."""
    size = lab.settings["batch_size"]
    wanted = LoraSettings(seed=lab.seed, contexts=ContextSettings(count=2))
    windows = lab.windows() if lab.sources.text else None
    settings = {
        "facts": hash_of([f.to_dict() for f in queue]),
        "lora": asdict(wanted),
        "batch_size": size,
        "windows": hash_of(windows),
    }

    def ask(editor: Editor) -> Any:
        base = lab.base_reading(editor) if windows else None
        start = time.perf_counter()
        with LoraBaseline(editor.editable, wanted) as lora:
            for at in range(0, len(queue), size):
                lora.train(queue[at : at + size])
            seconds = time.perf_counter() - start
            rows = evaluate(editor.editable, queue, generate=False).rows()
            text = told(lab.read(editor, base)) if base else None
        return {"rows": rows, "text": text, "seconds": seconds}

    try:
        return lab.of_unedited("lora-text", settings, ask)
    except ConfigError as error:
        lab.notices.append(f"LoRA is absent: {error}")
        return None


INSTEAD = StudySpec(
    name="instead",
    title="Instead of editing",
    question="Why not put the facts in the prompt, or train a LoRA on them?",
    needs=("facts",),
    cannot_show="The prompt is told which fact to state: a retriever that misses would do worse, "
    "and one that fetches nothing for a neighbour better. One set of LoRA settings, chosen on the "
    "first records.",
    work=lambda lab: Work(
        plans(lab),
        asked=lab.settings["facts"] * (3 + 3 * len(lab.settings["crowds"])),
        perplexities=3 if lab.sources.text else 0,
        other_tokens=lab.settings["facts"] * 2000,
    ),
    run=run_instead,
)
