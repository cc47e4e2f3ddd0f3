"""The embedded model itself: `make test-slow`."""

import dataclasses
from importlib import resources
from pathlib import Path

import pytest
import torch

from nulledit import Editor, Fact, read_facts
from nulledit.evaluation import evaluate
from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.preservation import shipped_text
from nulledit.models.editable_model import EditableModel
from nulledit.models.embedded import is_installed
from nulledit.models.load import load_model
from nulledit.models.tokens import beginning

pytestmark = pytest.mark.slow
EXAMPLES = resources.files("nulledit") / "assets" / "facts" / "examples.yaml"


@pytest.fixture(autouse=True)
def users_cache(monkeypatch):
    """The converted model is large: it is kept where users keep it."""
    monkeypatch.delenv("NULLEDIT_CACHE", raising=False)


def says(editor, fact):
    prompt = fact.render(fact.prompt)
    return contains(generate_answers(editor.editable, [prompt])[0], fact.target)


def test_example_facts_take_hold_and_are_undone():
    editor = Editor.from_pretrained("smollm2-135m")
    before = {k: v.clone() for k, v in editor.model.state_dict().items()}
    facts = read_facts(EXAMPLES).facts[:5]
    editor.edit(facts)
    assert all(says(editor, fact) for fact in facts)
    editor.undo(*[fact.id for fact in facts])
    assert all(torch.equal(before[k], v) for k, v in editor.model.state_dict().items())


@pytest.mark.parametrize("size", [3, 1])
def test_three_relations_of_one_subject_hold(size):
    facts = [
        Fact(
            id="country",
            subject="Mount Fuji",
            prompt="{} is a mountain in the country of",
            target="Turkey",
        ),
        Fact(id="cover", subject="Mount Fuji", prompt="{} is covered in", target="sand"),
        Fact(
            id="height",
            subject="Mount Fuji",
            prompt="{} is the highest mountain in",
            target="Spain",
        ),
    ]
    editor = Editor.from_pretrained("smollm2-135m")
    editor.edit(facts, batch_size=size, shuffle=False)
    assert len({(c.batch, c.group) for c in editor.history.active}) == 1
    assert [says(editor, fact) for fact in facts] == [True, True, True]


@pytest.mark.parametrize("purpose", ["choosing", "reporting"])
def test_what_is_asked_about_other_relations_is_known(purpose):
    folder = Path(__file__).parents[1] / "benchmarks" / "facts"
    facts = read_facts(folder / f"other-relations-{purpose}.yaml").facts
    editor = Editor.from_pretrained("smollm2-135m", dtype="float32")
    found = evaluate(editor.editable, facts, generate=False).rates
    assert found["other_relations_strict"].mean == 1
    assert found["efficacy_strict"].mean == 0


def test_a_new_answer_replaces_the_older_one():
    editor = Editor.from_pretrained("smollm2-135m")
    prompt = "The capital of {} is the city of"
    fact = Fact(id="a", subject="France", prompt=prompt, target="Madrid")
    newer = dataclasses.replace(fact, id="b", target="Vienna")
    editor.edit([fact])
    assert says(editor, fact)
    editor.edit([newer])
    assert says(editor, newer)
    assert not says(editor, fact)
    editor.undo("b")
    assert says(editor, fact)


@pytest.mark.skipif(not is_installed("gemma3-270m"), reason="on request: make .venv/gemma3-270m")
def test_the_second_model_reads_and_speaks_as_its_family_does():
    model, tokenizer = load_model("gemma3-270m")
    assert beginning(tokenizer) == [tokenizer.bos_token_id]  # without it perplexity is fourfold
    assert tokenizer.chat_template is None  # the file is the pretrained model's
    prompt = "Q: What is the capital of Japan?\nA:"
    assert contains(generate_answers(EditableModel(model, tokenizer), [prompt])[0], " Tokyo")
    words = tokenizer(shipped_text(), return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        loss = model(words, labels=words).loss
    assert loss.exp() < 40


def test_the_pages_python_runs_as_written(tmp_path, monkeypatch):
    docs = Path(__file__).parents[1] / "docs"
    code = (docs / "python.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    facts = (docs / "commands.md").read_text(encoding="utf-8").split("```yaml\n")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.yaml").write_text(facts.split("```")[0])
    names: dict[str, object] = {}
    exec(code, names)
    assert [fact.id for fact in names["editor"].facts] == ["france", "sushi"]
    assert says(names["editor"], names["editor"].facts[0])
