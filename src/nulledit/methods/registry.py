"""The table of methods, and the one place where a method meets the projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from nulledit.config import MethodSettings, Recipe
from nulledit.data.facts import suggest
from nulledit.errors import ConfigError
from nulledit.io.settings import from_yaml, read_settings
from nulledit.linalg.solve import solve_update
from nulledit.methods.problem import LayerProblem

Gains = Callable[[Tensor, float, Any], Tensor]


def solve_filter(problem: LayerProblem) -> Tensor:
    """The family's closed form: Δ = R (I + Kᵀ G K)⁻¹ Kᵀ G."""
    return solve_update(problem.keys, problem.residual, problem.metric)


@dataclass(frozen=True)
class Method:
    """One method and its traits; the driver reads traits, never names."""

    name: str
    """As in recipes."""
    about: str
    """One line."""
    paper: str
    """Where it is from."""
    settings: type
    """A frozen dataclass of its constants, with defaults."""
    gains: Gains
    """The spectral filter: (eigenvalues [d_in], τ, settings) → g [d_in], before any projection."""
    solve: Callable[[LayerProblem], Tensor] = solve_filter
    """The update Δ [d_out, d_in], float64."""
    finish: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    """(ΣΔ of all batches, W₀, settings) → what is added to W₀ in its stead."""
    history: bool = False
    """Whether past facts stay in the system, so that batches equal one joint solve."""
    projected: bool = False
    """Whether it projects inside as published."""
    one_by_one: bool = False
    """Whether facts are edited one at a time, each on the model that the one before left."""
    rewinds: bool = False
    """Whether values are optimised on the unedited model."""
    by_gradient: bool = False
    """Whether Δ comes from the targets' loss in the model: no values are optimised, the ledger
    keeps the update itself, and a batch can only be undone as a whole (the rest is edited anew)."""
    linear: bool = True
    """Whether what is added to W₀ is linear in R for given keys."""
    reads_moment: bool = False
    """Whether it reads C itself off the spectrum, so that every eigenvector is kept."""
    cost: str = "n × n solve"
    """What a batch of n facts costs beside values and keys."""
    page: str = ""
    """Its page in docs/methods/, if it is not the name's own."""

    @property
    def joint(self) -> bool:
        """Whether batches are one joint solve of the family's closed form and nothing else."""
        return self.history and self.solve is solve_filter and self.finish is None

    def keeps(self, settings: Any) -> bool:
        """Whether it has history with these constants, one of which may turn it off."""
        return self.history and bool(getattr(settings, "history", True))

    def read(self, settings: MethodSettings) -> Any:
        """The constants of a recipe as this method's settings; ConfigError for unknown ones."""
        constants = {name: from_yaml(value) for name, value in settings.constants.items()}
        return read_settings(self.settings, constants, "method.")

    def filled(self, recipe: Recipe) -> Recipe:
        """`recipe` with all constants written out, so that other defaults leave it as it is."""
        constants = asdict(self.read(recipe.method))
        return replace(recipe, method=replace(recipe.method, constants=constants))

    def check(self, recipe: Recipe) -> None:
        """ConfigError for constants or options of `recipe` that the method can't use."""
        self.read(recipe.method)
        values = recipe.values
        unused = {
            "values.chunk_tokens": values.chunk_tokens > 0,
            "values.at": values.at != "last",
            "values.norm_anchor": values.norm_anchor,
            "values.rounds": values.rounds > 1,
        }
        for name, given in unused.items():
            if self.by_gradient and given:
                raise ConfigError(f"{self.name} optimises no values, so it can't use {name}")
        if self.rewinds and values.rounds > 1:
            raise ConfigError(
                f"{self.name} takes its values from the unedited model: set values.rounds to 1"
            )

    def projection(self, settings: MethodSettings) -> str:
        """The projection in force: none, inside or after."""
        if settings.projection != "own":
            return settings.projection
        return "inside" if self.projected else "none"

    def update(self, problem: LayerProblem) -> Tensor:
        """Δ [d_out, d_in], projected as the problem asks."""
        update = self.solve(problem)
        return problem.projector.apply(update.mT).mT if problem.projection == "after" else update

    def constants(self) -> dict[str, Any]:
        """The settings' names and defaults."""
        return {f.name: f.default for f in fields(self.settings)}


class Registry:
    """Methods by name: those that were added, and those that installed packages offer."""

    def __init__(self, group: str = ""):
        """`group`: the entry points by which packages offer methods; empty: none are looked for."""
        self.group, self._looked = group, not group
        self._methods: dict[str, Method] = {}

    def add(self, method: Method) -> Method:
        """Make `method` known to recipes; ConfigError if its name is taken."""
        if method.name in self._methods:
            raise ConfigError(f"a method {method.name!r} is registered already")
        self._methods[method.name] = method
        return method

    def find(self, name: str) -> Method:
        """A method by name, or a ConfigError that suggests near ones."""
        if name not in self._methods:
            self._look()
        if name not in self._methods:
            raise ConfigError(
                f"unknown method {name!r}{suggest(name, self._methods)}; "
                f"known: {', '.join(self._methods)}"
            )
        return self._methods[name]

    def __iter__(self) -> Iterator[Method]:
        """All of them, as registered."""
        self._look()
        return iter(tuple(self._methods.values()))

    def _look(self) -> None:
        """Add what packages offer: a Method, several, or a module that registers its own."""
        if self._looked:
            return
        self._looked = True
        for offer in entry_points(group=self.group):
            try:
                found = offer.load()
            except Exception as error:  # anything can go wrong in code that nobody here has seen
                said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise ConfigError(
                    f"the methods that {offer.value} offers can't be loaded ({said}): mend or "
                    "uninstall that package"
                ) from error
            if isinstance(found, Method):
                self.add(found)
            elif isinstance(found, Iterable):
                for method in found:
                    self.add(method)
