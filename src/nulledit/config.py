"""Settings: frozen dataclasses that pydantic checks, read from and written to YAML recipes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml

from nulledit.errors import ConfigError
from nulledit.io.settings import (
    Count,
    Expected,
    NotNegative,
    OneSlot,
    Positive,
    Several,
    Whole,
    checked,
    load_settings,
    read_settings,
    shipped,
    shown,
    unknown,
)
from nulledit.io.untrusted import parse_yaml

ModulePath = Annotated[
    str,
    Expected(
        "a path of module names with dots between",
        lambda path: re.fullmatch(r"\w+(\.\w+)*", path),
    ),
]
SystemPrompt = Annotated[str, Expected("a text that is not empty, none or default", str.strip)]
ChatTurn = Annotated[
    str,
    Expected(
        "a text with exactly one {}, or an empty one", lambda text: text.count("{}") == bool(text)
    ),
]
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate makes itself."""
DEFAULT = "default"
"""The shipped recipe of a model that has none of its own."""
UNRECORDED: dict[str, dict[str, Any]] = {
    "betaedit": {"moment_weight": 15000.0},
    "encore": {"history": False},
}
"""What a method did by default, where it does otherwise now, before ledgers held all constants."""


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model are to be loaded."""

    device_map: str | Mapping[str, str | int]
    """One of `SPREADS`; or one device; or a device for each part by its path, where what is on
    "cpu" is offloaded if others compute, and what is on "disk" always."""
    max_memory: Mapping[str | int, str | int] | None = None
    """Most that a device may hold, such as {0: "20GiB", "cpu": "60GiB"}; for maps that are made."""
    offload_folder: str | None = None
    """Where parts on "disk" are kept that can't be read from the checkpoint as they are."""


RELATIONS = (
    "{} was born in",
    "{} is located in",
    "{} is known for",
    "The capital of {} is",
    "{} belongs to",
)
"""Prompts on other relations that fit some subjects of any kind: as few as hold as much as ten."""

HOLD = ("relation_prompts", "relation_weight", "relations_per_step")
"""Fields that say what of other relations is held, and how."""


@checked
@dataclass(frozen=True)
class ValueSettings:
    """How z is optimised. Defaults are those of AlphaEdit's published code."""

    steps: Count = 25
    """Forward passes per fact; the last one makes no update (as published)."""
    learning_rate: Positive = 0.5
    """Adam's step size. Published: 0.5; 0.1 for LLaMA3."""
    learning_rate_of: Literal["unit", "state"] = "unit"
    """What `learning_rate` is counted in. unit: in each coordinate's own unit (published). state: a
    step that moves every coordinate moves δ by that share of ‖h‖, since states of some models are a
    hundred times as long as those of others; on SmolLM2-135M 0.125 is then what 0.5 is in units.
    Where a norm follows W, 0.5 in units is taken as 0.125 of the state."""
    clamp: Positive = 0.75
    """Largest ‖δ‖/‖h‖."""
    kl_weight: NotNegative = 0.0625
    """Weight of the drift KL(new ‖ old) of what is predicted at the subject's last token in
    `kl_prompt`."""
    weight_decay: NotNegative = 0.5
    """Weight of ‖δ‖/‖h‖²."""
    stop_loss: NotNegative = 0.05
    """A fact is done when its loss (nats) is below this and `stop_margin` is kept."""
    stop_margin: NotNegative | None = 0.0
    """Nats by which every token of the target must lead its strongest rival in every row, contexts
    included, before a fact is done. A mean alone may be small while the one token that decides is
    still wrong. Where the steps run out first, the best step counts rather than the last. null: the
    mean loss alone decides, and the last step counts (published)."""
    contexts_per_step: Whole = 0
    """So many prefix contexts (and rewordings) a step reads beside the bare prompts, in turn; 0:
    all (published). Before a fact leaves, a step reads all of its rows, so it holds in as many;
    of such steps the best counts where the steps run out."""
    patience: Whole = 0
    """A fact leaves when this many steps took less than 1 % off its loss; 0: never (published)."""
    kl_prompt: OneSlot = "{} is a"
    """Where the subject's own meaning is held: its last token must predict as before. What stands
    after `{}` is not read, as published."""
    relation_prompts: Several[OneSlot] = RELATIONS
    """Prompts on other relations of the subject, at whose ends it must predict as before, weighed
    by `relation_weight`. Left out are those that begin a prompt of the fact, or of another one on
    its key, and those that such a prompt begins."""
    relation_weight: NotNegative = 0.0
    """Weight of the mean KL(new ‖ old) there; 0: they are not read (published)."""
    relations_per_step: Whole = 0
    """So many of them a step reads, in turn, once the first step has read what the model says at
    all of them; 0: all. Before a fact leaves, a step reads all of its rows."""
    stop_when_likeliest: Whole = 0
    """A fact leaves at so many steps at which every token of its target was the likeliest one in
    all its contexts, the bare prompt not looked at (ENCORE's early stop, arXiv:2502.01636);
    published: 2 for LLaMA3, 3 for LLaMA2, 4 for GPT2-XL. 0: never."""
    norm_anchor: bool = False
    """Scale what W is to give, v* = v₀ + δ, to its mean norm over a fixed sample of facts in the
    unedited model; where it is over twice that, leave δ out (NAS, arXiv:2602.02543)."""
    at: Literal["last", "each", "joint", "first"] = "last"
    """last: one value after the last edited layer; the others take a share of what is missing.
    each: a value at every edited layer, each written whole (BLUE, which edits two layers).
    joint: the same, but all of them are optimised at once in the model as it is.
    first: one value after the first; the states that it causes at the others are their values
    (forward replay, FE), each written whole."""
    rounds: Count = 1
    """Passes over a batch. An update answers every key in proportion to its likeness, also those of
    the fact's own prompt and target, which its value did not see. In each further pass, what does
    not lead by `stop_margin` in the edited model gets the rest that it lacks there, within the
    clamp, and the batch is solved again; the round after which most lead counts. Published: 1."""
    rewordings: Whole = 0
    """Further rows of each prompt that have its subject and its last word, and other words between
    them: a value that also holds there hangs less on one wording. Published: 0."""
    chunk_tokens: Whole = 0
    """A target longer than this is written in chunks, each at the end of the one before (AnyEdit);
    0: never."""

    @property
    def held_relations(self) -> tuple[str, ...]:
        """Those of `relation_prompts` that are read."""
        return self.relation_prompts if self.relation_weight else ()

    def __post_init__(self) -> None:
        listed, by_turns = tuple(self.relation_prompts), self.relations_per_step
        if self.relation_weight and not listed:
            raise ConfigError(
                f"values.relation_weight is {self.relation_weight:g}, but values.relation_prompts "
                "is empty: leave the list out for the one that comes with nulledit"
            )
        if not self.relation_weight and (listed not in ((), RELATIONS) or by_turns):
            name = "relations_per_step" if by_turns else "relation_prompts"
            raise ConfigError(
                f"values.{name} is read with a values.relation_weight above 0 alone: give one, "
                "such as 4"
            )
        if self.norm_anchor and self.rounds > 1:
            raise ConfigError("values.norm_anchor fixes a value's length: set values.rounds to 1")
        if self.norm_anchor and self.at == "joint":
            raise ConfigError(
                "values.norm_anchor scales each layer's value by itself: set values.at to each"
            )


@checked
@dataclass(frozen=True)
class ContextSettings:
    """Prefix texts that stand before a prompt, so that an edit does not hang on one wording."""

    count: Whole = 5
    """Number of sampled prefixes beside the bare prompt."""
    tokens: Whole = 10
    """Length of each, in tokens."""
    starts: Several[str] = ("The", "Therefore", "Because", "I", "You")
    """First words, used in turn (as published)."""
    texts: Several[OneSlot] = ()
    """Given contexts with one `{}` each, the bare "{}" first, instead of sampled ones."""
    bare_weight: Annotated[float, Expected("a number from 0 to 1", ge=0, le=1)] = 0.5
    """Weight of the bare prompt in the mean key; the others share the rest."""

    def __post_init__(self) -> None:
        if self.count and not self.starts:
            raise ConfigError("contexts.starts is empty; give words, or set contexts.count to 0")
        if self.count and not self.texts and not self.tokens:
            raise ConfigError("contexts.tokens is 0; expected 1 or more, or contexts.count of 0")
        if self.texts and self.texts[0] != "{}":
            raise ConfigError('contexts.texts must begin with the bare context "{}"')


@checked
@dataclass(frozen=True)
class NullSpaceSettings:
    """Which directions of the preserved keys count as free."""

    rule: Literal["absolute", "leakage", "median"] = "absolute"
    """absolute: eigenvalue < value (published). leakage: free directions hold at most the share
    `value` of all energy. median: eigenvalue < value × the median eigenvalue."""
    value: Positive = 0.02
    """Published: 2e-2 for `absolute` (squared activation units; the paper's footnote says 1e-2)."""

    def __post_init__(self) -> None:
        if self.rule == "leakage" and self.value >= 1:
            raise ConfigError(f"null_space.value is {self.value}; a leakage is a share below 1")


@checked
@dataclass(frozen=True)
class MethodSettings:
    """Which method solves. In a recipe its constants stand beside its name: `l2: 10`."""

    name: str = "alphaedit"
    """See `nulledit methods`."""
    projection: Literal["own", "none", "inside", "after"] = "own"
    """The null-space projection of the update. own: as the method was published. inside: solved
    within the null space. after: the finished update is projected."""
    otherwise: str = ""
    """The method where a model can't take this one, such as gates of experts; empty: refused."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """The method's own settings by name; those left out have its defaults."""


@checked
@dataclass(frozen=True)
class StatisticsSettings:
    """How preserved keys are sampled from a corpus."""

    tokens: Whole = 0
    """Token budget; 0: the whole corpus."""
    packing: Literal["packed", "lines"] = "packed"
    """packed: one stream cut into full windows. lines: each line on its own (as published)."""
    window: Count = 512
    """Window in tokens; with `lines`, longer lines are cut."""
    count_first: bool = True
    """Whether position 0 of a window counts. It is an attention sink with an unusual key."""
    names: bool = False
    """Whether only the last tokens of names (capitalised words) count: what subjects' keys are like
    is then what is preserved (after SUIT, which has the subjects themselves)."""


@checked
@dataclass(frozen=True)
class Layout:
    """Where a model keeps its decoder blocks and the matrix W that writes each MLP's output."""

    blocks: ModulePath = ""
    """Path from the causal language model to the list of decoder blocks."""
    mlp_out: ModulePath = ""
    """Path from a block to the module W."""
    output: Literal["plain", "scaled", "normed"] = "plain"
    """How W's output enters the residual stream. plain: added. scaled: added times a constant, as
    in Granite. normed: added after a norm of its own, as in Gemma 2, Gemma 3 and OLMo 2."""


@checked
@dataclass(frozen=True)
class ChatSettings:
    """How a prompt becomes a question in the model's chat template (docs/chat.md)."""

    system: SystemPrompt = "default"
    """The system prompt. default: no system message, so what the template writes by itself. none:
    as default, but an empty message where the template would write one of its own."""
    user: OneSlot = "Fill in the blank: {} ____"
    """The user's turn around a prompt; a prompt that ends with a question mark stands alone."""
    assistant: ChatTurn = "{}"
    """How the assistant's turn begins: with the prompt, or empty. Empty after a question."""
    subject: Literal["user", "assistant"] = "user"
    """In which turn the subject's last token is edited, where it stands in both."""
    template: str = ""
    """SHA-256 of the template; filled in when the recipe is first used."""
    plain: bool = False
    """Whether facts are plain text as well: each has one value for both forms and holds if it holds
    in both. Asked as plain text where one form must do."""
    optional: bool = False
    """Whether a model without a template, or with one that can't be used, takes plain text alone,
    as does a recipe with `values.chunk_tokens`. Once a recipe is used on a model this is settled,
    and false."""

    def __post_init__(self) -> None:
        if self.subject == "assistant" and not self.assistant:
            raise ConfigError("chat.subject is assistant, but chat.assistant is empty")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; switches only where set, as in recipes from before there were any."""
        told = dataclasses.asdict(self)
        return {k: v for k, v in told.items() if v or k not in ("plain", "optional")}


@checked
@dataclass(frozen=True, repr=False)
class Recipe:
    """Everything that decides what an edit computes, beside the model, the facts and the seed."""

    kind: ClassVar[str] = "recipe"
    folder: ClassVar[str] = "recipes"

    layers: Several[int] = ()
    """Edited blocks, ascending from 0; z is optimised after the last. Empty: five by depth."""
    method: MethodSettings = field(default_factory=MethodSettings)
    """The solve."""
    null_space: NullSpaceSettings = field(default_factory=NullSpaceSettings)
    """The projection."""
    values: ValueSettings = field(default_factory=ValueSettings)
    """The optimisation of z."""
    contexts: ContextSettings = field(default_factory=ContextSettings)
    """Prefixes."""
    same_key: Annotated[float, Expected("a cosine above 0, at most 1", gt=0, le=1)] = 0.99
    """Cosine at the first edited layer above which facts share one key and so one δ."""
    batch_size: Count = 100
    """Facts solved together."""
    batching: Literal["order", "keys"] = "order"
    """Which facts of a call make a batch. order: those that follow each other, in an order fixed by
    the seed. keys: those whose keys are alike, around facts taken in that order."""
    chunk_positions: Whole = 0
    """Token positions that run together while values are optimised; 0: by device."""
    layout: Layout | None = None
    """Where the model keeps its blocks and W; left out, the known family's or what tracing finds.
    It stays the same for all epochs of a run."""
    chat: ChatSettings | None = None
    """Facts stand in the model's chat template; left out, they are plain text."""

    def __post_init__(self) -> None:
        if list(self.layers) != sorted(set(self.layers)) or any(i < 0 for i in self.layers):
            raise ConfigError(f"layers are {list(self.layers)}; expected ascending numbers from 0")
        if self.chat and self.values.chunk_tokens:
            if not self.chat.optional:
                raise ConfigError(
                    "values.chunk_tokens can't be used with chat: a chunk stands in the "
                    "assistant's turn, where no prompt can; set it to 0"
                )
            object.__setattr__(self, "chat", None)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers)) or "by depth"
        return f"<Recipe {self.method.name}: layers {layers}, batches of {self.batch_size}>"

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Build from plain data, None for all defaults; ConfigError for what can't be."""
        data = {} if data is None else data
        if isinstance(data, Mapping) and isinstance(method := data.get("method"), Mapping):
            data = {**data, "method": _with_constants(method)}
        if isinstance(data, Mapping) and isinstance(values := data.get("values"), Mapping):
            if values.get("relation_prompts") == [] and values.get("relation_weight") == 1.0:
                # As recipes that hold none were written when the list was the switch.
                kept = {name: value for name, value in values.items() if name not in HOLD}
                data = {**data, "values": kept}
        return read_settings(cls, data)

    @classmethod
    def recorded(cls, data: Mapping[str, Any]) -> Recipe:
        """Build from what a ledger holds; a field that it lacks means what was done before."""
        method = data.get("method", {})
        if isinstance(method, Mapping):
            data = {**data, "method": UNRECORDED.get(str(method.get("name")), {}) | {**method}}
        values = data.get("values", {})
        if isinstance(values, Mapping):
            values = {"stop_margin": None, **values}
            if isinstance(stop := values.get("stop_when_likeliest"), bool):
                values["stop_when_likeliest"] = int(stop)  # it was a switch: the first such step
            if not (values.get("relation_prompts") and values.get("relation_weight", 1.0)):
                for name in HOLD:  # none were held, whatever the others said
                    values.pop(name, None)
            data = {**data, "values": values}
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        data = _plain(dataclasses.asdict(self))
        data["method"] |= data["method"].pop("constants")
        if not self.method.otherwise:
            del data["method"]["otherwise"]  # as in recipes that were recorded before there was one
        if self.layout is None:
            del data["layout"]  # as in recipes that were recorded before there was one
        if self.chat is None:
            del data["chat"]
        else:
            data["chat"] = self.chat.to_dict()
        return data

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def with_fields(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted fields replaced: `{"values.steps": 15}`; strings are read as YAML.

        Another `method.name` leaves the old method's constants and projection behind, and one that
        is named has no other in its place.
        """
        data = self.to_dict()
        if "method.name" in changes:
            data["method"].pop("otherwise", None)
        if changes.get("method.name", self.method.name) != self.method.name:
            data["method"] = {"name": changes["method.name"]}
        for dotted, value in changes.items():
            *path, last = dotted.split(".")
            place: Any = data
            for i, part in enumerate(path):
                name = ".".join(path[: i + 1])
                if part not in place:
                    raise ConfigError(unknown(name, place))
                place = place[part]
                if not isinstance(place, dict):
                    raise ConfigError(
                        f"{name} is {shown(place)}; it has no setting {last!r} of its own: give "
                        f"{name}=VALUE"
                    )
            if isinstance(value, str) and (value.strip() or not isinstance(place.get(last), str)):
                value = parse_yaml(value, source=dotted, error=ConfigError)
            place[last] = value
        return Recipe.from_dict(data)


def layers_by_depth(depth: int) -> tuple[int, ...]:
    """Five layers of a model with `depth` blocks, placed as LLaMA3's published 4-8 of 32.

    Never the last block, above which nothing would read the edit.
    """
    first = round(0.13 * depth)
    return tuple(range(first, min(first + 5, max(depth - 1, 1))))


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return shipped(Recipe)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by file or by the name of a shipped one."""
    return load_settings(Recipe, name_or_path)


def read_recipe(recipe: Recipe | str | Path | None, name: str) -> Recipe:
    """The recipe itself, from its file, or the one to use on the model `name`."""
    if recipe is None:
        recipe = name if name in shipped_recipes() else DEFAULT
    if not isinstance(recipe, Recipe | str | Path):
        raise ConfigError(
            f"recipe is a {type(recipe).__name__}; expected a Recipe (of a mapping: "
            "Recipe.from_dict), a file or a shipped recipe's name"
        )
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


OWN = ("name", "projection", "otherwise")
"""Settings that every method has; what else a recipe says of one are its constants."""


def _with_constants(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings, with what stands beside `OWN` as its constants."""
    if "constants" in method:
        raise ConfigError(unknown("method.constants", OWN))
    own = {key: method[key] for key in OWN if key in method}
    constants = {key: value for key, value in method.items() if key not in own}
    return {**own, "constants": constants}  # which the method itself checks


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
