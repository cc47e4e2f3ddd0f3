"""Architectures besides those of the matrix, tried as docs/architectures.md says."""

import re

import architectures
import pytest
import tiny_models
import torch
import transformers
from architecture_trial import FACTS as TRIED
from architecture_trial import bits, differing, editor_of, tried
from support.locating import SPREAD, question
from support.models import WIDE

from nulledit import Editor, Run
from nulledit.errors import ModelError
from nulledit.models.editable_model import EditableModel
from nulledit.models.layout_tracing import probe
from nulledit.models.layouts import LAYOUTS
from nulledit.tracing.trace import TraceSettings, trace

KINDS = {  # one of each kind that the matrix lacks: its output, whether experts, how spans are run
    "gpt_oss": ("plain", True, "shared"),  # experts with biases
    "llama4_text": ("plain", True, "shared"),  # experts that are given every token
    "afmoe": ("normed", True, "shared"),  # a norm of routed and shared experts together
    "bart": ("normed", False, "whole"),  # a norm of the stream itself; positions count padding
    "gemma4_unified_text, shared keys": ("normed", False, "from below"),
}


@pytest.mark.few("gpt_oss", "afmoe", "bart", of="name")
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_edited_as_the_plain_model_says(name):
    row = tried(name)
    assert (row.refused, row.wrong) == ("", [])
    assert (row.output, row.experts, row.runs) == KINDS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(WIDE) - set(KINDS)))
def test_each_family_of_the_table_is_edited_as_the_plain_model_says(name):
    row = tried(name)
    assert (row.refused, row.wrong, row.traced) == ("", [], False)


@pytest.mark.parametrize("name", WIDE)
def test_tracing_finds_what_the_table_says(name):
    assert probe(tiny_models.build(name, dtype=torch.float32)) == LAYOUTS[name]


@pytest.mark.parametrize("name", ["llama4_text", "gemma4_unified_text, shared keys"])
def test_what_can_not_be_put_back_alone_is_not_traced(name, tokenizer):
    model = EditableModel(tiny_models.build(name), tokenizer)
    with pytest.raises(ModelError, match="can't be traced"):
        trace(model, question(), TraceSettings(draws=2), spread=SPREAD)


def test_the_page_names_every_architecture():
    text = architectures.PAGE.read_text(encoding="utf-8")
    version = re.search(r"transformers ([0-9.]+) has", text)
    assert version
    if version[1] != transformers.__version__:
        pytest.skip(f"the page is of transformers {version[1]}")
    told = re.findall(r"^\| ([^|`]+?) \|", text, re.MULTILINE)
    assert set(architectures.names()) <= set(told)


@pytest.mark.slow
def test_a_crash_is_a_row(monkeypatch):
    def crash(_name, *, quick):
        raise SystemExit(3)

    monkeypatch.setattr(architectures, "tried", crash)
    (row,) = architectures.rows(["llama"], 1)
    assert row.refused == "crashed: the process ended with 3"


def test_a_part_that_is_not_loaded_alone_makes_no_run_and_is_resumed(tmp_path):
    """Emu 3's language model has a configuration of its own that no list of transformers names."""
    editor = editor_of("emu3", [1, 2], torch.float64)
    before = bits(editor.model)
    with pytest.raises(ModelError, match=r"could not be opened again; register it with AutoConfig"):
        Run.create(tmp_path / "run", editor)
    assert not (tmp_path / "run").exists()
    editor.attach(tmp_path / "own")
    editor.edit(TRIED[:2])
    edited = bits(editor.model)
    assert differing(before, edited)
    again = Editor.resume(tmp_path / "own", tiny_models.build("emu3"), editor.tokenizer)
    assert not differing(edited, bits(again.model))
    again.restore()
    assert not differing(before, bits(again.model))
