"""What one could do instead of editing: facts in the prompt, or a LoRA trained on them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from nulledit.baselines import LoraBaseline, LoraSettings, in_context
from nulledit.config import ContextSettings
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.evaluation.measures import PREFERENCE, STRICT
from nulledit.evaluation.runner import evaluate
from nulledit.studies.build import head, labels
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.declaration import Cells, Part, StudySpec, Table, named
from nulledit.studies.questions import FACTS, TEXT, hashed, told
from nulledit.studies.results import OF_TEXT, Results, Spot, number, quantity
from nulledit.studies.stream import StreamPlan


def _edited(lab: Lab, queue: list[Fact]) -> Iterable[StreamPlan]:
    return [replace(plan, label=f"edited: {plan.label}") for plan in named()(lab, queue)]


def _others(lab: Lab, results: Results) -> Iterator[Spot]:
    """Facts in the prompt, alone and in crowds, and a LoRA on the whole queue."""
    queue, base, encode = results.queue, results.base, lab.bench.model.encoder.encode
    lengths = [len(encode(f"{f.render(f.prompt)} {f.target}").ids) + 4 for f in queue]
    for crowd in lab.settings["crowds"]:
        rows = _prompted(lab, queue, crowd)
        label = "in the prompt: its own" + (f" and {crowd} more" if crowd else "")
        tokens = (crowd + 1) * sum(lengths) / len(lengths)
        yield Spot(label, 0, {"facts": rows}, base, extra={"tokens": tokens})
    try:
        found = _lora(lab, queue)
    except ConfigError as error:
        lab.notices.append(f"LoRA is absent: {error}")
        return
    seconds = found.pop("seconds") / len(queue)
    yield Spot("LoRA", 0, found, base, extra={"seconds": seconds})


def _prompted(lab: Lab, queue: Sequence[Fact], crowd: int) -> Any:
    def ask(editor: EditEngine) -> Any:
        return in_context(editor.editable, queue, crowd=crowd, seed=lab.seed, generate=False).rows()

    settings = {**hashed(queue), "crowd": crowd, "seed": lab.seed}
    return lab.of_unedited("in-context", settings, ask)


def _lora(lab: Lab, queue: Sequence[Fact]) -> dict[str, Any]:
    """Rows, text and seconds of a LoRA on the whole queue; ConfigError without PEFT."""
    size = lab.settings["batch_size"]
    wanted = LoraSettings(seed=lab.seed, contexts=ContextSettings(count=2))
    windows = lab.windows() if lab.sources.text else None

    def ask(editor: EditEngine) -> Any:
        base = lab.base_reading(editor) if windows else None
        start = time.perf_counter()
        with LoraBaseline(editor.editable, wanted) as lora:
            for at in range(0, len(queue), size):
                lora.train(queue[at : at + size])
            seconds = time.perf_counter() - start
            rows = evaluate(editor.editable, queue, generate=False).rows()
            text = told(lab.read(editor, base)) if base else None
        return {"rows": rows, "text": text, "seconds": seconds}

    of = {"lora": asdict(wanted), "batch_size": size, "windows": hash_of(windows)}
    found: dict[str, Any] = lab.of_unedited("lora-text", {**hashed(queue), **of}, ask)
    return {"facts": found.pop("rows"), **found}


def _seconds(spot: Spot) -> float | None:
    """Of everything that is done once, a fact."""
    if "own" not in spot.extra:
        return spot.extra.get("seconds")
    spent = [spot.extra[name] for name in ("own", "values")]
    return None if None in spent else sum(spent)


def _shows(results: Results) -> str:
    said = []
    for spot in results.rows[1:]:
        measures = ("efficacy_strict", "generalization_strict", "specificity")
        found = [number(quantity(name)(spot)) for name in measures]
        shown = ("absent" if value is None else f"{value:.1f}" for value in found)
        said.append(f"{spot.label}: {' / '.join(shown)}")
    return f"Strict efficacy / strict generalization / specificity (%): {'; '.join(said)}."


def _work(lab: Lab) -> Mapping[str, int]:
    """Of the crowds, whose prompts are longer, and of a LoRA."""
    facts, crowds = lab.settings["facts"], len(lab.settings["crowds"])
    read = {"perplexities": 1} if lab.sources.text else {}
    return {"asked": facts * (1 + 3 * crowds), "other_tokens": facts * 2000, **read}


INSTEAD = StudySpec(
    name="instead",
    title="Instead of editing",
    question="Why not put the facts in the prompt, or train a LoRA on them?",
    needs=("facts",),
    cannot_show="The prompt is told which fact to state: a retriever that misses would do worse, "
    "and one that fetches nothing for a neighbour better. One set of LoRA settings, chosen on the "
    "first records.",
    parts=(
        Part(
            _edited,
            asked=(FACTS, TEXT),
            tables=(
                Table(
                    "instead",
                    "Instead of editing",
                    "{edits} facts, the same questions for all. In the prompt, a neighbour's "
                    "question gets the same statements in front as the fact's own; weights, and "
                    "so other text, stay as they are. A LoRA is trained batch after batch; "
                    "nothing holds the rest of the model in place. Seconds of editing count "
                    "values that were optimised in this study's own stream.",
                    (
                        labels("what"),
                        *(*PREFERENCE, *STRICT, *OF_TEXT),
                        Cells(head("seconds", "once", "s/fact", 2), _seconds),
                        Cells(
                            head("tokens", "tokens/question", "", 0),
                            lambda spot: spot.extra.get("tokens", 0),
                        ),
                    ),
                ),
            ),
            shows=_shows,
            others=_others,
            more=_work,
        ),
    ),
)
