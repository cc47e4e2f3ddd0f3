"""Options that say all about themselves, and those that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from nulledit.errors import ConfigError
from nulledit.io.files import from_anywhere

if TYPE_CHECKING:
    from nulledit.config import ChatSettings, NullSpaceSettings, Placement, Recipe

MOST_DIGITS = 4  # of a layer's number


class Opt(click.Option):
    """An option, with what it means for a run and its recipe."""

    def __init__(
        self,
        *words: Any,
        fixed: str = "",
        field: str = "",
        read: Callable[[str], Any] | None = None,
        **more: Any,
    ):
        """`fixed` by the "run" once it began, or by its "epoch": not to be given again.

        `field`: of the recipe, which it sets, so that the epoch fixes it; `read`: its value from
        the word that was given.
        """
        super().__init__(*words, **more)
        self.fixed, self.field, self.read = fixed or ("epoch" if field else ""), field, read

    @property
    def flag(self) -> str:
        """As it is written in full."""
        return next(name for name in self.opts if name.startswith("--"))

    @property
    def given(self) -> bool:
        """Whether the user gave it to the command at work."""
        source = click.get_current_context().get_parameter_source(self.name or "")
        return source not in (None, ParameterSource.DEFAULT)


Part: TypeAlias = "click.Parameter | Sequence[Part]"
"""What a command is made of."""


def parameters(parts: Sequence[Part]) -> list[click.Parameter]:
    """All of `parts`, in their order."""
    found: list[click.Parameter] = []
    for part in parts:
        found += [part] if isinstance(part, click.Parameter) else parameters(part)
    return found


def arg(name: str, metavar: str, **more: Any) -> click.Argument:
    """An argument called `name`, shown as `metavar`; [IN BRACKETS] it may be left out."""
    return click.Argument([name], metavar=metavar, required=not metavar.startswith("["), **more)


def opt(words: str, about: str, kind: Any = str, default: Any = None, **more: Any) -> Opt:
    """The option `--steps N`, with `about` in the help, and None or `default` if it is left out.

    `kind`: what click converts to; a tuple is of the words to choose from, and bool is a flag.
    `name`: of the parameter. The rest is as for `Opt`.
    """
    flag, _, metavar = words.partition(" ")
    names = [flag, *([more.pop("name")] if "name" in more else [])]
    if kind is bool:
        return Opt(names, help=about, is_flag=True, **more)
    if default is not None:  # click takes a None for a value, also of an option that must be given
        more["default"] = default
    return Opt(
        names,
        type=click.Choice(kind) if isinstance(kind, tuple) else kind,
        metavar=metavar or None,
        show_default=default is not None and "[default" not in about,
        help=about,
        **more,
    )


def least(number: int) -> click.IntRange:
    """A whole number that is not smaller."""
    return click.IntRange(number)


def _whole(_context: click.Context, option: click.Parameter, seed: int | None) -> int | None:
    from nulledit.io.settings import check_whole

    if seed is not None:
        check_whole("--seed", seed)
    return seed


def _with_gate(context: click.Context, _option: click.Parameter, folder: str | None) -> str | None:
    if folder is not None and context.params["gate"] is None:
        raise ConfigError("--capability belongs to --gate FILE")
    return folder


RUN = arg("run", "RUN")
JSON = opt("--json", "One JSON document on stdout instead of tables.", bool, name="as_json")
QUIET = Opt(["--quiet", "-q"], is_flag=True, help="No progress and no notices.")
TRUST = opt("--trust-remote-code", "Run code that comes with the model.", bool)
DEVICE = (
    opt("--device", "auto (a GPU if there is one), cpu, cuda:1, mps.  [default: auto]"),
    opt(
        "--device-map MAP",
        "auto, balanced or sequential; a device; or a JSON file, part to device.",
    ),
    opt("--max-memory LIST", "Of each device, as 0=20GiB,cpu=60GiB."),
    opt("--offload-folder DIR", "For parts on disk, where needed."),
)
PLACED = (*DEVICE, TRUST)
"""Of commands that load a run."""
DTYPE = opt(
    "--dtype",
    "Of the weights, as they are loaded.  [default: the checkpoint's own]",
    ("float32", "bfloat16", "float16"),
    fixed="run",
)
QUANTIZE = opt(
    "--quantize",
    "Quantise the model as it is loaded, by bitsandbytes; edits are kept beside it.",
    ("4bit", "8bit"),
    fixed="run",
)
MODEL = (*DEVICE, DTYPE, QUANTIZE, TRUST)
"""Of commands that load a model."""
SKIP_BAD = opt("--skip-bad", "Leave out records that can't be read, and say which.", bool)
SKIP = opt("--skip N", "Leave out the first records.", least(0), 0)
FACTS = (
    opt("--limit N", "Take so many records.  [default: all]", least(1)),
    opt(
        "--on-conflict",
        "Which record counts where two contradict each other.",
        ("error", "first", "last"),
        "error",
    ),
    SKIP_BAD,
)
"""Of commands that read a file of facts."""
GATE = (
    opt(
        "--gate FILE|default",
        "Limits (see nulledit check); a model that breaks one is not written.",
        is_eager=True,
    ),
    opt(
        "--capability DIR", "With --gate: the six tasks, sst2.jsonl and so on.", callback=_with_gate
    ),
)
CHAT = (
    opt("--chat", "Prompts in the model's chat template.", bool, fixed="epoch"),
    opt(
        "--system TEXT|none|default",
        "With --chat: the system prompt.  [default: what the template writes by itself]",
        fixed="epoch",
    ),
)
BOTH = opt(
    "--both",
    "Prompts in the chat template and as plain text, one value for both.",
    bool,
    fixed="epoch",
)
PLAIN = opt(
    "--plain",
    "Prompts as plain text alone.  [default: the recipe's; without one, as --both]",
    bool,
    fixed="epoch",
)
FORMS = (*CHAT, BOTH, PLAIN)
"""Of commands that write facts, or choose how."""
TEXT = opt("--text FILE", "For perplexity and KL.  [default: one that comes with nulledit]")
STATS = opt("--stats PATH", "Statistics, see nulledit stats make.  [default: found]", fixed="epoch")


def seed(about: str, default: int | None = 0, **more: Any) -> Opt:
    """--seed, of what `about` says."""
    return opt("--seed N", about, int, default, callback=_whole, **more)


def given_words(*, without: Collection[str] = ()) -> list[str]:
    """What the user gave to the command at work, for one that goes on: arguments and options.

    Read off the parsed parameters, so that no option can be forgotten. `without`: parameters to
    leave out.
    """
    context = click.get_current_context()
    words: list[str] = []
    for parameter in context.command.get_params(context):
        value = context.params.get(parameter.name or "")
        if parameter.name in without or value is None:
            continue
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(parameter, Opt) and parameter.given:
            each = [value] if not parameter.multiple else value
            flag = parameter.flag
            words += [flag] if parameter.is_flag else [w for v in each for w in (flag, str(v))]
    return words


def given_options() -> list[Opt]:
    """The options that the user gave to the command at work."""
    context = click.get_current_context()
    found = context.command.get_params(context)
    return [option for option in found if isinstance(option, Opt) and option.given]


def placed(
    device: str | None, device_map: str | None, max_memory: str | None, offload_folder: str | None
) -> str | Placement | None:
    """The device, or what the options beside it say about several."""
    from nulledit.config import Placement

    if device_map is None:
        if max_memory or offload_folder:
            raise ConfigError("--max-memory and --offload-folder go with --device-map")
        return device
    if device is not None:
        raise ConfigError("give --device or --device-map, not both")
    return Placement(_parse_map(device_map), _parse_memory(max_memory), offload_folder)


def _parse_map(text: str) -> str | dict[str, str | int]:
    if not (text.endswith(".json") or Path(text).is_file()):
        return text
    from nulledit.io.untrusted import MAX_SETTINGS, parse_json, read_text

    content = read_text(Path(text), most=MAX_SETTINGS, error=ConfigError, what="device map")
    found = parse_json(content, source=text, error=ConfigError)
    if not isinstance(found, dict):
        raise ConfigError(f"{text}: expected an object, part to device")
    return found


def _parse_memory(text: str | None) -> dict[str | int, str | int] | None:
    if text is None:
        return None
    found: dict[str | int, str | int] = {}
    for entry in text.split(","):
        device, equals, size = (part.strip() for part in entry.partition("="))
        if not equals or not device or not re.fullmatch(r"\d+([KMGT]i?B)?", size):
            raise ConfigError(f"--max-memory {text!r}: expected a list such as 0=20GiB,cpu=60GiB")
        found[int(device) if device.isdigit() else device] = int(size) if size.isdigit() else size
    return found


def parse_layers(text: str) -> list[int]:
    """`4,5,6` or `4-8` as numbers."""
    layers: list[int] = []
    for part in text.replace(" ", "").split(","):
        low, dash, high = part.partition("-")
        numbers = (low, high) if dash else (low,)
        if not all(text.isdecimal() and len(text) <= MOST_DIGITS for text in numbers):
            raise ConfigError(f"--layers {text!r}: expected numbers such as 4,5,6 or 4-8")
        layers += range(int(low), int(high or low) + 1)
    if not layers:
        raise ConfigError(f"--layers {text!r}: names no layer")
    return layers


def parse_null_space(text: str) -> dict[str, Any]:
    """`leakage=0.1` as the recipe's null_space."""
    from nulledit.io.settings import typed

    rule, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--null-space {text!r}: expected RULE=VALUE such as leakage=0.1")
    return {"rule": rule.strip(), "value": typed(value.strip())}


def null_space(text: str) -> NullSpaceSettings:
    """`leakage=0.1` as checked settings."""
    from nulledit.config import Recipe

    return Recipe.from_dict({"null_space": parse_null_space(text)}).null_space


def model_source(name: str) -> str:
    """A local folder or GGUF file as an absolute path: a run finds its base from anywhere."""
    if not name:  # not the folder where we are
        raise ConfigError(
            "the model's name is empty: give smollm2-135m, a local folder, a GGUF file or a Hub id"
        )
    return from_anywhere(name)


def chat_settings(
    held: ChatSettings | None,
    *,
    chat: bool,
    system: str | None,
    both: bool = False,
    plain: bool = False,
) -> ChatSettings | None:
    """`held`, a recipe's chat form, changed by the options of `FORMS`; None for plain text."""
    from dataclasses import replace

    from nulledit.config import ChatSettings

    if plain + chat + both > 1:
        raise ConfigError("give --plain, or --chat or --both, not two of them")
    if plain:
        held = None
    if held is None and not (chat or both):
        if system is not None:
            raise ConfigError("--system belongs to --chat")
        return None
    settings = held or ChatSettings()
    settings = replace(
        settings,
        plain=both or (settings.plain and not chat),
        optional=settings.optional and not (chat or both or system is not None),
    )
    return settings if system is None else replace(settings, system=system)


def changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """`recipe` with the fields that the options of the command at work name.

    Loads torch, as methods do.
    """
    from dataclasses import replace

    from nulledit.io.settings import parse_changes
    from nulledit.methods import change_recipe

    changes = parse_changes(given["changes"])
    for option in given_options():
        if option.field:
            value = given[option.name or ""]
            changes[option.field] = option.read(value) if option.read else value
    named = {name: given[name] for name in ("chat", "system", "both", "plain")}
    recipe = change_recipe(recipe, changes)
    return replace(recipe, chat=chat_settings(recipe.chat, **named))
