"""Gated edits: the formula, undo to the bit, facts that do not see each other."""

import copy

import pytest
import torch
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor
from nulledit.errors import ConfigError, ModelError
from nulledit.methods.gates import ACTIVATIONS

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
GATED = RECIPE.with_fields({"method.name": "gated", "layers": [1]})


def editor_of(model, tokenizer, recipe=GATED):
    statistics = statistics_of(model, tokenizer, layers=(1,), inputs=True)
    return Editor(model, tokenizer, recipe=recipe, statistics=statistics)


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_every_architecture_is_edited_and_undone_to_the_bit(architecture, tokenizer, facts):
    model = build_model(architecture)
    before = bits(model)
    if architecture in EXPERTS:
        with pytest.raises(ModelError, match="can't be given neurons"):
            editor_of(model, tokenizer)
        return
    editor = editor_of(model, tokenizer)
    editor.edit(facts[:2])
    two = bits(model)
    editor.edit(facts[2:])
    editor.undo(*(f.id for f in facts[2:]))
    assert same_bits(bits(model), two)
    editor.redo()
    editor.restore()
    assert same_bits(bits(model), before)
