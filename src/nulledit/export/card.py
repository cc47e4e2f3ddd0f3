"""README.md of an exported model or adapter: front matter that the Hub reads, then what was done.

Facts come from anywhere: whatever stands in a cell is escaped, so that it is text and no markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nulledit._version import __version__
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.export.updates import Export, LayerExport
from nulledit.io.text import count, plain, shorten, without_folders
from nulledit.models.embedded import EMBEDDED
from nulledit.models.gguf import is_gguf
from nulledit.report import document as doc
from nulledit.report.markdown import markdown_page
from nulledit.report.tables import number
from nulledit.runs.holding import headline, legend, mark
from nulledit.runs.tables import rates_tables

SHOWN = 50  # facts in the table
LONGEST = 80  # columns of a cell
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
LIBRARIES = {"checkpoint": "transformers", "gguf": "gguf", "lora": "peft", "gguf-lora": "gguf"}
"""The Hub's name of what reads an export, by its kind."""
USES = {
    "checkpoint": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "python",
    ),
    "lora": (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, ".")',
        "python",
    ),
    "gguf": ("llama-cli -m model.gguf", "sh"),
    "gguf-lora": ("llama-cli -m BASE.gguf --lora adapter.gguf", "sh"),
}
"""How each kind is used in its folder, and in which language."""
UNLOADED = {
    "lora": "model.unload() takes it off.",
    "gguf-lora": "Leave out --lora to take it off.",
}
"""How an adapter is taken off."""
LIMITS = (
    "The facts are changed where they were asked as above: a paraphrase may miss them, and what "
    "follows from them is not changed by itself. Prompts near to them can change, too; how often, "
    "the measures say, if there are any. What is not named here was not measured."
)
STATISTICS = ("corpus", "corpus_hash", "tokens", "dtype", "layers", "settings")
"""Fields of the statistics' manifest that a card tells."""


@dataclass(frozen=True)
class Told:
    """What a run's pages say of its facts."""

    run: str = "RUN"
    """The folder's name."""
    summary: Any = None
    """The content of `summary.json`; None where there are no pages."""
    lines: Sequence[Mapping[str, Any]] = ()
    """Those of `results.jsonl`."""


def model_card(editor: EditEngine, export: Export, told: Told) -> str:
    """The card of a whole checkpoint."""
    run = told.run
    shape = " ".join([*_shape(editor, export), _cost(export)]).strip()
    parts: list[doc.Part] = [
        *(_origin(editor), *_licence(editor), _note(editor), doc.Text(shape)),
        *_use(editor, export),
        *_facts(editor, told),
        *_measures(editor, told),
        *(doc.Heading("Limits"), doc.Text(LIMITS)),
        *_method(editor),
        *(doc.Heading("Layers"), _layers(export.layers)),
        doc.Heading("Undo"),
        doc.Text(f"The ledger in {_code(run)}/ledger takes back single facts exactly, or all:"),
        doc.Code(f"nulledit undo {_code(run)} ID...\nnulledit restore {_code(run)}", "sh"),
        doc.Text(
            "Without the ledger, go back to the base model named above; these weights alone do not "
            "hold what they were before."
        ),
    ]
    front = _front_matter(editor, LIBRARIES[export.kind], "finetune")
    return f"{front}\n\n{markdown_page(doc.Document('Edited model', tuple(parts)))}"


def adapter_card(editor: EditEngine, export: Export, told: Told) -> str:
    """The card of an adapter."""
    run = told.run
    exact = all(layer.rank == layer.of for layer in export.layers)
    said = (
        "The adapter is the whole update, up to rounding of its factors"
        if exact
        else "The update was cut to this rank: the adapter is not the whole of it"
    )
    kind = f"Rank {export.rank}, padded with zeros; scaling 1; factors in {export.dtype}. {said}."
    kind = " ".join([kind, *_shape(editor, export)])
    parts: list[doc.Part] = [
        *(_origin(editor), *_licence(editor), _note(editor)),
        doc.Text(f"{kind} {_cost(export)}".strip()),
        *_use(editor, export),
        *_facts(editor, told),
        *_measures(editor, told),
        *(doc.Heading("Limits"), doc.Text(LIMITS)),
        *_method(editor),
        *(doc.Heading("Layers"), _layers(export.layers)),
        doc.Heading("Undo"),
        doc.Text(
            f"{UNLOADED[export.kind]} Single facts are taken back in the run and exported again:"
        ),
        doc.Code(f"nulledit undo {_code(run)} ID...", "sh"),
    ]
    front = _front_matter(editor, LIBRARIES[export.kind], "adapter")
    return f"{front}\n\n{markdown_page(doc.Document('Edited facts as an adapter', tuple(parts)))}"


def _front_matter(editor: EditEngine, library: str, relation: str) -> str:
    """The YAML block. `base_model` is there only if it can be the id of a model on the Hub."""
    data: dict[str, Any] = {}
    base = hub_id(editor.history.base.model)
    if base:
        data |= {"base_model": base, "base_model_relation": relation}
    epochs = [epoch.recipe for epoch in editor.history.epochs]
    methods = dict.fromkeys(plain(recipe.method.name) for recipe in epochs)
    if known := EMBEDDED.get(editor.history.base.model):
        data["license"] = known.licence[1]
    data |= {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-editing", "model-editing", "nulledit", *methods],
    }
    if relation == "adapter":
        data["tags"].append("lora")
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=False)}---"


def hub_id(name: str) -> str | None:
    """The id on the Hub of the model `name`; None for a folder or an object in memory."""
    if name in EMBEDDED:
        return EMBEDDED[name].hub
    local = Path(name).exists() or is_gguf(name)
    return name if _HUB_ID.fullmatch(name) and not local else None


def _origin(editor: EditEngine) -> doc.StudyTable:
    base = editor.history.base
    name = plain(Path(base.model).name if is_gguf(base.model) else without_folders(base.model))
    rows = [
        ("base model", name or "a model in memory"),
        ("base weights", f"{base.hash} ({base.dtype})"),
        *[("GGUF file", f"sha256 {base.file_sha256}")] * bool(base.file_sha256),
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


def _licence(editor: EditEngine) -> Iterator[doc.Part]:
    base = editor.history.base.model
    known = EMBEDDED[base].licence[0] if base in EMBEDDED else ""
    of = f", {known}." if known else "; its own card names it."
    yield doc.Text(f"The licence is that of the base model{of}")


def _use(editor: EditEngine, export: Export) -> Iterator[doc.Part]:
    """Lines that load it, as they are in its folder."""
    base = editor.history.base.model
    known = hub_id(base)
    yield doc.Heading("Use")
    lines, language = USES[export.kind]
    lines = lines.format(base=known or "BASE")
    base_is = "; BASE is the base model named above, where you have it" * ("BASE" in lines)
    yield doc.Text(f"In this folder{base_is}:")
    yield doc.Code(lines, language)


def _facts(editor: EditEngine, told: Told) -> Iterator[doc.Part]:
    """The facts in the model, and of each whether it held when it was last evaluated."""
    columns = {column.id: column.fact for column in editor.history.present}
    facts = list(dict.fromkeys(columns.values()))
    lines = [line for line in told.lines if line.get("column") in columns]
    marks = {columns[line["column"]].id: mark(line) for line in lines}
    yield doc.Heading("Edited facts")
    yield doc.Text(headline(lines) or "Whether they hold was not evaluated.")
    head = ("id", "prompt", "asked to say", "before", "holds")
    shown = [
        (f.id, f.render(f.prompt), *_answers(f), marks.get(f.id, "not evaluated"))
        for f in facts[:SHOWN]
    ]
    rows = [[shorten(plain(text), LONGEST) for text in row] for row in shown]
    more = f"and {len(facts) - SHOWN} more" if len(facts) > SHOWN else ""
    said = ". ".join(filter(None, (more, legend(lines))))
    yield doc.StudyTable.of("facts", "", head, rows, said)


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


def _measures(editor: EditEngine, told: Told) -> list[doc.Part]:
    """The last evaluation of the run folder, if it can be read."""
    summary = told.summary
    runs = summary.get("runs") if isinstance(summary, dict) else None
    if not isinstance(runs, list):
        return []
    asked = [r for r in runs if isinstance(r, dict) and r.get("after") and r.get("before")]
    if not asked:
        return []
    last = asked[-1]
    now = summary.get("state") == editor.history.state_id and last is runs[-1]
    when = "of this state" if now else "of an earlier state of the run"
    try:
        facts = count(int(last.get("facts") or 0), "fact")
        said = doc.Text(
            f"An evaluation {when}, on the {facts} of one call of edit, of the run's own model."
        )
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
