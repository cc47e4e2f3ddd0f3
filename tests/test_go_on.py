"""The command that goes on: the same one again, less what the ledger has by then."""

import shlex
from pathlib import Path

import click
import pytest

from nulledit.cli.edit import edit
from nulledit.cli.going_on import edit_again
from nulledit.cli.options import Opt

OPTIONS = [p for p in edit.params if isinstance(p, click.Option) and p.name != "run"]
FIXED, OF_EPOCH = (
    {o.name for o in OPTIONS if isinstance(o, Opt) and o.fixed == by} for by in ("run", "epoch")
)


def value_of(option):
    """Something that the option takes, with a space where it may have one."""
    if isinstance(option.type, click.Choice):
        return [option.type.choices[-1]]
    if isinstance(option.type, click.types.IntParamType):
        return ["3"]
    return [] if option.is_flag else ["0.5" if option.type is click.FLOAT else "values.x=a b"]


def parsed(words):
    """What a command makes of its words."""
    return edit.make_context("edit", [str(word) for word in words])


def advice(words, *, kept):
    """What the command of `words` would say after `kept` batches, as its words."""
    context = parsed(words)
    folder = Path(context.params["run"] or context.params["out"])
    with context.scope():
        line = edit_again(folder, kept)
    program, name, *rest = shlex.split(line)
    assert (program, name) == ("nulledit", "edit")
    return rest


def test_before_the_first_batch_of_an_epoch_it_is_the_same_command():
    """With every option there is, each as it was given; the epoch's own as well."""
    there = [o for o in OPTIONS if o.name not in FIXED]
    words = ["my facts.yaml", "--continue", "a run"]
    words += [word for o in there for word in (o.opts[0], *value_of(o))]
    assert parsed(advice(words, kept=0)).params == parsed(words).params
    twice = ["f", "--continue", "r", "--new-epoch", "--set", "a=1", "--set", "b=2"]
    assert parsed(advice(twice, kept=0)).params == parsed(twice).params


@pytest.mark.parametrize("begins", [True, False])
def test_afterwards_it_leaves_out_what_the_ledger_has(begins):
    """And nothing else: an option is left out only where `--continue` would refuse it or repeat."""
    options = [o for o in OPTIONS if (o.name != "new_epoch" if begins else o.name not in FIXED)]
    words = ["facts.yaml", *(["--out", "run"] if begins else ["--continue", "run"])]
    words += [w for o in options if o.name != "out" for w in (o.opts[0], *value_of(o))]
    then, now = parsed(words).params, parsed(advice(words, kept=2)).params
    left_out = parsed(["facts.yaml"]).params
    assert now["run"] == "run"
    for option in OPTIONS:
        gone = option.name in {*FIXED, *OF_EPOCH, "new_epoch"}
        assert now[option.name] == (left_out if gone else then)[option.name]


def test_what_was_not_given_is_not_there():
    words = ["facts.yaml", "--continue", "run", "--new-epoch", "--method", "memit-history"]
    assert sorted(advice(words, kept=0)) == sorted(words)
    assert advice(words, kept=1) == ["facts.yaml", "--continue", "run"]
