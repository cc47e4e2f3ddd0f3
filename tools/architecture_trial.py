"""What happens to one architecture: taken up or refused, and edited as the plain model says.

The checks are those of the tests' matrix, on the tiny random model of `tiny_models`: keys and
values against whole runs one row at a time, what a written value moves, edits of matrices and by
gates with undo to the bit, saving and loading, in float64 and bfloat16.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reference
import tiny_models
import torch
from support.models import LINES, RECIPE, small_tokenizer, statistics_of
from support.values import CONTEXTS, SETTINGS, distance, ours, walk
from torch import Tensor

from nulledit import Editor, Fact
from nulledit.config import ValueSettings
from nulledit.errors import ModelError
from nulledit.models.editable_model import EditableModel
from nulledit.models.experts import is_experts, keys_of
from nulledit.models.layouts import LAYOUTS, as_out_in, write_weight
from nulledit.models.load import check_comes_back

FACTS = [
    Fact("Ada Byron", "The mother tongue of {} is", "Velmish", id="ada"),
    Fact("Émile Zola", "{} was born in", "Ostrel", id="zola"),
    Fact("Velm", "The valley and the river, " * 2 + "the harbour of {} lies on the", "river"),
]
"""The last one is longer than any window."""
NOT_SAVED = "it can't be written as a model folder"
"""How a model with neurons of its own is refused that its configuration can't describe."""
NOT_LOADED = "so a run of it could not be opened again"
"""How a part of a larger model is refused that transformers does not load by itself."""
TOLERANCE = 1e-4
"""‖found − expected‖/‖expected‖; many architectures compute parts in float32 whatever they hold."""


@dataclass
class Row:
    """One line of the page."""

    name: str
    refused: str = ""
    """Why it can't be edited."""
    path: str = ""
    """Of W in the model."""
    output: str = ""
    """How W's output enters the stream."""
    traced: bool = False
    """Whether tracing found the layout, and not the table."""
    experts: bool = False
    layers: str = ""
    """Which blocks can be edited, if not all."""
    depth: int = 0
    """Number of blocks of the model that was tried."""
    runs: str = "shared"
    """Shared beginnings of rows, whole rows, or whole rows with the blocks below."""
    gated: str = ""
    """Why it can't be given neurons; empty: it can."""
    checked: bool = False
    """Whether it was edited, too."""
    wrong: list[str] = field(default_factory=list)
    """Checks that did not hold."""


def tried(name: str, *, quick: bool = False) -> Row:
    """The row of architecture `name`; every error becomes a part of it.

    `quick`: it is taken up only, not edited.
    """
    row = Row(name)
    tokenizer = small_tokenizer()
    try:
        model = tiny_models.build(name)
    except Exception as error:
        row.refused = f"not built: {said(error)}"
        return row
    try:
        with quiet():
            editable = EditableModel(model, tokenizer)
            layers = [i for i in range(editable.depth) if editable.fits(i)]
            if not layers:
                editable.mlp_out(editable.depth // 2)
    except ModelError as error:
        row.refused = said(error, name=False)
        return row
    except Exception as error:
        row.refused = f"crashed: {said(error)}"
        return row
    try:
        with quiet():
            _check_runs(model)
    except Exception as error:
        row.refused = f"does not run: {said(error)}"
        return row
    row.path = f"{editable.layout.blocks}.N.{editable.layout.mlp_out}"
    row.output, row.traced = editable.layout.output, model.config.model_type not in LAYOUTS
    row.runs = "from below" if editable.from_below else "shared" if editable.columns else "whole"
    if len(layers) < editable.depth:
        row.layers = ", ".join(map(str, layers))
    edited = layers[:-1][-2:] or layers
    if editable.from_below:  # where keys and values are another block's, no later token sees more
        edited = layers[:2]
    row.experts = is_experts(editable.mlp_out(edited[-1]))
    row.depth, row.gated, row.checked = editable.depth, _form(editable, layers), not quick
    if quick:
        return row
    for check in (_keys, _values, _arrival, _edits, _saved):
        _run(row, check.__name__.strip("_"), check, name, edited)
    if unloaded := next((found for found in row.wrong if NOT_LOADED in found), ""):
        row.refused, row.wrong = unloaded.removeprefix("saved: ModelError: "), []
        return row
    if not row.gated:
        gates = [i for i in layers if not _form(editable, [i])]
        _run(row, "gated", _saved, name, gates[:-1][-1:] or gates[-1:], True)
        for unsaid in [found for found in row.wrong if NOT_SAVED in found]:
            row.gated = unsaid
            row.wrong.remove(unsaid)
    return row


def _check_runs(model: Any) -> None:
    """Whether the plain model, without anything of ours, gives numbers on short and long rows."""
    for length in (4, 60):
        ids = torch.arange(length)[None] % 50 + 1
        with torch.no_grad():
            mask = torch.ones_like(ids)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not logits.isfinite().all():
            raise ValueError(f"the plain model gives NaN on {length} tokens")


def _form(editable: EditableModel, layers: list[int]) -> str:
    reason = ""
    for layer in layers:
        try:
            editable.form(layer)
            return ""
        except ModelError as error:
            reason = said(error, name=False)
    return reason


def _run(row: Row, what: str, check: Callable[..., str], *args: Any) -> None:
    try:
        with quiet():
            missed = check(*args)
    except Exception as error:
        missed = said(error)
    if missed:
        row.wrong.append(f"{what}: {missed}")


def _keys(name: str, layers: list[int]) -> str:
    """Keys of facts that run together, after kept beginnings, are those of rows run whole."""
    tokenizer, model = small_tokenizer(), tiny_models.build(name)
    expected = plain_keys(model, tokenizer, layers[0])
    found = walk(model, tokenizer, FACTS, first=layers[0]).keys()
    return off(found, expected)


def plain_keys(model: Any, tokenizer: Any, layer: int) -> Tensor:
    """[d_in, facts]: the model's own forward pass, one row at a time, without padding."""
    editable = EditableModel(model, tokenizer)
    module, found = editable.mlp_out(layer), []

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = keys_of(module, args, kwargs) if is_experts(module) else args[0]
        found.append(given.detach().reshape(-1, given.shape[-1]))

    columns = []
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for fact in FACTS:
            rows = []
            for context in CONTEXTS:
                template = context.replace("{}", fact.prompt)
                ids = torch.tensor([tokenizer(template.replace("{}", fact.subject))["input_ids"]])
                last = reference.subject_last(tokenizer, template, fact.subject)
                with torch.no_grad():
                    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                rows.append(found.pop()[last])
            columns.append((rows[0] + torch.stack(rows[1:]).mean(0)) / 2)
    finally:
        handle.remove()
    return torch.stack(columns, dim=1)


def _values(name: str, layers: list[int]) -> str:
    """Values by descent are those of the published algorithm, written plainly."""
    tokenizer, model, layer = small_tokenizer(), tiny_models.build(name), layers[-1]
    settings = dataclasses.replace(SETTINGS, steps=4)
    found = ours(model, tokenizer, FACTS[1:], layer=layer, settings=settings)
    editable = EditableModel(model, tokenizer)
    with read_by_reference(editable, layer):
        return _against_reference(model, tokenizer, layer, settings, found)


@contextmanager
def read_by_reference(editable: EditableModel, layer: int) -> Iterator[None]:
    """The reference reads the model by its layout inside, and values where they stand.

    That is where a norm between W and the block's output is given its states, which may be more
    than what W writes.
    """
    layout, kind = editable.layout, editable.model.config.model_type
    families, place = reference.FAMILIES, reference.value_place
    reference.FAMILIES = {**families, kind: (layout.blocks, layout.mlp_out, layout.output)}
    norm = editable._entries[layer].norm
    try:
        if norm is None:
            yield
            return
        named = next(n for n, m in editable.model.named_modules() if m is norm)
        before = torch.nn.Identity()
        editable.model.set_submodule(named, torch.nn.Sequential(before, norm))
        reference.value_place = lambda *_: before
        yield
        editable.model.set_submodule(named, norm)
    finally:
        reference.FAMILIES, reference.value_place = families, place


def _against_reference(
    model: Any, tokenizer: Any, layer: int, settings: ValueSettings, found: list[Any]
) -> str:
    for fact, value in zip(FACTS[1:], found, strict=True):
        expected = reference.compute_z(
            model,
            tokenizer,
            fact,
            layer=layer,
            contexts=CONTEXTS,
            **reference.of_settings(settings),
        )
        missed = off(value.z, expected.z, 10 * TOLERANCE)  # Adam's steps grow what rounding left
        if missed:
            return f"{fact.id}: {missed}"
    return ""


def _arrival(name: str, layers: list[int]) -> str:
    """W + r kᵀ/‖k‖², over the scale, moves what stands where values do by exactly r."""
    for dtype, allowed in ((torch.float64, TOLERANCE), (torch.bfloat16, 0.05)):
        partial = EditableModel(tiny_models.build(name, dtype=dtype), small_tokenizer())
        batch, layer = partial.collate([[5, 9, 13, 20, 7]]), layers[0]
        with torch.no_grad(), partial.reading_keys([layer]) as keys:
            hidden, before = (t[0, 3] for t in partial.run_to_values(batch, layer=layer))
        key = keys[layer][0, 3].double()
        residual = torch.linspace(-4, 4, len(before), dtype=torch.float64)
        step = torch.outer(residual / partial.scale(layer), key) / key.square().sum()
        module = partial.mlp_out(layer)
        write_weight(module, as_out_in(module) + step.to(partial.model.dtype))
        with torch.no_grad():
            now, after = (t[0, 3] for t in partial.run_to_values(batch, layer=layer))
        foreseen = partial.with_value(layer, hidden, before, residual)
        missed = off((after - before).double(), residual, allowed)
        missed = missed or off(now.double(), foreseen.double(), allowed)
        if missed:
            return f"{dtype}: {missed}"
    return ""


def editor_of(name: str, layers: list[int], dtype: torch.dtype, *, gated: bool = False) -> Editor:
    """An editor of the tiny model, with statistics of a few lines."""
    model, tokenizer = tiny_models.build(name, dtype=dtype), small_tokenizer()
    recipe = RECIPE.with_fields(
        {
            "layers": layers,
            "values.steps": 3,
            "values.stop_margin": None,  # the last step counts, whether it is better or not
            "contexts.texts": CONTEXTS[:2],
            **({"method.name": "gated"} if gated else {}),
        }
    )
    statistics = statistics_of(model, tokenizer, layers, lines=LINES * 2, inputs=gated)
    return Editor(model, tokenizer, recipe=recipe, statistics=statistics)


def bits(model: Any) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of weights whose bits are not the same."""
    same = {n for n in a.keys() & b.keys() if a[n].equal(b[n])}
    return sorted((a.keys() | b.keys()) - same)


def _edits(name: str, layers: list[int]) -> str:
    """Only the matrices of `layers` change, by something, and come back to the bit."""
    editor = editor_of(name, layers, torch.float64)
    before = bits(editor.model)
    editor.edit(FACTS[:2])
    changed = set(differing(before, bits(editor.model)))
    wanted = {editor.editable.parameter_name(layer) for layer in layers}
    if changed != wanted:
        return f"changed {sorted(changed)}, expected {sorted(wanted)}"
    editor.undo(*(f.id for f in editor.facts))
    return _left(before, editor)


def _left(before: dict[str, Tensor], editor: Editor) -> str:
    left = differing(before, bits(editor.model))
    return f"undo left {', '.join(left[:3])} changed" if left else ""


def _saved(name: str, layers: list[int], gated: bool = False) -> str:
    """In bfloat16: a run that was saved is loaded as it was, edited further, undone to the bit."""
    editor = editor_of(name, layers, torch.bfloat16, gated=gated)
    check_comes_back(editor.model)
    before = bits(editor.model)
    editor.edit(FACTS[:2])
    edited = bits(editor.model)
    if not differing(before, edited):
        return "nothing changed"
    with tempfile.TemporaryDirectory() as folder:
        editor.save(Path(folder) / "run")
        loaded = Editor.load(Path(folder) / "run")
        differ = differing(edited, bits(loaded.model))
        if differ:
            return f"loaded {', '.join(differ[:3])} otherwise than saved"
        loaded.edit(FACTS[2:])
        loaded.undo(*(f.id for f in loaded.facts))
        return _left(before, loaded)


def off(found: Tensor, expected: Tensor, allowed: float = TOLERANCE) -> str:
    """By how much too much `found` is off; a NaN is."""
    missed = distance(found.double(), expected.double())
    return "" if missed <= allowed else f"off by {missed:.2g}"


def said(error: Exception, *, name: bool = True) -> str:
    """An error in one line, without the folder of the trial."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s]+/", "", " ".join(str(error).split()))
    return (f"{type(error).__name__}: {text}" if name else text)[:400]


@contextmanager
def quiet() -> Iterator[None]:
    """No notices and warnings inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
