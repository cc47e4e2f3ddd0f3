"""`nulledit facts`, and the options of every command that reads a file of facts."""

import json
import re

import click
import pytest
import torch
from support.cli import RECORDS, done, invoke, refused
from support.models import build_model

from nulledit.cli.main import cli
from nulledit.data import read_facts

BAD = {"id": "dun", "subject": "Dun", "prompt": "It is called", "target": "x"}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("facts") / "model"
    build_model("llama", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    def to_file(records, name="facts.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
        return path

    return to_file


def checked(file, *words):
    return json.loads(done("facts", "check", file, "--json", *words).stdout)


def test_all_errors_are_told_at_once(write):
    clash = RECORDS[0] | {"id": "other", "target": "Ostrel"}
    file = write([*RECORDS, BAD, RECORDS[0] | {"id": "two", "target": ""}, clash])
    result = invoke("facts", "check", file)
    assert result.exit_code == 2
    problems = result.stdout.splitlines()
    assert [p.split(" ")[1] for p in problems] == ["5", "6", "7"]
    for problem, name in zip(problems, ("dun", "two", "other"), strict=True):
        assert "(line " in problem
        assert f"id '{name}'" in problem
    assert len(result.stderr.splitlines()) == 1
    assert "2 more like it" in result.stderr
    told = json.loads(invoke("facts", "check", file, "--json").stdout)
    assert told["errors"] == problems


def test_bad_records_are_left_out_with_their_number_and_reasons(write):
    file = write([BAD, *RECORDS])
    assert "--skip-bad" in refused("facts", "check", file)
    result = done("facts", "check", file, "--skip-bad")
    assert "1 of 5 records are bad" in result.stderr
    assert "does not contain the subject" in result.stderr
    assert "bad, left out" in result.stdout
    told = checked(file, "--skip-bad")
    assert told["facts"] == 4
    assert [line.split(":")[0] for line in told["bad"]] == ["record 1 (line 2, id 'dun')"]


def commands(command, path=()):
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def test_every_command_that_reads_facts_can_skip_bad_records():
    options = {path: {p.name for p in c.params} for path, c in commands(cli)}
    reading = {path for path, names in options.items() if "on_conflict" in names}
    assert {path[0] for path in reading} >= {"edit", "preview", "tune", "locate", "evaluate"}
    for path in {*reading, ("study",)}:
        assert "skip_bad" in options[path], path
    assert all(isinstance(p, click.Parameter) for _, c in commands(cli) for p in c.params)


def test_edit_skips_bad_records_on_request(write, model):
    file = write([*RECORDS[:2], BAD])
    words = ("edit", file, "--model", model, "--dry-run", "--layers", "1,2")
    assert "--skip-bad" in refused(*words)
    result = done(*words, "--skip-bad", "--json")
    assert json.loads(result.stdout)["facts"] == 2
    assert "id 'dun'" in result.stderr


def test_notices_of_a_long_file_do_not_fill_the_terminal(write):
    file = write(RECORDS * 20)
    result = done("facts", "check", file)
    assert len(result.stderr.splitlines()) == 21
    assert result.stderr.splitlines()[-1].startswith("Note: 56 more")
    assert len(checked(file)["notices"]) == 76


def test_what_the_model_makes_of_facts(write, model):
    twin = RECORDS[3] | {"id": "twin", "prompt": "{} lives at the", "target": "river"}
    records = [*RECORDS, twin]
    (first,) = checked(write(records[:1]), "--model", model)["model"]["facts"]
    says = first["says"].rpartition(" ")[0]  # whole words, whatever comes after them
    assert first["says_old_answer"] is False
    assert says
    records[1] = RECORDS[1] | {"old_answer": "no answer of it"}
    known = RECORDS[0] | {"id": "known", "relation": "b", "target": "x", "target_aliases": [says]}
    told = checked(write([*records, known | {"old_answer": says}]), "--model", model)["model"]
    seen = {item["id"]: item for item in told["facts"]}
    assert seen["karo"]["shares_key"] == ["twin"]
    assert seen["ada"]["shares_key"] == ["known"]
    assert seen["zola"]["shares_key"] == []
    assert (seen["known"]["says_target"], seen["known"]["says_old_answer"]) == (True, True)
    assert (seen["zola"]["says_old_answer"], seen["karo"]["says_old_answer"]) == (False, None)
    assert all(item["target_tokens"] >= 1 for item in seen.values())


def test_the_table_of_a_model(write, model):
    text = done("facts", "check", write(RECORDS), "--model", model, "--quiet").stdout
    assert re.search(r"old answers that the model does not say +1 of 1\n", text)
    assert "not the old answer English" in text


def test_a_target_that_begins_with_a_lone_space_is_told(tiny_model, tokenizer, monkeypatch):
    from nulledit import Fact
    from nulledit.evaluation import outlook as module
    from nulledit.models.editable_model import EditableModel
    from nulledit.models.tokens import Row

    model = EditableModel(tiny_model("llama").float(), tokenizer)
    space, town = (tokenizer(text)["input_ids"][0] for text in (" ", "town"))
    rows = {"1969": (1, 2, space, town), "town": (1, 2, town)}
    monkeypatch.setattr(
        model.encoder, "encode_template", lambda *_, target: Row(rows[target], 1, 2)
    )
    facts = [Fact("Velm", "{} is", t, id=t, relation=t) for t in rows]
    seen = module.outlook(model, facts)
    assert [(item.tokens, item.lone_space) for item in seen] == [(2, True), (1, False)]


@pytest.mark.parametrize("field", ["old_answer", "target_aliases", "prompt"])
def test_all_facts_that_do_not_fit_the_model_are_told(write, model, field):
    long = {
        "old_answer": "river " * 200,
        "target_aliases": ["river " * 200],
        "prompt": "river " * 200 + "{} is",
    }
    bad = [{**RECORDS[3], "id": name, "subject": name, field: long[field]} for name in "ab"]
    file = write([*RECORDS[1:], *bad])
    result = invoke("facts", "check", file, "--model", model, "--quiet")
    assert result.exit_code == 2
    assert "2 of 5 facts don't fit the model: fact 'a': prompt of" in result.stderr
    assert "context of 128, shorten" in result.stderr
    assert "1 more like it" in result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["fact 'a'", "fact 'b'"]
    told = json.loads(invoke("facts", "check", file, "--model", model, "--json", "-q").stdout)
    assert [line.split(":")[0] for line in told["errors"]] == ["fact 'a'", "fact 'b'"]


def test_an_empty_name_is_no_model(write, model, monkeypatch):
    monkeypatch.chdir(model)  # nor is the folder where we are
    file = write(RECORDS)
    assert "name is empty" in refused("facts", "check", file, "--model", "", "-q")
    assert "name is empty" in refused("locate", "", file, "--out", "trace", "-q")


def test_a_system_prompt_alone_is_refused_before_a_model_is_loaded(write, model):
    said = refused("facts", "check", write(RECORDS), "--model", model, "--system", "Be kind.")
    assert "--system belongs to --chat" in said


def test_the_next_command_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "facts check 'my facts.yaml'" in done("facts", "new", "my facts.yaml").stdout


@pytest.mark.parametrize("option", [("--chat",), ("--device", "cpu"), ("--dtype", "float32")])
def test_options_of_a_model_need_one(write, option):
    assert "without --model" in refused("facts", "check", write(RECORDS), *option)


def test_a_template_to_begin_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "facts check mine.yaml" in done("facts", "new", "mine.yaml").stdout
    found = read_facts("mine.yaml")
    assert len(found.facts) == 2
    assert found.notices == ()
    fields = {name for fact in found.facts for name in fact.to_dict()}
    assert fields >= {"target_aliases", "paraphrases", "neighbours", "portability", "old_answer"}
    assert "other_relations" in fields
    assert "is there already" in refused("facts", "new", "mine.yaml")
    assert "ends in .yaml" in refused("facts", "new", "mine.json")
    done("facts", "new")
    assert (tmp_path / "facts.yaml").exists()
