"""An edited embedded model, for tests that start a real server of what it is exported to."""

from importlib import resources

import pytest

from nulledit import Editor, read_facts
from nulledit.config import read_recipe

FACTS = resources.files("nulledit") / "assets" / "facts" / "examples.yaml"


@pytest.fixture(scope="module", params=["alphaedit", "gated"])
def eight_facts(request):
    """An editor of the embedded model with eight facts; converted where users keep it."""
    recipe = read_recipe(None, "smollm2-135m").with_fields({"method.name": request.param})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NULLEDIT_CACHE", raising=False)
        editor = Editor.from_pretrained("smollm2-135m", recipe=recipe)
        editor.edit(read_facts(FACTS).facts[:8])
        yield editor
