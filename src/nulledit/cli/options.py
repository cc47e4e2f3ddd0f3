"""Options that commands share, and what their words stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import click
from click.core import ParameterSource

from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.config import ChatSettings, NullSpaceSettings, Placement

MOST_DIGITS = 4  # of a layer's number
F = TypeVar("F", bound=Callable[..., Any])


class Sectioned(click.Command):
    """A command whose help shows its options under titles."""

    sections: ClassVar[Mapping[str, Sequence[str]]] = {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by section; those in none come last."""
        left = {p.name: p for p in self.get_params(ctx) if isinstance(p, click.Option)}
        for title, names in (*self.sections.items(), ("Output", tuple(left))):
            found = [left.pop(name, None) for name in names]
            records = [p.get_help_record(ctx) for p in found if p]
            shown = [record for record in records if record]
            if shown:
                with formatter.section(title):
                    formatter.write_dl(shown)


def output_options(command: F) -> F:
    """--json and --quiet."""
    command = click.option("--quiet", "-q", is_flag=True, help="No progress and no notices.")(
        command
    )
    return click.option(
        "--json", "as_json", is_flag=True, help="One JSON document on stdout instead of tables."
    )(command)


def trust_option(command: F) -> F:
    """--trust-remote-code."""
    text = "Run code that comes with the model."
    return click.option("--trust-remote-code", is_flag=True, help=text)(command)


def device_option(command: F) -> F:
    """--device, --device-map, --max-memory and --offload-folder, as the one argument `device`."""

    @wraps(command)
    def with_device(**given: Any) -> Any:
        spread = {name: given.pop(name) for name in PLACING}
        given["device"] = placed(given["device"], **spread)
        return command(**given)

    found: Any = with_device
    for option in (
        click.option("--offload-folder", metavar="DIR", help="For parts on disk, where needed."),
        click.option("--max-memory", metavar="LIST", help="Of each device, as 0=20GiB,cpu=60GiB."),
        click.option(
            "--device-map",
            metavar="MAP",
            help="auto, balanced or sequential; a device; or a JSON file, part to device.",
        ),
        click.option(
            "--device",
            help="auto (a GPU if there is one), cpu, cuda:1, mps.  [default: auto]",
        ),
    ):
        found = option(found)
    return cast(F, found)


PLACING = ("device_map", "max_memory", "offload_folder")


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


def given_words(*, without: Collection[str] = ()) -> list[str]:
    """What the user gave to the command at work, for one that goes on: arguments and options.

    Read off the parsed parameters, so that no option can be forgotten. `without`: parameters to
    leave out.
    """
    context = click.get_current_context()
    words: list[str] = []
    for parameter in context.command.get_params(context):
        name = parameter.name or ""
        default = context.get_parameter_source(name) in (None, ParameterSource.DEFAULT)
        if name in without or default:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(_long(parameter))
        elif isinstance(parameter, click.Option):
            for each in value if parameter.multiple else [value]:
                words += [_long(parameter), str(each)]
        else:
            words.append(str(value))
    return words


def _long(option: click.Option) -> str:
    return next(name for name in option.opts if name.startswith("--"))


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


def quantize_option(command: F) -> F:
    """--quantize."""
    return click.option(
        "--quantize",
        type=click.Choice(["4bit", "8bit"]),
        help="As it is loaded, by bitsandbytes; the edits stay beside it.",
    )(command)


def dtype_option(command: F) -> F:
    """--dtype."""
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Of the weights.  [default: the checkpoint's own]",
    )(command)


def model_options(command: F) -> F:
    """How a model is loaded: `MODEL_OPTIONS`."""
    for option in (trust_option, quantize_option, dtype_option, device_option):
        command = option(command)
    return command


MODEL_OPTIONS = ("device", *PLACING, "dtype", "quantize", "trust_remote_code")


def skip_bad_option(command: F) -> F:
    """--skip-bad."""
    text = "Leave out records that can't be read, and say which."
    return click.option("--skip-bad", is_flag=True, help=text)(command)


def facts_options(command: F) -> F:
    """--limit, --on-conflict and --skip-bad, of commands that read a file of facts."""
    command = skip_bad_option(command)
    command = click.option(
        "--on-conflict",
        type=click.Choice(["error", "first", "last"]),
        default="error",
        show_default=True,
        help="Which record counts where two contradict each other.",
    )(command)
    return click.option(
        "--limit", metavar="N", type=click.IntRange(1), help="Take so many records.  [default: all]"
    )(command)


def skip_option(command: F) -> F:
    """--skip."""
    return click.option(
        "--skip",
        metavar="N",
        type=click.IntRange(0),
        default=0,
        help="Leave out the first records.",
    )(command)


def gate_options(command: F) -> F:
    """--gate and --capability."""
    command = click.option(
        "--capability",
        metavar="DIR",
        help="With --gate: the six tasks, sst2.jsonl and so on.",
        callback=_with_gate,
    )(command)
    return click.option(
        "--gate",
        metavar="FILE",
        is_eager=True,
        help="Limits (see nulledit check); a model that breaks one is not written.",
    )(command)


def _with_gate(context: click.Context, _option: click.Parameter, folder: str | None) -> str | None:
    if folder is not None and context.params["gate"] is None:
        raise ConfigError("--capability belongs to --gate FILE")
    return folder


def chat_options(command: F) -> F:
    """--chat and --system."""
    command = click.option(
        "--system",
        metavar="TEXT|none|default",
        help="With --chat: the system prompt.  [default: what the template writes by itself]",
    )(command)
    return click.option("--chat", is_flag=True, help="Prompts in the model's chat template.")(
        command
    )


def chat_settings(given: Mapping[str, Any], held: ChatSettings | None) -> ChatSettings | None:
    """`held`, a recipe's chat form, changed by --chat and --system; None for plain text."""
    from dataclasses import replace

    from nulledit.config import ChatSettings

    if held is None and not given["chat"]:
        if given["system"] is not None:
            raise ConfigError("--system belongs to --chat")
        return None
    settings = held or ChatSettings()
    return settings if given["system"] is None else replace(settings, system=given["system"])


def seed_option(text: str, *, default: int | None = 0) -> Callable[[F], F]:
    """--seed, of what `text` says."""

    def checked(_context: click.Context, _option: click.Parameter, seed: int | None) -> int | None:
        from nulledit.config import check_whole

        if seed is not None:
            check_whole("--seed", seed)
        return seed

    return click.option(
        "--seed",
        metavar="N",
        type=int,
        default=default,
        show_default=default is not None,
        callback=checked,
        help=text,
    )


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
    rule, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--null-space {text!r}: expected RULE=VALUE such as leakage=0.1")
    return {"rule": rule.strip(), "value": value.strip()}


def null_space(text: str) -> NullSpaceSettings:
    """`leakage=0.1` as checked settings."""
    from nulledit.config import Recipe

    return Recipe.from_dict({"null_space": parse_null_space(text)}).null_space


def parse_changes(settings: tuple[str, ...]) -> dict[str, str]:
    """`--set values.steps=15` entries as {"values.steps": "15"}."""
    changes = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {setting!r}: expected FIELD=VALUE such as values.steps=15")
        changes[name.strip()] = value.strip()
    return changes


def model_source(name: str) -> str:
    """A local folder as an absolute path, so that a run finds its base from anywhere."""
    if not name:  # not the folder where we are
        raise ConfigError(
            "the model's name is empty: give smollm2-135m, a local folder or a Hub id"
        )
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def named(given: Mapping[str, Any], flags: Mapping[str, str]) -> list[str]:
    """The flags in `flags` (parameter -> flag) that the user gave."""
    left_out = {p for p in flags if given[p] is None or given[p] is False or given[p] == ()}
    return [flag for parameter, flag in flags.items() if parameter not in left_out]
