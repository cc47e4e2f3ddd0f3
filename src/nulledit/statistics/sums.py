"""The sums of one set of statistics, in memory and on disk, unfinished and complete."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from nulledit.errors import StatisticsError
from nulledit.io.files import replacing
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.editable_model import EditableModel
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.layouts import as_out_in, stored_weight
from nulledit.statistics.manifest import (
    UNCHECKED,
    Manifest,
    check_file,
    read_manifest,
    write_manifest,
)
from nulledit.statistics.spectra import Statistics
from nulledit.statistics.tensor_files import (
    MAX_WIDTH,
    MOMENTS,
    PARTIAL,
    SPECTRA,
    opened_file,
    save_alone,
    spectrum_tensors,
    sums_of,
)

logger = logging.getLogger(__name__)


@dataclass
class Sums:
    """Of keys, or of inputs, while a text is read; they know where they are kept."""

    manifest: Manifest
    """What they are of."""
    folder: Path
    """Where they are kept."""
    moments: dict[int, SecondMoment]
    """By layer."""
    done: int = 0
    """Windows of the text that they hold: the first so many, as these run."""

    @property
    def tokens(self) -> int:
        """Positions that they hold."""
        return next(iter(self.moments.values())).count

    def save(self) -> None:
        """Keep what there is so far."""
        metadata = {
            "manifest": self.manifest.to_json(),
            "windows": str(self.done),
            "count": str(self.tokens),
        }
        save_alone(self.folder / PARTIAL, sums_of(self.moments), metadata)

    def resume(self) -> None:
        """Go on from what was kept; StatisticsError where that is of something else."""
        file = self.folder / PARTIAL
        if not file.is_file():
            return
        with opened_file(file) as (tensors, metadata):
            if not tensors.check(metadata):
                logger.warning("%s: %s", file, UNCHECKED)
            found = Manifest.from_json(metadata.get("manifest", ""), str(file))
            if replace(found, version="") != replace(self.manifest, version=""):
                raise StatisticsError(
                    f"{self.folder}: holds other unfinished statistics; choose another folder"
                )
            counts = [metadata.get(name, "") for name in ("count", "windows")]
            if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in counts):
                raise StatisticsError(f"{file}: says of no number of tokens and windows; delete it")
            for layer, moment in self.moments.items():
                total = tensors.tensor(f"sum.{layer}", tuple(moment.sum.shape))
                moment.restore(total, [int(counts[0]), *tensors.tokens(layer, total)])
            self.done = int(counts[1])

    def check_sampled(self) -> None:
        """StatisticsError where a layer's keys are wider than the tokens seen are many."""
        least = min(self.moments.values(), key=lambda moment: moment.sampled - moment.width)
        if least.sampled < least.width:
            whom = " to the expert with most of them" if least.tokens else ""
            raise StatisticsError(
                f"{self.manifest.corpus} gives {least.sampled} tokens{whom}; the "
                f"{self.manifest.kind} are {least.width} wide, and fewer tokens than that leave "
                "directions unsampled: use a larger corpus"
            )

    def finished(self) -> Statistics:
        """The statistics of complete sums, which are kept."""
        counted = replace(self.manifest, tokens=self.tokens, windows=self.done)
        return finished(self.folder, counted, self.moments)


def ready(folder: Path, manifest: Manifest) -> Statistics | None:
    """Statistics that are there already; StatisticsError if they are others."""
    if not (folder / "manifest.json").is_file():
        return None
    check_file(folder / MOMENTS, read_manifest(folder)[1])
    found = Statistics.load(folder)
    if found.manifest.uncounted() != manifest.uncounted():
        raise StatisticsError(f"{folder}: holds other statistics; choose another folder")
    return found


def finished(folder: Path, manifest: Manifest, moments: dict[int, SecondMoment]) -> Statistics:
    """Statistics of complete sums, kept in `folder`."""
    spectra = {layer: moment.spectrum() for layer, moment in moments.items()}
    _save(folder, manifest, moments, spectra)
    return Statistics(manifest, spectra)


def read_moments(folder: Path) -> tuple[Manifest, dict[int, SecondMoment]]:
    """The sums in a folder that `collect` or `merge_statistics` made; StatisticsError otherwise."""
    if not folder.is_dir():
        kind = "is a compact file, which holds no sums" if folder.is_file() else "no such folder"
        raise StatisticsError(f"{folder}: {kind}; expected a folder made by `nulledit stats make`")
    manifest, hashes = read_manifest(folder)
    check_file(folder / MOMENTS, hashes)
    if not hashes:
        logger.warning("%s: %s", folder, UNCHECKED)
    if manifest.tokens < 1:
        raise StatisticsError(f"{folder}: manifest counts {manifest.tokens} tokens")
    moments: dict[int, SecondMoment] = {}
    with opened_file(folder / MOMENTS) as (tensors, _):
        for layer in manifest.layers:
            shape = tensors.shape(f"sum.{layer}")
            width = shape[-1] if shape else 0
            blocks = shape[:-2]
            if (*blocks, width, width) != shape or len(blocks) > 1 or not 0 < width <= MAX_WIDTH:
                raise StatisticsError(
                    f"{folder}: sum.{layer} has the shape {list(shape)}; expected [d, d] or "
                    f"[experts, d, d], d at most {MAX_WIDTH}"
                )
            total = tensors.tensor(f"sum.{layer}", shape)
            moments[layer] = SecondMoment(width, *blocks)
            moments[layer].restore(total, [manifest.tokens, *tensors.tokens(layer, total)])
    return manifest, moments


def empty_moments(
    model: EditableModel, layers: Sequence[int], inputs: bool
) -> dict[int, SecondMoment]:
    """Sums of nothing, where the weights of each layer are."""
    moments: dict[int, SecondMoment] = {}
    for layer in layers:
        module = model.mlp_out(layer)
        weight = stored_weight(module)
        elsewhere = weight.device.type in ("mps", "meta")  # without float64; offloaded
        device = torch.device("cpu") if elsewhere else weight.device
        dense = not is_experts(module)
        experts, width = (0, as_out_in(module).shape[1]) if dense else count_and_width(module)
        if inputs:
            experts, width = 0, model.form(layer).d + 1
        moments[layer] = SecondMoment(width, experts, device=device)
    return moments


def _save(
    folder: Path,
    manifest: Manifest,
    moments: dict[int, SecondMoment],
    spectra: dict[int, Spectrum],
) -> None:
    parts: dict[str, torch.Tensor] = {}
    for layer, spectrum in spectra.items():
        parts |= spectrum_tensors(spectrum, layer, torch.float32)
    for tensors, name in ((sums_of(moments), MOMENTS), (parts, SPECTRA)):
        with replacing(folder / name) as partial:
            save_file(tensors, partial)
    write_manifest(folder, manifest, (MOMENTS, SPECTRA))  # last: it says "complete"
    (folder / PARTIAL).unlink(missing_ok=True)
