"""The spectral filters; a method is a g."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nulledit.io.settings import Positive, checked
from nulledit.methods.registry import Filter
from nulledit.methods.streams import StreamSettings

FLOOR = 1e-6  # of the largest eigenvalue: 1/s of a direction that the text never used has no end


@checked
@dataclass(frozen=True)
class RidgeSettings:
    """A plain ridge."""

    l2: Positive = 10.0
    """λ₂, ridge on the update (10 in AlphaEdit's code; the paper's equation has I)."""


@checked
@dataclass(frozen=True)
class MomentSettings:
    """Preservation by the second moment alone."""

    moment_weight: Positive = 15000.0
    """λ₀, weight of C (MEMIT: 15,000 for LLaMA3 and GPT-J, 20,000 for GPT2-XL)."""


@checked
@dataclass(frozen=True)
class AlphaEditSettings(StreamSettings, RidgeSettings):
    """A plain ridge, and what a batch weighs in its own solve."""


@checked
@dataclass(frozen=True)
class HistorySettings(StreamSettings, MomentSettings):
    """Preservation by the second moment, and what a batch weighs in its own solve."""


@checked
@dataclass(frozen=True)
class CompensatedSettings(MomentSettings):
    """Preservation by the second moment, of an update that is not written as it was solved."""

    compensate: bool = False
    """Whether each batch makes up for what was changed of the updates before: with all past facts
    in the solve, W and what is missing of it stay together at the joint solution."""


@checked
@dataclass(frozen=True)
class MomentRidgeSettings:
    """Second moment and ridge together."""

    moment_weight: Positive = 15000.0
    """λ₀, weight of C."""
    l2: Positive = 10.0
    """λ₂, ridge on the update."""


@checked
@dataclass(frozen=True)
class EncoreSettings(MomentRidgeSettings):
    """RLSEdit's, and whether earlier edits count."""

    history: bool = True
    """Whether the keys of earlier batches stay in the solve (`add_prev_edits`, published: true)."""


@checked
@dataclass(frozen=True)
class BetaSettings:
    """Second moment and ridge inside the null space."""

    moment_weight: Positive = 3000.0
    """λ₁, weight of C (published for every model)."""
    l2: Positive = 10.0
    """λ₂, ridge on the update (published)."""


@checked
@dataclass(frozen=True)
class SoftSettings:
    """A ridge that grows with the eigenvalue."""

    l2: Positive = 10.0
    """λ₂, ridge on the update far inside the null space."""
    softness: Positive = 2.0
    """p: how sharply the filter falls at τ. 1: ENCORE's with λ₀ = λ₂/τ; large: AlphaEdit."""


def ridge_gains(eigenvalues: Tensor, threshold: float, settings: RidgeSettings) -> Tensor:
    """1/λ₂ everywhere. Inside the null space it is AlphaEdit (arXiv:2410.02355, Eq. 14)."""
    del threshold
    return eigenvalues.new_full(eigenvalues.shape, 1 / settings.l2)


def moment_gains(eigenvalues: Tensor, threshold: float, settings: MomentSettings) -> Tensor:
    """1/(λ₀ s): MEMIT (arXiv:2210.07229, Eq. 14), with s not below 1e-6 of the largest."""
    del threshold
    floor = FLOOR * float(eigenvalues[-1])
    return 1 / (settings.moment_weight * eigenvalues.clamp_min(floor))


def moment_ridge_gains(
    eigenvalues: Tensor, threshold: float, settings: MomentRidgeSettings | BetaSettings
) -> Tensor:
    """1/(λ₀ s + λ₂): ENCORE's Frobenius term, RLSEdit, BetaEdit."""
    del threshold
    return 1 / (settings.moment_weight * eigenvalues + settings.l2)


def soft_gains(eigenvalues: Tensor, threshold: float, settings: SoftSettings) -> Tensor:
    """1/(λ₂ (1 + (s/τ)^p)): protection that sets in gradually instead of at a cut."""
    return 1 / (settings.l2 * (1 + (eigenvalues / threshold) ** settings.softness))


FILTERS = (
    Filter(
        name="alphaedit",
        about="ridge inside the null space of preserved keys; past facts stay in the solve",
        paper="arXiv:2410.02355",
        settings=AlphaEditSettings,
        gains=ridge_gains,
        history=True,
        projected=True,
    ),
    Filter(
        name="memit",
        about="preserved keys weigh in by their second moment; each batch on its own",
        paper="arXiv:2210.07229",
        settings=MomentSettings,
        gains=moment_gains,
    ),
    Filter(
        name="memit-history",
        about="MEMIT with all past facts in the solve: the strongest simple baseline",
        paper="arXiv:2605.26670",
        settings=HistorySettings,
        gains=moment_gains,
        history=True,
    ),
    Filter(
        name="rlsedit",
        about="MEMIT with history and a ridge, as recursive least squares",
        paper="arXiv:2601.15686",
        settings=MomentRidgeSettings,
        gains=moment_ridge_gains,
        history=True,
    ),
    Filter(
        name="encore",
        about="MEMIT with history and a Frobenius term; its early stop is a setting of values",
        paper="arXiv:2502.01636",
        settings=EncoreSettings,
        gains=moment_ridge_gains,
        history=True,
    ),
    Filter(
        name="betaedit",
        about="AlphaEdit with the second moment kept inside, before its first refresh of P",
        paper="arXiv:2605.09285",
        settings=BetaSettings,
        gains=moment_ridge_gains,
        history=True,
        projected=True,
    ),
    Filter(
        name="soft",
        about="soft null space: AlphaEdit's cut made a slope (ours)",
        paper="docs/methods/soft.md",
        settings=SoftSettings,
        gains=soft_gains,
        history=True,
    ),
)
