"""Gated edits: the formula, undo to the bit, facts that do not see each other."""

import copy

import pytest
import torch
from support.models import RECIPE, build_model, statistics_of

from transformers import AutoModelForCausalLM

from nulledit import Editor
from nulledit.errors import ConfigError, ModelError
from nulledit.methods.gates import ACTIVATIONS
from nulledit.models.load import model_hash
from nulledit.runs.verify import verify

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


def test_a_run_is_saved_loaded_and_gone_on_with(architecture, tokenizer, facts, tmp_path):
    if architecture in EXPERTS:
        return
    model = build_model(architecture)
    base = model_hash(model)
    editor = editor_of(model, tokenizer)
    editor.edit(facts[:3])
    editor.save(tmp_path)
    edited = bits(model)
    other = Editor.load(tmp_path)
    assert same_bits(bits(other.model), edited)
    with other.base_weights():
        assert model_hash(other.model) == base
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    other.edit(facts[3:])
    editor.detach()
    editor.edit(facts[3:])
    for name, tensor in bits(model).items():
        found = other.model.state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=1e-6, atol=1e-7)  # values by descent
    other.save(tmp_path)
    assert verify(tmp_path).problems == []
    other.restore()
    other.save(tmp_path)
    assert verify(tmp_path).problems == []
