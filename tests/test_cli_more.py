"""The command line beyond one edit: methods, projection, further measures, studies, reports."""

import json
import sys

import pytest
import yaml
from support.cli import MAKE_KEYS, done, invoke, refused

from nulledit.config import Recipe
from nulledit.methods import METHODS
from nulledit.studies.registry import STUDIES


def test_any_method_and_the_projection_switch(place, options, tmp_path):
    changes = ("--method", "memit", "--set", "method.moment_weight=0.1")
    for way in ("none", "inside", "after"):
        run = tmp_path / way
        done("edit", place / "facts.json", *options, *changes, "--project", way, "--out", run)
        assert f"projection: {way}" in (run / "recipe.yaml").read_text()
    shares = []
    for way in ("none", "inside", "after"):
        summary = json.loads((tmp_path / way / "summary.json").read_text())
        shares.append([layer["update_share"] for layer in summary["runs"][-1]["layers"]])
    assert len({tuple(s) for s in shares}) == 3, "three different updates"


def test_fine_tuning_leaves_a_recipes_settings_of_values_behind(place, options, tmp_path):
    """As all recipes that come with nulledit have some; those of the user are refused."""
    recipe = tmp_path / "recipe.yaml"
    own = {"values.rounds": 6, "values.rewordings": 2, "values.relation_weight": 1}
    text = (place / "recipe.yaml").read_text(encoding="utf-8")
    recipe.write_text(Recipe.from_dict(yaml.safe_load(text)).with_fields(own).to_yaml())
    words = ("edit", place / "facts.json", *options, "--recipe", recipe, "--method", "ft")
    out = ("--out", tmp_path / "run")
    for more in (("--rewordings", "6"), ("--set", "values.rounds=3"), ("--relation-weight", "4")):
        assert "ft optimises no values, so it can't use values." in refused(*words, *more, *out)
    for more in (("--steps", "25"), ("--learning-rate", "0.1"), ("--clamp", "2")):
        said = refused(*words, *more, *out)
        assert f"can't use values.{more[0].strip('-').replace('-', '_')}; it reads method." in said
        assert "method.steps, method.learning_rate, " in said
        assert "Loading" not in said
    done(*words, *out, "--limit", 1, "--no-evaluate", "--set", "values.rounds=1")
    job = {"model": "model", "facts": ["facts.json"], "set": {"method.name": "ft"}, "out": "job"}
    (place / "ft.yaml").write_text(yaml.safe_dump(job | {"recipe": str(recipe), "stats": "stats"}))
    done("run", place / "ft.yaml", "--dry-run", "--quiet")


def test_gates_refuse_a_null_space_that_is_named(place, options, tmp_path):
    words = ("edit", place / "facts.json", *options, "--method", "gated", "--out", tmp_path / "run")
    for named in (("--null-space", "leakage=0.1"), ("--set", "null_space.value=0.1")):
        assert "gated has no null space" in refused(*words, *named)


def test_methods_are_listed_with_their_settings():
    text = done("methods").stdout
    assert "Settings: moment_weight=" in text
    for method in METHODS:
        assert method.name in text
        assert method.paper in text
    listed = json.loads(done("methods", "--json").stdout)
    assert "moment_weight" in json.dumps(listed)
    assert "did you mean 'memit'" in refused("methods", "memti")


def test_more_is_asked_of_a_run(edited, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    pair = [("Ada Byron speaks", 1), ("the river flows", 0)] * 3
    for name in ("sst2", "cola"):
        lines = [json.dumps({"sentence": s, "label": y}) for s, y in pair]
        (tasks / f"{name}.jsonl").write_text("\n".join(lines))
    for name in ("mrpc", "rte"):
        lines = [json.dumps({"sentence1": s, "sentence2": s, "label": y}) for s, y in pair]
        (tasks / f"{name}.jsonl").write_text("\n".join(lines))
    labels = ["not_entailment", "entailment"]
    nli = [json.dumps({"sentence1": s, "sentence2": s, "label": labels[y]}) for s, y in pair]
    (tasks / "nli.jsonl").write_text("\n".join(nli))
    mmlu = [
        json.dumps({"question": s, "subject": "x", "choices": list("abcd"), "answer": y})
        for s, y in pair
    ]
    (tasks / "mmlu.jsonl").write_text("\n".join(mmlu))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": f"The river {w}"} for w in ("flows", "is", "was")]))
    references = tmp_path / "references.json"
    references.write_text(json.dumps({"ada": ["Ada Byron speaks Velmish in Velm."]}))
    asked = (
        *("evaluate", edited, "--quiet", "--distract", "--by-relation", "--capability", tasks),
        *("--items", "4", "--prompts", prompts, "--fluency", "--references", references),
    )
    text = done(*asked).stdout
    for said in ("efficacy distracted", "By relation", "sst2", "Drift", "fluency", "consistency"):
        assert said in text, said
    assert "--items belongs to --capability" in refused("evaluate", edited, "--items", 5)
    plain = json.loads(done(*asked, "--json").stdout)
    assert set(plain["capability"]) == {"base", "edited"}
    assert plain["drift"]["layers"]
    assert plain["relations"]["other"]["efficacy"]["n"] == 1  # one of four has an old answer
    assert plain["edited"]["consistency"]["n"] == 1
    references.write_text("[1]")
    assert "expected an object of lists of texts" in refused(*asked)


def test_what_can_not_be_asked_is_refused_before_anything_is(edited, tmp_path, monkeypatch):
    def asked(*_args, **_options):
        raise AssertionError("asked already")

    monkeypatch.setattr("nulledit.runs.evaluated.evaluate_given", asked)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    words = ("evaluate", edited, "--quiet")
    assert "nothere.json" in refused(*words, "--prompts", tmp_path / "nothere.json")
    assert "nothere.txt" in refused(*words, "--prompts", tmp_path / "nothere.txt")
    assert "pip install 'nulledit[harness]'" in refused(*words, "--harness", "foo")


def test_studies_are_listed_and_refused_by_name(tmp_path):
    text = done("study").stdout
    for name in STUDIES:
        assert name in text
    assert set(json.loads(done("study", "--json").stdout)) == set(STUDIES)
    assert "did you mean 'table1'" in refused("study", "tabel1", "--quiet")
    assert "needs --facts" in refused("study", "table1", "--quiet")
    assert "no such file" in refused("study", "table1", "--facts", tmp_path / "no.json", "--quiet")
    facts = tmp_path / "facts.json"
    facts.write_text("[]")
    given = ("study", "table1", "--facts", facts, "--quiet")
    assert "did you mean 'memit'" in refused(*given, "--arms", "memti")
    assert "did you mean 'batch_size'" in refused(*given, "--set", "batchsize=3")
    assert "expected a YAML file, or paper, small" in refused(*given, "--scale", "medium")


@pytest.mark.slow
def test_a_stream_longer_than_the_data_is_refused(tmp_path):
    facts = tmp_path / "facts.json"
    record = {"id": "a", "subject": "Ada", "prompt": "{} is", "target": "x"}
    facts.write_text(json.dumps([record]))
    said = refused("study", "table1", "--facts", facts, "--quiet", "--work", tmp_path / "work")
    assert "has 1 facts after record 0; the stream needs 200" in said


def test_a_study_runs_from_the_command_line(place, tmp_path):
    scale = tmp_path / "tiny.yaml"
    scale.write_text(
        "arms: {alphaedit: {}, memit: {method.name: memit, method.moment_weight: 0.1}}\n"
        "studies: {order: {arms: [alphaedit], facts: 4, skip: 0, batch_size: 2, windows: 1}}\n"
    )
    given = (
        *("study", "order", "--model", place / "model", "--recipe", place / "recipe.yaml"),
        *("--facts", place / "facts.json", "--scale", scale, "--work", tmp_path / "work"),
        *("--out", tmp_path / "order", "--quiet"),
    )
    dry = json.loads(done(*given, "--dry-run", "--json").stdout)
    assert dry["to_edit"] == 4
    assert not (tmp_path / "order").exists()
    # statistics by the model's name lie in the cache of another test's process: make them there
    done(
        *(*MAKE_KEYS, place / "model", "--text", place / "corpus.txt"),
        *("--layers", "1-2", "--window", "64", "--quiet"),
    )
    shown = done(*given).stdout
    assert "By order" in shown
    assert "─────" in shown, "a table of a terminal, not of the page"
    assert "| ---" not in shown
    assert json.loads(done(*given, "--dry-run", "--json").stdout)["to_edit"] == 0
    page = done("report", tmp_path / "order", "--quiet")
    assert (tmp_path / "order" / "report.html").is_file(), page.output
    broken = json.loads((tmp_path / "order" / "study.json").read_text()) | {"format": 99}
    (tmp_path / "order" / "study.json").write_text(json.dumps(broken))
    result = invoke("report", tmp_path / "order", "--quiet")
    assert result.exit_code == 2
    assert "format 99" in result.stderr


def test_methods_are_compared_on_ones_own_facts(place, tmp_path):
    done(
        *(*MAKE_KEYS, place / "model", "--text", place / "corpus.txt"),
        *("--layers", "1-2", "--window", "64", "--quiet"),
    )
    out = tmp_path / "compared"
    given = (
        *("compare", place / "facts.json", "--model", place / "model", "--out", out, "--quiet"),
        *("--recipe", place / "recipe.yaml", "--text", place / "corpus.txt"),
    )
    methods = ("--methods", f"rome,{place / 'recipe.yaml'},prompt")
    dry = json.loads(done(*given, *methods, "--dry-run", "--json").stdout)
    assert dry["model"]["to_edit"] == 2
    assert not (out / "study.json").exists()
    shown = done(*given, *methods).stdout
    for said in ("Facts that hold", "What the models say", "rome", "prompt", "report.html"):
        assert said in shown, said
    page = (out / "report.html").read_text()
    assert "Methods on facts.json" in page
    assert str(tmp_path) not in page, "where files lie is nobody's business"
    dry = json.loads(done(*given, *methods, "--dry-run", "--json").stdout)
    assert dry["model"]["to_edit"] == 0, "it goes on"
    more = json.loads(done(*given, "--methods", "rome,prompt", "--json").stdout)
    assert [row["arm"] for row in more["studies"][0]["tables"][0]["rows"]][1:] == ["rome", "prompt"]
    alone = done(*given, "--methods", "rome").stdout
    assert "What the models say" in alone
    assert "Differences" not in alone
    own = (*given, "--methods", f"rome,{place / 'recipe.yaml'}")
    assert "manifest of statistics" in refused(*own, "--stats", tmp_path)
    assert "of one model" in refused(*own, "--stats", place / "stats", "--model", "other")
    dry = json.loads(done(*own, "--stats", place / "stats", "--dry-run", "--json").stdout)
    assert dry["model"]["to_edit"] == 2, "other statistics are other edits"
    assert "did you mean 'rome'" in refused(*given, "--methods", "rom")
    foreign = (*given[:4], "--out", place)
    assert "nothing of `nulledit compare` is there" in refused(*foreign, "--quiet")
    assert "unknown method 'foo'" in refused(*given, "--methods", "rome,foo")
    for empty in ("", "rome,"):
        assert "methods: expected names" in refused(*given, "--methods", empty)
    assert "statistics: the name is empty" in refused(*given, "--stats", "")
    assert "edit nothing" in refused(*given, "--methods", "prompt,lora")
    assert "twice" in refused(*given, "--methods", "rome,rome")
    assert "name a model" in refused("compare", place / "facts.json")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    assert "no facts" in refused("compare", empty, "--model", place / "model")
