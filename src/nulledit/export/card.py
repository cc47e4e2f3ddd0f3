"""README.md of an exported model or adapter: front matter that the Hub reads, then what was done.

Facts come from anywhere: whatever stands in a cell is escaped, so that it is text and no markup.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nulledit._version import __version__
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.scores import facts_held
from nulledit.export.base_name import base_name, hub_id
from nulledit.export.licence import licence_of
from nulledit.export.updates import Export, LayerExport
from nulledit.io.text import count, plain, shorten, without_folders
from nulledit.models.embedded import EMBEDDED
from nulledit.models.gguf import is_gguf
from nulledit.report import document as doc
from nulledit.report.markdown import markdown_page
from nulledit.report.tables import number
from nulledit.runs.tables import rates_tables

SHOWN = 50  # facts in the table
LONGEST = 80  # columns of a cell
TITLES = {
    "checkpoint": "Edited model",
    "gguf": "Edited model",
    "lora": "Edited facts as an adapter",
    "gguf-lora": "Edited facts as an adapter",
    "delta": "Edited facts as a delta",
}
LIBRARIES = {
    "checkpoint": "transformers",
    "gguf": "gguf",
    "lora": "peft",
    "gguf-lora": "gguf",
    "delta": "nulledit",
}
"""The Hub's name of what reads an export, by its kind."""
WHOLE = ("checkpoint", "gguf")
"""Kinds that are models; the others are for a base."""
LIMITS = (
    "A fact is written for its prompt. Other wordings, and what follows from the fact, may still "
    "get the old answer.",
    "What edits do to other text is measured on a sample of it. What was not asked may have "
    "changed as well.",
)
STATISTICS = ("corpus", "corpus_hash", "tokens", "dtype", "layers", "settings")
"""Fields of the statistics' manifest that a card tells."""


def write_card(folder: Path, editor: EditEngine, export: Export, *, run: str, summary: Any) -> None:
    """Write README.md of an export: of what, how to load it, what it does, how to take it off.

    `run`: what it calls the run. `summary`: the content of the run's `summary.json`, or None. The
    facts are asked of the run's model, which is as before afterwards.
    """
    told = " ".join([*_said(export), *_shape(editor, export), _cost(export)]).strip()
    limits = [*LIMITS]
    if export.kind not in WHOLE:
        limits.append(_OTHER_BASE[export.kind == "delta"])
    parts: list[doc.Part] = [
        *(_origin(editor), _note(editor), doc.Text(told)),
        *(doc.Heading("Load"), doc.Text("In this folder:"), _load(editor, export)),
        *(doc.Heading("Edited facts"), _facts(editor)),
        *_measures(summary, editor),
        *(doc.Heading("Limits"), doc.Items(tuple(limits))),
        *_method(editor),
        *(doc.Heading("Layers"), _layers(export.layers)),
        *(doc.Heading("Undo"), *_undo(editor, export.kind, _code(run))),
    ]
    front = _front_matter(editor, export.kind)
    page = markdown_page(doc.Document(TITLES[export.kind], tuple(parts)))
    (folder / "README.md").write_text(f"{front}\n\n{page}", encoding="utf-8")


_OTHER_BASE = (
    "It is for the base weights named above. On others it does something else, and loaders compare "
    "shapes, not weights.",
    "It is for the base weights named above, and is refused on others.",
)


def _said(export: Export) -> Iterator[str]:
    """What an adapter or a delta holds of the update; nothing of a whole model."""
    exact = all(layer.rank == layer.of for layer in export.layers)
    if export.rank is not None:
        yield f"Rank {export.rank}, padded with zeros; scaling 1; factors in {export.dtype}."
        yield (
            "The adapter is the whole update, up to rounding of its factors."
            if exact
            else "The update was cut to this rank: the adapter is not the whole of it."
        )
    elif export.same_as_run:
        yield f"Stored in {export.dtype}. Base and delta are the edited model, to the bit."
    elif export.same_as_run is not None:
        yield (
            f"Stored in {export.dtype}. Base and delta differ from the edited model in "
            f"{export.differing} weights."
        )


def _load(editor: EditEngine, export: Export) -> doc.Code:
    """Lines that load it."""
    kind = export.kind
    if kind == "gguf":
        return doc.Code("llama-cli -m model.gguf\nollama create NAME -f Modelfile", "sh")
    if kind == "gguf-lora":
        return doc.Code("llama-cli -m BASE.gguf --lora adapter.gguf", "sh")
    if kind == "checkpoint":
        lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained(".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        )
        return doc.Code("\n".join(lines), "python")
    if export.for_servers:
        serve = f"vllm serve BASE --enable-lora --max-lora-rank {export.rank}"
        return doc.Code(f"{serve} --lora-modules edits=.", "sh")
    base = editor.history.base
    ours = kind == "delta" or base.model in EMBEDDED or is_gguf(base.model)
    loaded = f'{json.dumps(plain(base_name(base.model)) or "BASE")}, dtype="{base.dtype}"'
    imports = {
        "delta": "from nulledit.export import put_delta",
        "lora": "from peft import PeftModel",
    }
    last = {
        "delta": 'put_delta(model, ".")',
        "lora": 'model = PeftModel.from_pretrained(model, ".")',
    }
    first = "from nulledit import load_model"
    load = f"model, tokenizer = load_model({loaded})  # the base"
    if not ours:
        first = "from transformers import AutoModelForCausalLM"
        load = f"model = AutoModelForCausalLM.from_pretrained({loaded})  # the base"
    found = (first, imports[kind], "", load, last[kind])
    return doc.Code("\n".join(found), "python")


def _undo(editor: EditEngine, kind: str, run: str) -> Iterator[doc.Part]:
    """How to take it off, whole and fact by fact."""
    if kind == "delta":
        held = "" if editor.weights.grown else " --base BASE"
        yield doc.Text("A model that the delta was put on, in a folder, becomes the base again:")
        on, off = "nulledit apply . BASE --out MODEL", "nulledit apply . MODEL --remove"
        yield doc.Code(f"{on}\n{off}{held} --out AGAIN", "sh")
    elif kind == "lora":
        yield doc.Text("Unload the adapter, and the model is its base:")
        yield doc.Code("model = model.unload()", "python")
    elif kind == "gguf-lora":
        yield doc.Text("Load the base without the adapter.")
    else:
        yield doc.Text(
            "Go back to the base model named above; these weights alone do not hold what they were "
            "before."
        )
    yield doc.Text(
        f"The ledger in {run}/ledger takes back single facts exactly, or all; then export again:"
    )
    yield doc.Code(f"nulledit undo {run} ID...\nnulledit restore {run}", "sh")


def _front_matter(editor: EditEngine, kind: str) -> str:
    """The YAML block. `base_model` is there only if it can be the id of a model on the Hub."""
    data: dict[str, Any] = {}
    base = hub_id(editor.history.base.model)
    if licence := licence_of(editor.history.base.model):
        data["license"] = licence
    if base:
        relation = "finetune" if kind in WHOLE else "adapter"
        data |= {"base_model": base, "base_model_relation": relation}
    epochs = [epoch.recipe for epoch in editor.history.epochs]
    methods = dict.fromkeys(plain(recipe.method.name) for recipe in epochs)
    data |= {
        "library_name": LIBRARIES[kind],
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-editing", "model-editing", "nulledit", *methods],
    }
    if kind.endswith("lora"):
        data["tags"].append("lora")
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=False)}---"


def _origin(editor: EditEngine) -> doc.StudyTable:
    base = editor.history.base
    name = plain(Path(base.model).name if is_gguf(base.model) else without_folders(base.model))
    rows = [
        ("base model", name or "a model in memory"),
        ("base weights", f"{base.hash} ({base.dtype})"),
        *[("GGUF file", f"sha256 {base.file_sha256}")] * bool(base.file_sha256),
        ("licence of the base", licence_of(base.model) or "its own, which was not looked up"),
        ("state of the ledger", editor.history.state_id),
        ("edited facts", str(len(set(_present(editor))))),
        ("made with", f"nulledit {__version__}"),
    ]
    return doc.StudyTable.of("origin", "", ("", ""), rows)


def _note(editor: EditEngine) -> doc.Text:
    base = editor.history.base.model
    said = ""
    if base in EMBEDDED:
        said = (
            f"The base is {base}, a quantised copy of the model on the Hub converted back to "
            "float32: its weights are near those of the Hub's, not the same."
        )
        said += f" {EMBEDDED[base].terms}" if EMBEDDED[base].terms else ""
    elif is_gguf(base):
        said = f"The base is {plain(Path(base).name)}, a GGUF file converted back to float32."
    return doc.Text(said)


def _present(editor: EditEngine) -> list[Fact]:
    return list(dict.fromkeys(column.fact for column in editor.history.present))


def _facts(editor: EditEngine) -> doc.StudyTable:
    """What was edited, and whether it holds; those that do not come first."""
    facts = _present(editor)
    held = dict(zip(facts, facts_held(editor.editable, facts), strict=True))
    facts.sort(key=held.__getitem__)
    head = ("id", "prompt", "new answer", "old answer", "holds")
    shown = [
        (f.id, f.render(f.prompt), *_answers(f), "yes" if held[f] else "no") for f in facts[:SHOWN]
    ]
    rows = [[shorten(plain(text), LONGEST) for text in row] for row in shown]
    verb = "holds" if len(facts) == 1 else "hold"
    said = (
        f"{sum(held.values())} of {count(len(facts), 'fact')} {verb}: every token of the new "
        "answer is the likeliest, as asked of the edited model for this card"
    )
    if any(fact.forget for fact in facts):
        said += "; a forgotten answer holds if it is no longer said"
    if len(facts) > SHOWN:
        said += f"; not shown are {len(facts) - SHOWN} more"
    return doc.StudyTable.of("facts", "", head, rows, said)


def _answers(fact: Fact) -> tuple[str, str]:
    """The new one and the old one."""
    return ("(forgotten)", fact.target) if fact.forget else (fact.target, fact.old_answer or "")


def _method(editor: EditEngine) -> Iterator[doc.Part]:
    epochs = editor.history.epochs
    if epochs:
        yield doc.Heading("Method")
    for epoch in epochs:
        known = {k: epoch.statistics[k] for k in STATISTICS if k in epoch.statistics}
        which = f"Epoch {epoch.id}: recipe" if len(epochs) > 1 else "Recipe"
        for title, data in (
            (f"{which}, seed {epoch.seed}:", epoch.stored),
            ("Statistics of the preserved keys:", _plain(known)),
        ):
            yield doc.Text(title)
            yield doc.Code(yaml.safe_dump(data, sort_keys=False, allow_unicode=False))


def _measures(summary: Any, editor: EditEngine) -> list[doc.Part]:
    """The last evaluation of the run folder, if it can be read."""
    runs = summary.get("runs") if isinstance(summary, dict) else None
    if not isinstance(runs, list):
        return []
    told = [r for r in runs if isinstance(r, dict) and r.get("after") and r.get("before")]
    if not told:
        return []
    last = told[-1]
    now = last.get("state") == editor.history.state_id
    when = "of this state" if now else "of an earlier state of the run"
    try:
        facts = count(int(last.get("facts") or 0), "fact")
        said = doc.Text(f"An evaluation {when}, on the {facts} of one call of edit.")
        tables = rates_tables({"base": last["before"], "edited": last["after"]})
        return [doc.Heading("Measures"), said, *tables]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _layers(layers: Sequence[LayerExport]) -> doc.StudyTable:
    head = ("matrix", "shape", "rank", "‖Δ‖/‖W₀‖", "‖Δ − BA‖/‖Δ‖", "rounding/‖Δ‖")
    rows = [
        (
            layer.parameter,
            f"{layer.shape[0]} × {layer.shape[1]}",
            f"{layer.rank} of {layer.of}" if layer.of else "",
            number(layer.update_share),
            number(layer.error) if layer.of else "",
            number(layer.rounding_share),
        )
        for layer in layers
    ]
    return doc.StudyTable.of("layers", "", head, rows)


def _shape(editor: EditEngine, export: Export) -> Iterator[str]:
    """What gated edits do to the model's shape; nothing of other edits."""
    found = export.same_shape
    if found is not None:
        for at in found.layers:
            yield (
                f"Gated edits: {count(len(at.units), 'neuron')} in the place of the least used of "
                f"the {at.of} units of block {at.layer}, so the shape is the base's. Replaced: "
                f"{', '.join(map(str, at.units))}."
            )
        kl, grown = found.kl, found.grown_kl
        yield (
            f"On {kl.tokens} tokens of {plain(found.text)} the next token's distribution is "
            f"{number(kl.value)} ± {number(kl.standard_error)} thousandths of a nat (KL per token) "
            f"from the base's; {number(grown.value)} ± {number(grown.standard_error)} with the "
            "neurons besides the block's units."
        )
    elif editor.weights.grown:
        for layer in editor.weights.layers:
            form = editor.editable.form(layer)
            n = form.columns.shape[1]
            yield (
                f"Gated edits: {count(n, 'neuron')} in block {layer} besides its own {form.width} "
                "units, which are as in the base. Other blocks are padded to the same width with "
                "units that give nothing."
            )


def _cost(export: Export) -> str:
    if export.cost is None:
        return ""
    cost = export.cost
    it = "in the base's shape" if export.same_shape else "with it"
    whole = "with neurons besides the units" if export.same_shape else "with the whole update"
    held = (
        f"Of {count(cost.facts, 'fact')}, {cost.stored_strict} hold by argmax {it} and "
        f"{cost.exact_strict} {whole}"
    )
    if math.isnan(cost.exact_nll) and math.isfinite(cost.worst):  # all are to be forgotten
        return f"{held}."
    return (
        f"{held}; mean loss of the new answers "
        f"{cost.stored_nll:.3f} and {cost.exact_nll:.3f} nats a token."
    )


def _code(name: str) -> str:
    """A folder's name fit to stand in code."""
    return re.sub(r"[^\w./-]", "_", plain(name))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | bool | None) else plain(value)
