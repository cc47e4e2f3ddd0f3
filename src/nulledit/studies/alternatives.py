"""What one could do instead of editing: facts in the prompt, or fine-tuning on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from nulledit.baselines import (
    LocalBaseline,
    LocalSettings,
    LoraBaseline,
    LoraSettings,
    in_context,
)
from nulledit.baselines.training import Trained, TrainingSettings
from nulledit.config import ContextSettings
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError, ModelError
from nulledit.evaluation.measures import PREFERENCE, STRICT
from nulledit.evaluation.runner import evaluate
from nulledit.models.editable_model import EditableModel
from nulledit.studies.build import head, labels
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.declaration import Cells, Part, StudySpec, Table, named
from nulledit.studies.questions import FACTS, TEXT, hashed, told
from nulledit.studies.results import OF_TEXT, Results, Spot, number, quantity
from nulledit.studies.scale import PLACES
from nulledit.studies.stream import StreamPlan

CONTEXTS = ContextSettings(count=2)
TOKENS = {"lora": 2000, "local": 4000}
"""What training takes, as tokens run a fact."""


def in_the_prompt(lab: Lab, queue: Sequence[Fact], crowd: int = 0, speak: bool = False) -> Any:
    """Rows of the unedited model with each fact's statement, and `crowd` others, in front."""

    def ask(editor: EditEngine) -> Any:
        return in_context(editor.editable, queue, crowd=crowd, seed=lab.seed, generate=speak).rows()

    settings = {
        **hashed(queue),
        "crowd": crowd,
        "seed": lab.seed,
        **({"speak": 1} if speak else {}),
    }
    return lab.of_unedited("in-context", settings, ask)


def trained(
    lab: Lab,
    queue: Sequence[Fact],
    name: str,
    settings: TrainingSettings,
    make: Callable[[EditableModel, Any], Trained[Any]],
    speak: bool = False,
) -> dict[str, Any]:
    """What is found of a model that is trained on the queue, batch after batch, and the seconds."""
    size = lab.settings["batch_size"]
    windows = lab.windows() if lab.sources.text else None

    def ask(editor: EditEngine) -> Any:
        base = lab.base_reading(editor) if windows else None
        start = time.perf_counter()
        with make(editor.editable, settings) as baseline:
            for at in range(0, len(queue), size):
                baseline.train(queue[at : at + size])
            seconds = time.perf_counter() - start
            rows = evaluate(editor.editable, queue, generate=speak).rows()
            text = told(lab.read(editor, base)) if base else None
        return {"rows": rows, "text": text, "seconds": seconds}

    of = {name: asdict(settings), "batch_size": size, "windows": hash_of(windows)}
    of |= {"speak": 1} if speak else {}
    found: dict[str, Any] = lab.of_unedited(f"{name}-text", {**hashed(queue), **of}, ask)
    return {"facts": found.pop("rows"), **found}


def lora(lab: Lab, queue: Sequence[Fact], speak: bool = False) -> dict[str, Any]:
    """A LoRA on the whole queue; ConfigError without PEFT."""
    settings = LoraSettings(seed=lab.seed, contexts=CONTEXTS)
    return trained(lab, queue, "lora", settings, LoraBaseline, speak)


def local(lab: Lab, queue: Sequence[Fact], speak: bool = False) -> dict[str, Any]:
    """Fine-tuning of W of the middle one of the base recipe's layers."""
    (layer,) = PLACES["middle"](lab.recipe.layers)
    settings = LocalSettings(layer=layer, seed=lab.seed, contexts=CONTEXTS)
    return trained(lab, queue, "local", settings, LocalBaseline, speak)


def _edited(lab: Lab, queue: list[Fact]) -> Iterable[StreamPlan]:
    return [replace(plan, label=f"edited: {plan.label}") for plan in named()(lab, queue)]


def _others(lab: Lab, results: Results) -> Iterator[Spot]:
    """Facts in the prompt, alone and in crowds, and fine-tuning on the whole queue."""
    queue, base, encode = results.queue, results.base, lab.bench.model.encoder.encode
    lengths = [len(encode(f"{f.render(f.prompt)} {f.target}").ids) + 4 for f in queue]
    for crowd in lab.settings["crowds"]:
        rows = in_the_prompt(lab, queue, crowd)
        label = "in the prompt: its own" + (f" and {crowd} more" if crowd else "")
        tokens = (crowd + 1) * sum(lengths) / len(lengths)
        yield Spot(label, 0, {"facts": rows}, base, extra={"tokens": tokens})
    for label, train in (("LoRA", lora), ("local fine-tuning", local)):
        try:
            found = train(lab, queue)
        except (ConfigError, ModelError) as error:
            lab.notices.append(f"{label} is absent: {error}")
            continue
        seconds = found.pop("seconds") / len(queue)
        yield Spot(label, 0, found, base, extra={"seconds": seconds})


def seconds_once(spot: Spot) -> float | None:
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
    """Of the crowds, whose prompts are longer, and of what is trained."""
    facts, crowds = lab.settings["facts"], len(lab.settings["crowds"])
    read = {"perplexities": 2} if lab.sources.text else {}
    tokens = facts * (TOKENS["lora"] + TOKENS["local"])
    return {"asked": facts * (2 + 3 * crowds), "other_tokens": tokens, **read}


INSTEAD = StudySpec(
    name="instead",
    title="Instead of editing",
    question="Why not put the facts in the prompt, or fine-tune on them?",
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
                    "so other text, stay as they are. A LoRA, and one W with local fine-tuning, "
                    "is trained batch after batch; nothing holds the rest of the model in place. "
                    "Seconds of editing count values that were optimised in this study's own "
                    "stream.",
                    (
                        labels("what"),
                        *(*PREFERENCE, *STRICT, *OF_TEXT),
                        Cells(head("seconds", "once", "s/fact", 2), seconds_once),
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
