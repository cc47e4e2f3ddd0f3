"""A real llama.cpp answers edits as the edited model does: `make test-slow`.

It needs llama-cpp-python (`pip install llama-cpp-python`, which builds llama.cpp), here or in
another Python that NULLEDIT_LLAMA_PYTHON names.
"""

import llamacpp
import pytest
from served import own_answers, rows_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        llamacpp.python() is None,
        reason="needs llama.cpp: pip install llama-cpp-python, here or in the Python that "
        f"{llamacpp.VARIABLE} names",
    ),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, eight_facts):
    """The base in float32: llama.cpp rounds states to eight bits where weights are packed."""
    file = tmp_path_factory.mktemp("plain") / "base.gguf"
    return llamacpp.in_float32(eight_facts, file)


def test_tokens_are_the_same(eight_facts, plain):
    editor = eight_facts
    prompts = [fact.render(fact.prompt) for fact in editor.facts]
    _, texts = llamacpp.answers(plain, [], texts=prompts)
    assert texts == [editor.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]


def test_the_file_and_the_adapter_answer_as_the_edited_model(eight_facts, plain, tmp_path):
    editor = eight_facts
    rows = rows_of(editor)
    own = own_answers(editor.model, rows)
    assert sum(said == target for (_, said), (_, target) in zip(own, rows, strict=True)) >= 7
    gated = editor.recipe.method.name == "gated"
    editor.export(tmp_path / "whole", "gguf", gguf=plain, tensor_type="f32")
    whole, _ = llamacpp.answers(tmp_path / "whole" / "model.gguf", rows)
    assert [said for _, said in whole] == [said for _, said in own]
    assert max(abs(a - b) for (a, _), (b, _) in zip(whole, own, strict=True)) < 0.02
    editor.export(tmp_path / "lora", "gguf-lora", gguf=plain)
    adapted, _ = llamacpp.answers(plain, rows, adapter=tmp_path / "lora" / "adapter.gguf")
    assert [said for _, said in adapted] == [said for _, said in own]
    near = 0.1 if gated else 0.02  # other units are gone
    assert max(abs(a - b) for (a, _), (b, _) in zip(adapted, own, strict=True)) < near
    before, _ = llamacpp.answers(plain, rows)
    assert all(said != target for (_, said), (_, target) in zip(before, rows, strict=True))


@pytest.mark.parametrize("type_", ["f16", "q8_0"])
def test_packed_weights_around_the_edits_answer_as_well(type_, eight_facts, tmp_path):
    """The file as it came, in four bits, with the edits in it."""
    editor = eight_facts
    rows = rows_of(editor)
    done = editor.export(tmp_path / "whole", "gguf", tensor_type=type_)
    said, _ = llamacpp.answers(tmp_path / "whole" / "model.gguf", rows)
    held = sum(given == target for (_, given), (_, target) in zip(said, rows, strict=True))
    assert held >= done.cost.stored_strict - 1
