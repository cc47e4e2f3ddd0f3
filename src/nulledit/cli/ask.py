"""`nulledit ask`: one prompt on the base and the edited model."""

from __future__ import annotations

from typing import Any

import click

from nulledit.cli.common import device_option, emit, output_options, prepare, trust_option


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
@device_option
@trust_option
@output_options
def ask(
    run: str,
    prompt: str,
    max_tokens: int,
    device: Any,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """What the base and the edited model of a run say after PROMPT, greedily, up to a newline.

    \b
    $ nulledit ask run "The capital of France is"
    """
    prepare(quiet=quiet)
    from nulledit.cli.measure import load_run
    from nulledit.evaluation.generation import generate_answers
    from nulledit.report.text import plain

    editor = load_run(run, device, quiet=quiet, trust_remote_code=trust_remote_code)

    def answer() -> str:
        model, tokenizer = editor.model, editor.tokenizer
        return generate_answers(model, tokenizer, [prompt], max_new_tokens=max_tokens)[0]

    edited = answer()
    with editor.base_weights():
        base = answer()
    if as_json:
        emit({"prompt": prompt, "base": base, "edited": edited})
    else:
        click.echo(f"base    {plain(base)}\nedited  {plain(edited)}")
