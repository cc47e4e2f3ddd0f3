"""`nulledit ask`: one prompt on the base and the edited model."""

from __future__ import annotations

from nulledit.cli.command import Call, command
from nulledit.cli.options import CHAT, PLACED, RUN, arg, least, opt
from nulledit.errors import ConfigError


@command(
    "One prompt, base and edited model.",
    RUN,
    arg("prompt", "PROMPT"),
    opt("--max-tokens N", "Longest answer, in tokens.", least(1), 24),
    CHAT,
    opt("--plain", "As plain text, also where facts were edited in chat.", bool),
    PLACED,
)
def ask(call: Call) -> None:
    """What the base and the edited model of a run say after PROMPT, greedily, up to a newline.

    A run that was edited in the chat template is asked in it; --chat asks any run so. A PROMPT that
    ends with a question mark is asked as it is, another one as a blank to fill in (docs/chat.md).

    \b
    $ nulledit ask run "The capital of France is"
    $ nulledit ask run "What is the capital of France?" --chat --system none
    """
    if call.plain and (call.chat or call.system is not None):
        raise ConfigError("--plain can't be given with --chat or --system")
    run = call.open()
    chat = False if call.plain else call.chat_form(run.editor.recipe.chat, asks=True)
    said = run.ask(call.prompt, chat=chat, max_tokens=call.max_tokens)
    call.show(said.to_dict(), f"base    {said.base}\nedited  {said.edited}")
