"""`nulledit ask`: one prompt on the base and the edited model."""

from __future__ import annotations

from typing import Any

import click

from nulledit.cli.common import emit, prepare
from nulledit.cli.options import (
    chat_options,
    chat_settings,
    device_option,
    output_options,
    trust_option,
)
from nulledit.errors import ConfigError


@click.command(short_help="One prompt, base and edited model side by side.")
@click.argument("run", metavar="RUN")
@click.argument("prompt")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Longest answer, in tokens.",
)
@chat_options
@click.option("--plain", is_flag=True, help="As plain text, also where facts were edited in chat.")
@device_option
@trust_option
@output_options
def ask(
    run: str,
    prompt: str,
    max_tokens: int,
    device: Any,
    trust_remote_code: bool,
    plain: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """What the base and the edited model of a run say after PROMPT, greedily, up to a newline.

    A run that was edited in the chat template is asked in it; --chat asks any run so. A PROMPT that
    ends with a question mark is asked as it is, another one as a blank to fill in (docs/chat.md).

    \b
    $ nulledit ask run "The capital of France is"
    $ nulledit ask run "What is the capital of France?" --chat --system none
    """
    if plain and (given["chat"] or given["system"] is not None):
        raise ConfigError("--plain can't be given with --chat or --system")
    prepare(quiet=quiet)
    from nulledit.cli.loading import load_run
    from nulledit.evaluation.asking import ask as ask_both
    from nulledit.io.text import plain as shown

    editor = load_run(run, device, quiet=quiet, trust_remote_code=trust_remote_code)

    settings = None if plain else chat_settings(given, editor.recipe.chat)
    model = editor.editable.in_chat(settings)
    found = ask_both(editor, prompt, max_tokens=max_tokens, model=model)
    if as_json:
        emit(found.to_dict())
    else:
        click.echo(f"base    {shown(found.base)}\nedited  {shown(found.edited)}")
