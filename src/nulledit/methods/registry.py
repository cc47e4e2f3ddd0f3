"""The kinds of methods, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from nulledit.config import HOLD, MethodSettings, Recipe, ValueSettings
from nulledit.data.facts import suggest
from nulledit.errors import ConfigError
from nulledit.io.settings import from_yaml, read_settings
from nulledit.linalg.preconditioner import Preconditioner
from nulledit.linalg.solve import solve_update, solve_weighed
from nulledit.methods.problem import LayerProblem
from nulledit.methods.streams import own_weights

Gains = Callable[[Tensor, float, Any], Tensor]
Function = Callable[[LayerProblem], Tensor]
SWITCHES = ("chunk_tokens", "at", "norm_anchor", "rounds", "relation_weight", "rewordings")
"""Settings of values that are refused where there are none, unless they are off."""


def ones(eigenvalues: Tensor, threshold: float, settings: Any) -> Tensor:
    """The gains of an identity, or of P if projected inside."""
    del threshold, settings
    return torch.ones_like(eigenvalues)


def closed_form(problem: LayerProblem) -> Tensor:
    """What every filter solves: Δ = R (I + Kᵀ G K)⁻¹ Kᵀ G, or with T (`StreamSettings`)."""
    K, R, G = problem.keys, problem.residual, problem.preconditioner
    own = own_weights(problem.settings, K.shape[1])
    return solve_update(K, R, G) if own is None else solve_weighed(K, R, G.apply(K), own.to(R))


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every method has; each is of one kind: `Filter`, `Solve`, `Descent` or `Gate`."""

    name: str
    """As in recipes."""
    about: str
    """One line."""
    paper: str
    """Where it is from."""
    settings: type
    """A frozen dataclass of its constants, with defaults."""
    solve: Function
    """The update Δ [d_out, d_in], float64."""
    gains: Gains = ones
    """g: (eigenvalues [d_in], τ, settings) → gains [d_in] of the problem's preconditioner
    G = Q diag(g(s)) Qᵀ, before any projection."""
    trim: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    """(Δ of a batch, the W that it finds, settings) → what of Δ is written."""
    finish: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    """(ΣΔ of all batches, W₀, settings) → what is added to W₀ in its stead."""
    projected: bool = False
    """Whether it projects inside as published."""
    cost: str = "n × n solve"
    """What a batch of n facts costs besides values and keys."""
    page: str = ""
    """Its page in docs/methods/, if it is not the name's own."""

    # What the driver asks of every method; a kind that can be so has a field of that name.
    history = one_by_one = rewinds = reads_moment = by_gradient = apart = False

    @property
    def linear(self) -> bool:
        """Whether what is added to W₀ is linear in R for given keys."""
        return self.finish is None and self.trim is None

    def update(self, problem: LayerProblem) -> Tensor:
        """Δ [d_out, d_in], trimmed, and projected as the problem asks."""
        update, how = self.solve(problem), (problem.projector, problem.projection)
        return self.written(update, problem.weight, problem.settings, *how)

    def written(
        self, update: Tensor, weight: Tensor, settings: Any, projector: Preconditioner, how: str
    ) -> Tensor:
        """What is written of a solved `update` onto `weight`; `how`: none, inside or after."""
        if self.trim:  # which may lead out of the null space again
            update = self.trim(update, weight, settings)
        projects = how == "after" or (how == "inside" and self.trim is not None)
        return projector.apply(update.mT).mT if projects else update

    def edited(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Of a recipe's layers, those that it edits."""
        return layers

    def keeps(self, settings: Any) -> bool:
        """Whether it has history with these constants, one of which may turn it on or off."""
        if self.history:
            return bool(getattr(settings, "history", True))
        return bool(getattr(settings, "compensate", False))

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
        values, off = recipe.values, ValueSettings()
        for name in SWITCHES if self.by_gradient else ():
            if getattr(values, name) != getattr(off, name):
                raise ConfigError(self._no_values(f"values.{name}"))
        if self.rewinds and values.rounds > 1:
            raise ConfigError(
                f"{self.name} takes its values from the unedited model: set values.rounds to 1"
            )

    def check_named(self, names: Iterable[str]) -> None:
        """ConfigError for dotted fields that someone names and the method does not read.

        Not for `SWITCHES`, which may be off.
        """
        off = {f"values.{name}" for name in SWITCHES}
        for name in names if self.by_gradient else ():
            if name.split(".")[0] == "values" and name not in off:
                raise ConfigError(self._no_values(name))

    def _no_values(self, field: str) -> str:
        own = ", ".join(f"method.{name}" for name in self.constants())
        return (
            f"{self.name} optimises no values, so it can't use {field}; "
            f"{f'it reads {own}' if own else 'leave it out'}"
        )

    @property
    def unused(self) -> tuple[str, ...]:
        """Settings of values that it can't use."""
        if self.by_gradient:
            return (*SWITCHES, *HOLD)
        return ("rounds",) if self.rewinds else ()

    def without_unused(self, recipe: Recipe, named: Collection[str]) -> Recipe:
        """`recipe` with settings of values off that the method can't use, but for those `named`."""
        if "values" in named:
            return recipe
        off = ValueSettings()
        left = {name: getattr(off, name) for name in self.unused if f"values.{name}" not in named}
        return replace(recipe, values=replace(recipe.values, **left))

    def projection(self, settings: MethodSettings) -> str:
        """The projection in force: none, inside or after."""
        if settings.projection != "own":
            return settings.projection
        return "inside" if self.projected else "none"

    def constants(self) -> dict[str, Any]:
        """The settings' names and defaults."""
        return {f.name: f.default for f in fields(self.settings)}


@dataclass(frozen=True, kw_only=True)
class Filter(Method):
    """A function of the spectrum: its gains, which `closed_form` solves with.

    With history the solve over all facts so far goes on from batch to batch, so that a batch costs
    itself alone (`linalg.solve.RecursiveState`).
    """

    gains: Gains = field()
    solve: Function = field(init=False, default_factory=lambda: closed_form)
    history: bool = False
    """Whether past facts stay in the system, so that batches equal one joint solve."""


@dataclass(frozen=True, kw_only=True)
class Solve(Method):
    """A function from a layer's problem to its update."""

    history: bool = False
    """Whether the problem is of all facts so far, on W₀. They are solved anew with every batch,
    which takes ever longer; a `Filter` does not."""
    one_by_one: bool = False
    """Whether facts are edited one at a time, each on the model that the one before left."""
    rewinds: bool = False
    """Whether values are optimised on the unedited model."""
    reads_moment: bool = False
    """Whether it reads C itself off the spectrum, so that every eigenvector is kept."""
    linear: bool = True
    cost: str = "its own solve; with history of all facts so far, anew with every batch"


@dataclass(frozen=True, kw_only=True)
class Descent(Method):
    """A function from a problem that has the targets' loss in the model to its update.

    No values are optimised, the ledger keeps the update itself, and a batch can only be undone as
    a whole (the rest is edited anew).
    """

    linear = False
    by_gradient = True


def no_update(problem: LayerProblem) -> Tensor:
    """A gated edit is no update of W; TypeError."""
    raise TypeError(f"layer {problem.layer}: gated edits are neurons, not an update of W")


@dataclass(frozen=True, kw_only=True)
class Gate(Method):
    """Neurons of their own for facts, in one block's MLP; W stays as it is.

    Keys are the MLP's inputs. Values and residuals of the first round are of the unedited model, so
    facts do not see each other until their columns are solved together.
    """

    solve: Function = field(init=False, default_factory=lambda: no_update)
    history = apart = True
    linear = False
    cost: str = "n × n solve, and one of the MLP input's width"

    def edited(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The last: a fact has one neuron."""
        return layers[-1:]

    def check(self, recipe: Recipe) -> None:
        """ConfigError for what gates can't use."""
        super().check(recipe)
        if recipe.method.projection != "own":
            raise ConfigError(f"{self.name} has no projection: its gates are closed on text")
        if recipe.values.chunk_tokens:
            raise ConfigError(f"{self.name} writes whole targets: set values.chunk_tokens to 0")

    def check_named(self, names: Iterable[str]) -> None:
        """ConfigError for a null space, which gates have not."""
        super().check_named(names)
        for name in names:
            if name.split(".")[0] == "null_space":
                raise ConfigError(
                    f"{self.name} has no null space, so it can't use {name}: its gates are closed "
                    "on text; leave it out, or name a method that has one, such as alphaedit"
                )


class Registry:
    """Methods by name: those that were added, and those that installed packages offer."""

    def __init__(self, group: str = ""):
        """`group`: the entry points by which packages offer methods; empty: none are looked for."""
        self.group, self._looked = group, not group
        self._methods: dict[str, Method] = {}

    def add(self, method: Method) -> Method:
        """Make `method` known to recipes; ConfigError if its name is taken or it has no kind."""
        if type(method) is Method:
            raise ConfigError(f"{method.name}: make it a Filter, a Solve, a Descent or a Gate")
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

    def change(self, recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
        """`recipe` with `changes` that someone asks for, as `Recipe.with_fields` makes them.

        Another method also leaves settings of the recipe's values behind that it can't use.
        ConfigError for fields in `changes` that the method does not read.
        """
        changed = recipe.with_fields(changes)
        method = self.find(changed.method.name)
        method.check_named(changes)
        if method.name == recipe.method.name:
            return changed
        return method.without_unused(changed, changes)

    def __iter__(self) -> Iterator[Method]:
        """All of them, as registered."""
        self._look()
        return iter(tuple(self._methods.values()))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What is registered inside is gone afterwards, and packages are asked anew inside."""
        before = self._looked, dict(self._methods)
        self._looked = not self.group
        try:
            yield
        finally:
            self._looked, self._methods = before

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
