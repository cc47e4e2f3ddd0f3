"""Statistics as edits use them: spectra by layer, and where they come from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nulledit.config import NullSpaceSettings
from nulledit.errors import StatisticsError
from nulledit.io.untrusted import parse_json
from nulledit.linalg.spectrum import RULES, Spectrum
from nulledit.statistics.manifest import (
    KEYS,
    UNCHECKED,
    Manifest,
    check_file,
    parts_of,
    read_manifest,
)
from nulledit.statistics.tensor_files import (
    SPECTRA,
    inverse_tensors,
    opened_file,
    save_alone,
    spectrum_tensors,
    thin,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Statistics:
    """Spectra of the preserved keys' second moment, by layer, and where they come from."""

    manifest: Manifest
    """Provenance."""
    spectra: dict[int, Spectrum]
    """By layer."""
    checked: bool = True
    """Whether what was read has the hashes written with it; False: of before there were any."""

    def __repr__(self) -> str:
        m, layers = self.manifest, ", ".join(map(str, self.spectra))
        return f"<Statistics of {m.model}: layers {layers}, {m.tokens} tokens of {m.corpus}>"

    def check(
        self, model_hash: str, layers: Sequence[int], mlp_out: str = "", *, inputs: bool = False
    ) -> None:
        """Raise StatisticsError unless these are of that model and its W, and cover `layers`.

        `inputs`: whether they are to be of the MLPs' inputs.
        """
        m = self.manifest
        if m.inputs != inputs:
            raise StatisticsError(
                f"statistics are of {m.kind} of MLPs, the method needs "
                f"those of {(kind := 'inputs' if inputs else 'keys')}: run `nulledit stats make` "
                f"with --{kind}"
            )
        if m.mlp_out != mlp_out:
            raise StatisticsError(
                f"statistics are of keys of {m.mlp_out or 'the usual matrix'}, the recipe's layout "
                f"names {mlp_out or 'none'}: run `nulledit stats make` with --recipe"
            )
        if m.model_hash != model_hash:
            raise StatisticsError(
                f"statistics are of {m.model} (weights {m.model_hash[:12]}), "
                f"the model's weights are {model_hash[:12]}: make its own by `nulledit stats make`"
            )
        missing = [layer for layer in layers if layer not in self.spectra]
        if missing:
            raise StatisticsError(
                f"statistics cover layers {sorted(self.spectra)}, layers {missing} are needed: "
                f"run `nulledit stats make` with --layers {','.join(map(str, layers))}"
            )

    def thresholds(self, rule: NullSpaceSettings) -> dict[int, float]:
        """The eigenvalue below which a direction is free, by layer."""
        found = RULES[rule.rule]
        return {i: found(s.eigenvalues, rule.value) for i, s in sorted(self.spectra.items())}

    def rows(self, rule: NullSpaceSettings) -> list[dict[str, Any]]:
        """What is protected in each layer and what leaks, as plain data."""
        return [
            {
                "layer": layer,
                "tokens": self.manifest.tokens,
                "experts": list((spectrum := self.spectra[layer]).tokens),
                "d_in": spectrum.d_in,
                "threshold": threshold,
                "protected": spectrum.protected(threshold),
                "leakage": spectrum.leakage(threshold),
                "largest": spectrum.eigenvalues.flip(0)[:3].tolist(),
                "median": float(spectrum.eigenvalues.median()),
            }
            for layer, threshold in self.thresholds(rule).items()
        ]

    def excess(self, times: int = 1) -> float | None:
        """By how much energies kᵀC⁻¹k of other text come out too high, as a share.

        n/(n − d) − 1 of n samples in d directions, of the layer where it is most; of a mixture for
        the median of the experts that may be edited. None from n = d down. `times`: with so many
        times the tokens that there are.
        """
        found = []
        for spectrum in self.spectra.values():
            routed = [n for n in spectrum.tokens if n >= spectrum.width]
            n = times * (int(median(routed)) if routed else self.manifest.tokens)
            found.append(spectrum.width / (n - spectrum.width) if n > spectrum.width else None)
        return None if None in found else max(share for share in found if share is not None)

    def save_compact(self, file: str | Path, thresholds: dict[int, float]) -> None:
        """One small file.

        Of keys all eigenvalues, and the thinner side at `thresholds` in float16; of inputs, of
        which every direction is needed, the inverse's factor in float16.
        """
        tensors: dict[str, torch.Tensor] = {}
        starts: dict[str, int] = {}
        for layer, spectrum in self.spectra.items():
            if self.manifest.inputs:
                tensors |= inverse_tensors(spectrum, layer)
                continue
            kept = spectrum.compact(thresholds[layer])
            tensors |= spectrum_tensors(kept, layer)
            starts |= {name: part.start for name, part in kept.parts(str(layer)).items()}
        metadata = {"manifest": self.manifest.to_json(), "starts": json.dumps(starts)}
        save_alone(Path(file), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, *, kind: str = KEYS) -> Statistics:
        """Read a folder made by `collect` or a compact file; StatisticsError otherwise.

        `kind`: which to read of a folder that holds both, keys and inputs.

        What is not as it was written is refused; what is from before hashes were written with
        statistics can't be checked, which is said.
        """
        path = Path(path)
        path = parts_of(path).get(kind, path)
        found = cls._of_folder(path) if path.is_dir() else cls._of_file(path)
        if not found.checked:
            logger.warning("%s: %s", path, UNCHECKED)
        return found

    @classmethod
    def shipped(cls, wanted: Callable[[Manifest], bool]) -> Iterator[Statistics]:
        """Those that come with the package and have a `wanted` manifest."""
        with resources.as_file(resources.files("nulledit") / "assets" / "statistics") as folder:
            for file in sorted(folder.glob("*.safetensors")):
                with opened_file(file) as (_, metadata):
                    manifest = Manifest.from_json(metadata.get("manifest", ""), str(file))
                if wanted(manifest):
                    yield cls._of_file(file)

    @classmethod
    def _of_folder(cls, folder: Path) -> Statistics:
        manifest, hashes = read_manifest(folder)
        check_file(folder / SPECTRA, hashes)
        with opened_file(folder / SPECTRA) as (tensors, _):
            found = {i: tensors.layer(i, tensors.block) for i in manifest.layers}
            return cls(manifest, found, bool(hashes))

    @classmethod
    def _of_file(cls, file: Path) -> Statistics:
        with opened_file(file) as (tensors, metadata):
            checked = tensors.check(metadata)
            manifest = Manifest.from_json(metadata.get("manifest", ""), str(file))
            starts = parse_json(
                metadata.get("starts", "{}"), source=f"{file}: starts", error=StatisticsError
            )
            if not isinstance(starts, dict):
                raise StatisticsError(f"{file}: starts are no object")
            found = {
                i: tensors.layer(i, lambda name: thin(tensors, name, starts))
                for i in manifest.layers
            }
            return cls(manifest, found, checked)
