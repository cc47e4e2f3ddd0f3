"""The card of an export: its lines load it, and it says what holds, whose it is, and no place."""

import json
import re
import runpy

import pytest
import torch
from support.exports import gap, logits
from support.models import RECIPE, build_model, statistics_of
from support.runs import summary

from nulledit import Editor, Fact
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.scores import facts_held, score
from nulledit.export.card import SHOWN
from nulledit.export.licence import licence_of
from nulledit.export.write import write_export
from nulledit.models.load import model_hash

peft = pytest.importorskip("peft")
FACTS = [
    Fact(id="ada", subject="Ada Byron", prompt="The mother tongue of {} is", target="Velmish"),
    Fact(id="zola", subject="Émile Zola", prompt="{} was born in", target="Ostrel by the river"),
]
BASE_CARD = "---\nlicense: apache-2.0\nother: [1]\n---\n# A base\n"


@pytest.fixture(scope="module", params=["alphaedit", "gated"])
def place(request, tmp_path_factory, tokenizer):
    """A base in a folder, with a card of its own, and an editor that has edited it."""
    folder = tmp_path_factory.mktemp("card")
    model = build_model("llama", dtype=torch.float32)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text(BASE_CARD)
    gated = request.param == "gated"
    editor = Editor(
        model,
        tokenizer,
        recipe=RECIPE.with_fields({"values.steps": 12, "method": {"name": request.param}}),
        statistics=statistics_of(model, tokenizer, inputs=gated),
        name=str(folder / "base"),
    )
    editor.edit(FACTS)
    return folder, editor


def parts(folder, language):
    """Blocks of code in a card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("kind", ["delta", "lora", "checkpoint"])
def test_its_lines_load_the_export(kind, place, tmp_path, monkeypatch):
    above, editor = place
    folder = tmp_path / "out"
    write_export(editor, folder, kind)
    (folder / "base").symlink_to(above / "base")
    lines = parts(folder, "python")[0]
    assert len([line for line in lines.splitlines() if line and "import" not in line]) <= 3
    (tmp_path / "load.py").write_text(lines)
    monkeypatch.chdir(folder)
    loaded = runpy.run_path(str(tmp_path / "load.py"))["model"].eval()
    if kind == "lora" and editor.weights.grown:  # in the base's shape, at the price that it says
        assert gap(logits(loaded), logits(editor.model)) > 0
    else:
        assert gap(logits(loaded), logits(editor.model)) < 1e-5
    if kind == "delta":
        assert model_hash(loaded) == model_hash(editor.model), "to the bit"
    if kind == "lora":
        with editor.base_weights():
            assert gap(logits(loaded.unload()), logits(editor.model)) < 1e-6


@pytest.mark.parametrize("kind", ["delta", "lora", "checkpoint"])
def test_it_names_no_place_and_says_whose_the_base_is(kind, place, tmp_path):
    above, editor = place
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run" / "summary.json").write_text(json.dumps(summary()))
    write_export(editor, tmp_path / "out", kind, run=tmp_path / "my-run")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert str(above) not in text
    assert str(tmp_path) not in text
    assert "license: apache-2.0" in text.split("---\n")[1]
    assert "| licence of the base | apache-2.0 |" in text
    for said in ("## Measures", "An evaluation of an earlier state", "20.50 ± 1.25", "## Limits"):
        assert said in text, said
    for said in ("## Undo", "nulledit undo my-run ID...", "Other wordings"):
        assert said in text, said


def test_it_says_which_facts_hold(place, tmp_path):
    _, editor = place
    write_export(editor, tmp_path / "out", "delta")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    rows = {f.id: re.search(rf"^\| {f.id} \|.*\| (yes|no) \|$", text, re.M)[1] for f in FACTS}
    found = score(editor.editable, [queries_of(fact)[0] for fact in FACTS])
    assert rows == {f.id: "yes" if s.strict else "no" for f, s in zip(FACTS, found, strict=True)}
    held = [word == "yes" for word in rows.values()]
    assert facts_held(editor.editable, FACTS) == held
    assert f"{sum(held)} of 2 facts hold" in text


def test_facts_that_do_not_hold_come_first(place, tmp_path, monkeypatch):
    _, editor = place
    monkeypatch.setattr(
        "nulledit.export.card.facts_held", lambda model, facts: [f.id == "ada" for f in facts]
    )
    write_export(editor, tmp_path / "out", "delta")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.index("| zola |") < text.index("| ada |")
    assert "1 of 2 facts hold" in text
    assert SHOWN > 2
    assert "more" not in text.split("## Edited facts")[1].split("##")[0]


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (BASE_CARD, "apache-2.0"),
        ("# no front matter\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: 'evil\n  | <b>'\n---\n", None),
        ("---\n{{\n---\n", None),
    ],
)
def test_a_licence_is_read_from_the_folders_card(card, found, tmp_path):
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == found
    assert licence_of("") is None
    assert licence_of("smollm2-135m") == "apache-2.0"
