"""How far edits move hidden states on text that they have nothing to do with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nulledit.data.facts import Fact, quote
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.reading import read_windows
from nulledit.evaluation.runner import _plain
from nulledit.evaluation.stats import Rate
from nulledit.io.untrusted import MAX_DOCUMENT, parse_json, read_text
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import RowEncoder

ROWS_AT_ONCE = 256  # of a matrix of pairwise distances

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class States:
    """Hidden states of one model at the last token of some texts."""

    by_layer: dict[int, Tensor]
    """Block number -> states after it [n, d], float64, before any final norm."""
    texts: str
    """Hash of the texts' token ids: states of other texts are not compared."""


@dataclass(frozen=True)
class LayerDrift:
    """How far the states after one block moved from h to h′."""

    layer: int
    """Block number."""
    distance: Rate
    """Mean over texts of ‖h′ − h‖/‖h‖."""
    cosine: Rate
    """Mean over texts of the cosine of h′ and h."""
    shift: float | None
    """‖mean h′ − mean h‖/√tr Cov(h): the mean's shift against the spread; None for one text."""
    energy: float | None
    """Energy coefficient of the two clouds, 0 (one distribution) to 1; None for one text."""


@dataclass(frozen=True)
class Picture:
    """Both clouds on the two main axes of the base states."""

    layer: int
    """Block number."""
    explained: tuple[float, float]
    """Share of the base states' variance along each axis."""
    base: tuple[tuple[float, float], ...]
    """x, y of each text's state in the base model; their mean is at 0, 0."""
    edited: tuple[tuple[float, float], ...]
    """The same of the edited model, on the same axes."""


@dataclass(frozen=True)
class Drift:
    """How far edits moved hidden states."""

    layers: tuple[LayerDrift, ...]
    """By block."""
    pictures: tuple[Picture, ...]
    """By block; none for fewer than three texts or base states that are not finite: no axes."""

    def to_dict(self) -> dict[str, Any]:
        """The figures and the axes' shares as plain data for JSON, without points; nan is None."""
        return {
            "layers": [_plain(layer) for layer in self.layers],
            "explained": {str(p.layer): list(p.explained) for p in self.pictures},
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a point for a CSV: layer, side ("base", "edited"), text (from 0), x, y."""
        for picture in self.pictures:
            for side, points in (("base", picture.base), ("edited", picture.edited)):
                for text, (x, y) in enumerate(points):
                    yield {"layer": picture.layer, "side": side, "text": text, "x": x, "y": y}


def read_texts(
    source: str | Path,
    encoder: RowEncoder,
    *,
    limit: int = 100,
    window: int = 64,
    without: Collection[str] = (),
) -> list[tuple[int, ...]]:
    """Token ids of at most `limit` texts that no edit touched.

    A `.json` file is a list of records with a "prompt" (ROME's known_1000); prompts that mention a
    subject in `without` are left out. Anything else is read as a corpus, in windows of `window`
    tokens. Raises FactError or StatisticsError.
    """
    if limit < 1:
        raise ConfigError(f"limit is {limit}; expected 1 or more texts")
    file = Path(source)
    if file.suffix != ".json":
        return [
            tuple(ids)
            for ids in read_windows(source, encoder.tokenizer, windows=limit, window=window)
        ]
    subjects = [subject.casefold() for subject in without]
    prompts = [
        prompt
        for prompt in _prompts(file)
        if not any(subject in prompt.casefold() for subject in subjects)
    ]
    if not prompts:
        raise FactError(f"{file}: no prompt is left: the file is empty or all were edited")
    return [encoder.encode(prompt).ids for prompt in prompts[:limit]]


def read_states(
    model: EditableModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    positions: int = 2048,
    progress: Progress | None = None,
) -> States:
    """States at the last token of `rows` (token ids) after each of `layers`.

    Blocks above the highest layer are not run. `positions` bounds the tokens that run together;
    `progress` receives texts done and in all. Raises ConfigError for a layer the model lacks.
    """
    if not rows or not all(rows):
        raise FactError("hidden states need one or more texts, each of one or more tokens")
    wanted = sorted(set(layers))
    if not wanted or not 0 <= wanted[0] <= wanted[-1] < model.depth:
        raise ConfigError(f"layers are {wanted}; expected some of 0 to {model.depth - 1}")
    found: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    order: list[int] = []
    with frozen(model.model), torch.no_grad():
        for chunk in chunks_by_length([len(ids) for ids in rows], positions):
            batch = model.collate([rows[i] for i in chunk])
            last = batch.mask.sum(1) - 1
            states, first = None, 0
            for layer in wanted:
                states = model.run(batch, states=states, first=first, last=layer)
                at = last.to(states.device)
                found[layer].append(states[torch.arange(len(chunk)), at].cpu().double())
                first = layer + 1
            order += chunk
            if progress:
                progress(len(order), len(rows))
    back = torch.tensor(order).argsort()
    digest = hashlib.sha256(json.dumps([list(ids) for ids in rows]).encode()).hexdigest()
    return States({layer: torch.cat(parts)[back] for layer, parts in found.items()}, digest)


def drift(base: States, edited: States) -> Drift:
    """Compare the states of the same texts in two models, at the layers of `edited`.

    ValueError if the texts differ or `base` lacks a layer.
    """
    missing = sorted(edited.by_layer.keys() - base.by_layer.keys())
    if base.texts != edited.texts or missing:
        what = f"lack layers {missing}" if missing else "are of other texts"
        raise ValueError(f"the base states {what}: read them again with the same texts and layers")
    pairs = {layer: (base.by_layer[layer], states) for layer, states in edited.by_layer.items()}
    return Drift(
        layers=tuple(_layer_drift(layer, *pair) for layer, pair in pairs.items()),
        pictures=tuple(
            picture(layer, before, after)
            for layer, (before, after) in pairs.items()
            if len(before) > 2 and before.isfinite().all()
        ),
    )


def drift_report(
    editor: EditEngine,
    rows: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    base: States | None = None,
    positions: int = 2048,
    progress: Progress | None = None,
) -> Drift:
    """How far the editor's edits moved the states of `rows` (token ids).

    `layers`: by default those of `base`, else `default_layers`. `base`: states of the model without
    edits from `read_states`, so that many checkpoints share one pass; left out, they are read here.
    """
    if layers is None:
        layers = list(base.by_layer) if base else default_layers(editor)

    def read() -> States:
        return read_states(editor.editable, rows, layers, positions=positions, progress=progress)

    if base is None:
        with editor.base_weights():
            base = read()
    return drift(base, read())


def default_layers(editor: EditEngine) -> list[int]:
    """The last edited block, the middle one and the final one; each once."""
    depth = editor.editable.depth
    return sorted({editor.recipe.layers[-1], depth // 2, depth - 1})


def edited_token_norm(editor: EditEngine, facts: Sequence[Fact], *, positions: int = 2048) -> Rate:
    """Mean ‖h‖ after the last edited block at the subject's last token of each fact's prompt."""
    rows = [
        editor.editable.encoder.encode_template(fact.prompt, fact.subject).upto_subject().ids
        for fact in facts
    ]
    layer = editor.recipe.layers[-1]
    states = read_states(editor.editable, rows, [layer], positions=positions)
    return _rate(states.by_layer[layer].norm(dim=1))


def energy_coefficient(a: Tensor, b: Tensor) -> float:
    """2E‖X−Y‖ − E‖X−X′‖ − E‖Y−Y′‖ over 2E‖X−Y‖, of two clouds [n, d] and [m, d]; 0 to 1.

    The energy distance of Székely and Rizzo (J. Stat. Plan. Inference 143, 2013), which is zero
    only where both are one distribution, made free of scale. Expectations are over all pairs, a
    point with itself included.
    """
    across = 2 * _mean_distance(a, b)
    inside = _mean_distance(a, a) + _mean_distance(b, b)
    if across == 0:
        return 0.0
    share = (across - inside) / across
    return 0.0 if share < 0 else share  # rounding may go below 0; nan stays nan


def picture(layer: int, base: Tensor, edited: Tensor) -> Picture:
    """Both clouds [n, d] on the first two principal axes of `base`.

    An axis points to where its largest coordinate is positive: the decomposition leaves that open.
    """
    mean = base.mean(0)
    _, scales, axes = torch.linalg.svd(base - mean, full_matrices=False)
    axes = axes[:2]  # [2, d]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()
    share = (scales.square() / scales.square().sum())[:2].tolist()
    sides = [((states - mean) @ axes.mT).tolist() for states in (base, edited)]
    points = [tuple((float(x), float(y)) for x, y in side) for side in sides]
    return Picture(layer, (share[0], share[1]), points[0], points[1])


def _layer_drift(layer: int, base: Tensor, edited: Tensor) -> LayerDrift:
    """Figures of one layer from its states [n, d]."""
    several = len(base) > 1
    spread = float(base.var(0).sum().sqrt()) if several else math.nan
    return LayerDrift(
        layer=layer,
        distance=_rate((edited - base).norm(dim=1) / base.norm(dim=1)),
        cosine=_rate(functional.cosine_similarity(edited, base, dim=1)),
        shift=float((edited.mean(0) - base.mean(0)).norm()) / spread if spread > 0 else None,
        energy=energy_coefficient(base, edited) if several else None,
    )


def _mean_distance(a: Tensor, b: Tensor) -> float:
    """Mean of ‖x − y‖ over all pairs, without the inner-product form, which loses small ones."""
    total = sum(
        float(torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").sum())
        for part in a.split(ROWS_AT_ONCE)
    )
    return total / (len(a) * len(b))


def _prompts(file: Path) -> list[str]:
    text = read_text(file, most=MAX_DOCUMENT, error=FactError, what="list of prompts")
    records = parse_json(text, source=str(file), error=FactError)
    if not isinstance(records, list):
        raise FactError(f"{file}: expected a JSON list of records (found {quote(records)})")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise FactError(f"{file}: record {number}: no text in 'prompt' ({quote(record)})")
    return [record["prompt"] for record in records]


def _rate(values: Tensor) -> Rate:
    """The mean; nan if one of the values is: leaving it out would flatter a broken model."""
    n = len(values)
    if not values.isfinite().all():
        return Rate(math.nan, math.nan, n)
    return Rate.of(values.tolist())
