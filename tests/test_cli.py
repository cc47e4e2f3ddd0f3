"""The command line: from facts to a run folder, and every way to be refused."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace

import click
import pytest
import torch
import yaml
from support.cli import MAKE_KEYS, RECORDS, done, invoke, refused, results, state
from support.models import build_model, small_tokenizer
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from nulledit import Editor
from nulledit.cli.main import cli
from nulledit.config import Recipe, ValueSettings
from nulledit.data.readers import read_facts
from nulledit.editing.values import optimise_values
from nulledit.errors import ModelError
from nulledit.evaluation.costs import Costs, Shape, count_rows
from nulledit.evaluation.old_answers import first_clause
from nulledit.models.load import load_model
from nulledit.models.tokens import RowEncoder
from nulledit.runs.holding import mark

# -- what works ------------------------------------------------------------------------------


def test_a_run_folder_has_all_that_was_promised(edited, place):
    names = {p.name for p in edited.iterdir()}
    assert names == {
        *("recipe.yaml", "environment.json", "results.jsonl", "summary.json", "report.md"),
        *("figure.png", "figure.svg", "figure.csv", "model", "ledger"),
    }
    lines = results(edited)
    assert [(line["id"], line["batch"]) for line in lines] == [
        ("ada", 1),
        ("zola", 1),
        ("velm", 2),
        ("karo", 2),
    ]
    assert lines[0]["before"]["specificity_strict"] in (0, 1)
    assert lines[1]["before"]["generalization"] is None  # absent in the data
    summary = json.loads((edited / "summary.json").read_text())
    (run,) = summary["runs"]
    assert run["after"]["rates"]["efficacy"]["n"] == 1  # only one fact has an old answer
    assert run["after"]["rates"]["efficacy_strict"]["n"] == 4
    assert run["before"]["perplexity"]["value"] > 1
    assert run["before"]["kl"] is None
    assert run["after"]["kl"]["value"] > 0
    assert "KL per token (mnat)" in (edited / "report.md").read_text(encoding="utf-8")
    assert [row["layer"] for row in run["layers"]] == [1, 2]
    assert all(row["error"] > 0 for row in run["layers"])
    assert yaml.safe_load((edited / "recipe.yaml").read_text())["values"]["steps"] == 3
    (environment,) = json.loads((edited / "environment.json").read_text())
    assert environment["dtype"] == "float32"
    assert len(environment["model_hash"]) == 64
    assert "東京" in (edited / "report.md").read_text(encoding="utf-8")


def test_the_model_is_an_ordinary_one_with_the_ledgers_weights(edited, place):
    model = AutoModelForCausalLM.from_pretrained(edited / "model")
    editor = Editor.load(edited)
    assert state(edited) == editor.history.state_id
    for (name, a), b in zip(
        model.state_dict().items(), editor.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_edit_prints_answers_and_tables(place, options, tmp_path):
    result = done("edit", place / "facts.json", *options, "--out", tmp_path / "run")
    for text in ("The harbour of 東京 lies on the", "efficacy, strict (%)", "‖ΔK₀‖/‖W₀K₀‖"):
        assert text in result.stdout
    assert "generalization, preference (%)" in result.stdout
    assert str(tmp_path / "run" / "report.md") in result.stdout
    assert result.stderr == ""  # --quiet


def test_json_is_one_document(place, options, tmp_path):
    data = json.loads(
        done("edit", place / "facts.json", *options, "--json", "--out", tmp_path / "run").stdout
    )
    assert data["facts"] == 4
    assert {line["id"] for line in data["results"]} == {"ada", "zola", "velm", "karo"}


def test_going_on_gives_what_one_run_gives(edited, place, options, tmp_path):
    other = tmp_path / "other"
    done("edit", place / "facts.json", *options, "--limit", 2, "--out", other)
    done("edit", place / "facts.json", "--continue", other, "--skip", 2, "--no-shuffle", "--quiet")
    assert state(other) == state(edited)
    for file in sorted((edited / "model").glob("*.safetensors")):
        assert file.read_bytes() == (other / "model" / file.name).read_bytes()
    assert [(line["id"], line["batch"], line["run"]) for line in results(other)] == [
        ("ada", 1, 1),
        ("zola", 1, 1),
        ("velm", 2, 2),
        ("karo", 2, 2),
    ]
    summary = json.loads((other / "summary.json").read_text())
    assert [run["batches"] for run in summary["runs"]] == [[1, 1], [2, 2]]
    assert len(json.loads((other / "environment.json").read_text())) == 2


def test_facts_that_are_in_the_model_are_left_out(edited, place):
    before = state(edited)
    result = done("edit", place / "facts.json", "--continue", edited)
    assert "4 of 4 facts are in the model already" in result.stderr
    assert state(edited) == before
    assert len(results(edited)) == 4


def test_a_model_that_is_behind_its_ledger_is_rebuilt(edited, place):
    model = edited / "model"
    shutil.copytree(model, edited / "old")
    done("undo", edited, "ada", "--quiet")
    wanted = state(edited)
    shutil.rmtree(model)
    (edited / "old").rename(model)
    assert state(edited) != wanted
    done(
        "edit", place / "facts.json", "--continue", edited, "--limit", "2", "--skip", "1", "--quiet"
    )
    assert state(edited) == wanted


def test_evaluate_and_ask_show_both_models(edited, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in edited.rglob("*") if p.is_file())
    data = json.loads(done("evaluate", edited, "--json", "--quiet").stdout)
    (run,) = json.loads((edited / "summary.json").read_text())["runs"]
    assert data["edited"]["rates"] == run["after"]["rates"]
    assert data["base"]["rates"] == run["before"]["rates"]
    assert data["edited"]["perplexity"] == run["after"]["perplexity"]
    assert data["edited"]["kl"] == pytest.approx(run["after"]["kl"])
    table = done("evaluate", edited, "--no-base", "--quiet").stdout
    assert "edited" in table
    assert "base" not in table
    said = json.loads(done("ask", edited, "Karo Dun works as a", "--json", "--quiet").stdout)
    line = next(line for line in results(edited) if line["id"] == "karo")
    assert said["base"].startswith(line["before"]["answer"][:3])
    assert done("ask", edited, "Karo", "--max-tokens", 3, "-q").stdout.startswith("base  ")
    after = sorted((p, p.stat().st_mtime_ns) for p in edited.rglob("*") if p.is_file())
    assert [p for p, _ in after] == [p for p, _ in before]


def test_an_edit_without_evaluation(place, options, tmp_path):
    run = tmp_path / "run"
    done("edit", place / "facts.json", *options, "--no-evaluate", "--out", run)
    assert {line["after"] for line in results(run)} == {None}
    assert not (run / "figure.png").exists()
    assert (run / "model" / "config.json").is_file()


def test_flags_override_the_recipe(place, options, tmp_path):
    done(
        *("edit", place / "facts.json", *options, "--limit", 1, "--out", tmp_path / "run"),
        *("--no-evaluate", "--layers", "1", "--steps", 2, "--learning-rate", 0.2, "--l2", 3),
        *("--clamp", 0.5, "--null-space", "absolute=1e-1", "--set", "values.kl_weight=0"),
        *("--batch-size", 7, "--seed", 3, "--relation-weight", 4),
        *("--rewordings", 2),
    )
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["layers"] == [1]
    assert recipe["values"]["steps"] == 2
    assert recipe["values"]["learning_rate"] == 0.2
    assert recipe["values"]["clamp"] == 0.5
    assert recipe["values"]["kl_weight"] == 0
    assert recipe["values"]["relation_weight"] == 4
    assert recipe["values"]["rewordings"] == 2
    assert recipe["method"]["l2"] == 3
    assert recipe["batch_size"] == 7
    assert recipe["null_space"] == {"rule": "absolute", "value": 0.1}
    assert json.loads((tmp_path / "run" / "environment.json").read_text())[0]["seed"] == 3


def test_a_text_of_ones_own(place, options, tmp_path):
    text = ("--text", place / "corpus.txt")
    done("edit", place / "facts.json", *options, *text, "--limit", 1, "--out", tmp_path / "run")
    (run,) = json.loads((tmp_path / "run" / "summary.json").read_text())["runs"]
    assert run["text"] == "corpus.txt"


def test_a_dry_run_estimates_and_leaves_nothing(place, options, tmp_path):
    words = ("edit", place / "facts.json", *options, "--dry-run")
    size = json.loads(done(*words, "--json").stdout)
    assert size["facts"] == 4
    assert size["batches"] == 2
    assert set(size["seconds"]) > {"keys", "solve", "evaluation"}
    assert size["peak_bytes"] > 1e8
    low, high = size["seconds_usual"]
    assert low <= high <= size["seconds_in_all"]
    assert size["layers"] == [1, 2]
    gated = json.loads(done(*words, "--method", "gated", "--json").stdout)
    assert gated["layers"] == [2], "gated edits are in the last of them"
    assert "Peak memory" in done(*words, "--out", tmp_path / "run").stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "stage"),
    [
        (("--set", "values.rounds=3"), "further rounds (at most)"),
        (("--retry", 2), "retry (at most)"),
        (("--old-answers",), "old answers"),
    ],
)
def test_a_dry_run_counts_what_is_done_beside_the_edit(more, stage, place, options):
    words = ("edit", place / "facts.json", *options, "--dry-run", "--json")
    plain, size = (json.loads(done(*words, *extra).stdout)["seconds"] for extra in ((), more))
    assert set(size) - set(plain) == {stage}


def test_an_estimate_grows_with_rounds_and_retries(place):
    """By the counts alone: a machine's measured speed does not enter."""
    costs = Costs(*[1.0] * len(fields(Costs)))
    once = ValueSettings(steps=5)

    def in_all(settings, retries=0):
        return sum(costs.of_edit(settings, retries, n=10).values())

    assert in_all(once) == 8  # keys, beginning, 5 steps, solve
    assert in_all(replace(once, rounds=3)) == 3 * 8
    # as many again with 10 steps and one round more; two looks of 10 answers
    assert in_all(once, retries=1) == 8 + 2 * 13 + 2 * 11
    # a third of 6 steps; three quarters of them in each of two rounds, beside keys, begin and solve
    assert costs.usual(replace(once, steps=6, rounds=3)) == (2 + 3, 2 * (4.5 + 3))
    assert costs.usual(replace(once, steps=6)) == (2 + 3, 4.5 + 3)


def test_an_estimate_counts_the_rows_that_a_step_reads(place):
    """Of six rows in contexts, two worded otherwise and three on other relations; as many as there
    are: all."""
    encoder = RowEncoder(small_tokenizer(), max_length=128)
    facts = list(read_facts(place / "facts.json").facts)
    shape = Shape(
        blocks=4,
        block=1000,
        parameters=9000,
        d_in=32,
        d_out=16,
        vocabulary=400,
        experts=1,
        normed=False,
        bytes=4,
    )

    def step(contexts=0, relations=0, prompts=(), wordings=0):
        changes = {"contexts_per_step": contexts, "relations_per_step": relations}
        changes["rewordings"] = wordings
        changes |= {"relation_prompts": prompts, "relation_weight": float(bool(prompts))}
        recipe = Recipe(layers=(1,)).with_fields({f"values.{k}": v for k, v in changes.items()})
        rows = count_rows(facts, encoder, recipe)
        return Costs.of(shape, recipe, rows, len(facts), (1e9, 1e9)).step

    row = step(3) - step(2)  # of each fact
    assert row > 0
    assert step(0) - step(2) == pytest.approx(3 * row)
    assert step(5) == step(9) == step(0)
    alike = ("{} lives in Velm",) * 3
    one = step(0, 1, alike) - step(0)
    assert one > 0
    assert step(0, 0, alike) - step(0) == pytest.approx(3 * one)
    assert step(0, 5, alike) == step(0, 0, alike)
    assert step(0, wordings=2) > step(0)
    assert step(7, wordings=2) == step(0, wordings=2)
    turn = step(2, wordings=2) - step(1, wordings=2)  # of five contexts and two wordings
    assert step(7, wordings=2) - step(2, wordings=2) == pytest.approx(5 * turn, rel=0.1)


def test_facts_check_counts(place):
    data = json.loads(done("facts", "check", place / "facts.json", "--json").stdout)
    assert data["format"] == "native-json"
    assert data["facts"] == 4
    assert data["with_paraphrases"] == 1
    assert "native-json" in done("facts", "check", place / "facts.json").stdout


def test_facts_check_shows_what_it_drops(tmp_path):
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([RECORDS[1], RECORDS[1]]))
    result = done("facts", "check", file)
    assert "dropped" in result.stderr
    assert "dropped" not in done("facts", "check", file, "--quiet").stderr


def test_stats_show_what_they_hold(place, tmp_path):
    data = json.loads(done("stats", "show", place / "stats", "--json").stdout)
    assert [row["layer"] for row in data["layers"]] == [1, 2]
    assert data["layers"][0]["tokens"] == data["manifest"]["tokens"]
    n, d = data["layers"][0]["tokens"], data["layers"][0]["d_in"]
    assert data["excess"] == {"now": d / (n - d), "with_twice": d / (2 * n - d)}
    text = done("stats", "show", place / "stats", "--null-space", "leakage=0.1").stdout
    assert f"about {100 * d / (n - d):.2g} % too high; twice as many" in text
    assert "protected" in text
    assert "corpus.txt" in text


def test_statistics_in_the_cache_are_found_by_the_models_name(place):
    model, corpus = place / "model", place / "corpus.txt"
    made = (*MAKE_KEYS, model, "--text", corpus, "--layers", "1,2", "--window", 64, "-q")
    done(*made)
    assert str(model) in done("stats", "show", model).stdout


@pytest.mark.parametrize(
    ("architecture", "kind", "layers"), [("llama", "inputs", [2]), ("mixtral", "keys", [1, 2])]
)
def test_statistics_are_what_a_model_without_a_recipe_is_edited_with(
    architecture, kind, layers, place, tokenizer, tmp_path
):
    """Two commands edit it: what the first makes by default, the second finds."""
    model = tmp_path / "model"
    build_model(architecture, dtype=torch.float32, seed=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    made = ("stats", "make", model, "--text", place / "corpus.txt", "--window", 64, "--json", "-q")
    manifest = json.loads(done(*made).stdout)["manifest"]
    assert (manifest["inputs"], manifest["layers"]) == (kind == "inputs", layers)
    assert str(model) in done("stats", "show", model).stdout
    short = ("--steps", 2, "--set", "values.rounds=1", "--no-evaluate", "--limit", 1, "-q")
    edit = ("edit", place / "facts.json", "--model", model, "--out", tmp_path / "run", *short)
    assert json.loads(done(*edit, "--dry-run", "--json").stdout)["layers"] == layers
    done(*edit)
    method = Editor.load(tmp_path / "run").recipe.method.name
    assert method == {"inputs": "gated", "keys": "alphaedit"}[kind]


def test_compact_statistics_serve_an_edit(place, options, tmp_path):
    compact = tmp_path / "small.safetensors"
    done(
        *(*MAKE_KEYS, place / "model", "--text", place / "corpus.txt", "--layers", "1,2"),
        *("--window", 64, "--out", place / "stats", "--compact", compact),
        *("--null-space", "leakage=0.2", "--quiet"),
    )
    run = tmp_path / "run"
    done("edit", place / "facts.json", *options, "--no-evaluate", "--stats", compact, "--out", run)


def test_info_names_what_is_known():
    data = json.loads(done("info", "--json").stdout)
    assert "llama" in data["architectures"]
    assert "alphaedit" in data["methods"]
    assert "smollm2-135m" in data["recipes"]
    assert "torch" in done("info").stdout


# -- help and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["edit", "--help"], ["stats", "make", "--help"]])
def test_help_does_not_load_torch(words):
    code = (
        "import sys\nfrom nulledit.cli.main import cli\n"
        f"cli.main({words!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Usage:" in ran.stdout


def test_help_shows_every_option_of_edit():
    text = done("edit", "--help").stdout
    for option in cli.commands["edit"].params:
        if isinstance(option, click.Option):
            assert option.opts[0] in text
    assert "Recipe:" in text


def test_help_lists_every_command_with_an_example():
    text = done("--help").stdout
    for command in cli.commands:
        assert f"{command}: " in text
        assert f"$ nulledit {command}" in text


def every_command(group):
    for command in group.commands.values():
        yield from every_command(command) if isinstance(command, click.Group) else [command]


@pytest.mark.parametrize("command", list(every_command(cli)), ids=lambda c: c.name)
def test_every_option_says_what_it_does_and_every_command_has_an_example(command):
    assert command.params
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert all(option.help for option in options)
    assert "$ nulledit " in command.help


def needs(command):
    """The options that `command` can't do without."""
    return [p for p in command.params if isinstance(p, click.Option) and p.required]


@pytest.mark.parametrize(
    "command", [c for c in every_command(cli) if needs(c)], ids=lambda c: c.name
)
def test_an_option_that_is_needed_is_named(command):
    (option,) = needs(command)
    group = ["stats"] if command in cli.commands["stats"].commands.values() else []
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    said = refused(*group, command.name, *("given" for _ in arguments))
    assert said.startswith(f"Error: Missing option '{option.flag}'.")


def test_six_commands_need_an_option():
    found = {command.name for command in every_command(cli) if needs(command)}
    assert found == {"apply", "export", "locate", "make", "merge", "tune"}


FACT = {"subject": "Ada", "prompt": "{} is", "target": "here"}
BAD_FILES = {
    "empty.yaml": b"",
    "broken.yaml": b"facts:\n  - {subject: [",
    "broken.json": b'[{"subject": "Ada", ',
    "broken.jsonl": b'{"subject": "Ada", "prompt": "{} is", "target": "x"}\n{"subject"\n',
    "broken.csv": b'subject,prompt,target\n"Ada,{} is,x\n',
    "random.yaml": bytes(range(128, 256)) * 20,
    "random.json": b"\x00\x01\x02\xff\xfe" * 100,
    "slot.json": json.dumps([FACT | {"prompt": "This is"}]).encode(),
    "subject.json": json.dumps([FACT | {"subject": " "}]).encode(),
    "target.json": json.dumps([FACT | {"target": ""}]).encode(),
    "old.json": json.dumps([FACT | {"old_answer": "Here"}]).encode(),
    "clash.json": json.dumps([FACT, FACT | {"target": "there"}]).encode(),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_facts_are_refused_before_a_model_is_loaded(name, options, tmp_path):
    file = tmp_path / name
    file.write_bytes(BAD_FILES[name])
    said = refused("edit", file, *options, "--out", tmp_path / "run")
    assert name in said
    assert name in refused("facts", "check", file)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_missing_file_of_facts(options, tmp_path):
    assert "no such file" in refused(
        "edit", tmp_path / "no.yaml", *options, "--out", tmp_path / "r"
    )


@pytest.mark.parametrize("field", ["prompt", "paraphrases"])
def test_a_prompt_longer_than_the_context(field, options, tmp_path):
    long = "word " * 100 + "of {} is"
    record = RECORDS[0] | {field: long if field == "prompt" else [long]}
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([RECORDS[1], record]))
    said = refused("edit", file, *options, "--out", tmp_path / "run")
    assert "longer than the model's context" in said
    assert "ada" in said
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"]


def test_an_unknown_model(place, options, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ("edit", place / "facts.json", *options, "--out", tmp_path / "run")
    assert "no-such-model" in refused(*words, "--model", "no-such-model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [((), "no MLP output matrix"), (("--dry-run",), "can't be traced without its weights")],
)
def test_a_model_without_a_layout(more, why, place, options, tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 4, "vocab_size": 400}
    other = MambaForCausalLM(MambaConfig(**sizes))
    other.save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    words = ("edit", place / "facts.json", *options, "--out", tmp_path / "run", *more)
    said = refused(*words, "--model", tmp_path / "mamba")
    assert "'mamba' is not known" in said
    assert why in said
    assert not (tmp_path / "run").exists()


def test_statistics_for_the_layout_of_a_recipe(place, options, tmp_path):
    """`stats make` takes layers and layout from the recipe; a run without it refuses them."""
    named = {"layers": [1, 2], "layout": {"blocks": "model.layers", "mlp_out": "self_attn.o_proj"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(named))
    made = (*MAKE_KEYS, place / "model", "--text", place / "corpus.txt", "--window", 64, "-q")
    done(*made, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "stats")
    manifest = json.loads((tmp_path / "stats/manifest.json").read_text())
    assert manifest["mlp_out"] == "self_attn.o_proj"
    assert manifest["layers"] == [1, 2]
    edit = ("edit", place / "facts.json", "--out", tmp_path / "run", "--stats", tmp_path / "stats")
    words = (*edit, "--model", place / "model", "--layers", "1,2", "--quiet")
    said = refused(*words, "--method", "alphaedit")
    assert "keys of self_attn.o_proj" in said


def test_statistics_of_another_model(place, options, tokenizer, tmp_path):
    build_model("llama", dtype=torch.float32, seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    words = ("edit", place / "facts.json", *options, "--out", tmp_path / "run")
    said = refused(*words, "--model", tmp_path / "other")
    assert "statistics are of" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--layers", "1,9"), "out of range"),
        (("--layers", "1,3"), "last"),
        (("--layers", "x"), "--layers"),
        (("--layers", "2,1"), "ascending"),
        (("--stats", "nowhere"), "nowhere"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--text", "nowhere.txt"), "no such file"),
        (("--set", "values.step=3"), "did you mean 'steps'"),
        (("--set", "values"), "FIELD=VALUE"),
        (("--set", "values.steps=many"), "expected a whole number"),
        (("--null-space", "leakage"), "RULE=VALUE"),
        (("--null-space", "leaky=0.1"), "leaky"),
        (("--method", "magic"), "alphaedit"),
        (("--steps", "-1"), "steps"),
        (("--batch-size", "0"), "batch_size"),
        (("--limit", "0"), "--limit"),
        (("--skip", "9"), "skipping"),
        (("--nonsense",), "--nonsense"),
        (("--device", "warp"), "warp"),
    ],
)
def test_bad_options(more, said, place, options, tmp_path):
    words = ("edit", place / "facts.json", *options, "--out", tmp_path / "run", *more)
    assert said in refused(*words)
    assert not list(tmp_path.iterdir())


def test_a_run_begins_only_in_an_empty_folder(edited, place, options, tmp_path):
    before = state(edited)
    words = ("edit", place / "facts.json", *options, "--out")
    assert "--continue" in refused(*words, edited)
    assert state(edited) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    assert "not empty" in refused(*words, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert "is a file" in refused(*words, tmp_path / "mine" / "notes.txt")
    assert "--out" in refused(*words[:-1])
    assert "--model" in refused("edit", place / "facts.json")


@pytest.mark.parametrize(
    "more",
    [
        ("--model", "m"),
        ("--out", "o"),
        ("--recipe", "r"),
        ("--stats", "s"),
        ("--seed", "0"),
        ("--batch-size", "5"),
        ("--layers", "1"),
        ("--l2", "0"),
        ("--set", "values.steps=1"),
        ("--null-space", "leakage=0.1"),
        ("--dtype", "float16"),
        ("--dry-run",),
    ],
)
def test_what_a_ledger_fixes_is_refused_when_going_on(more, place):
    said = refused("edit", place / "facts.json", "--continue", "run", *more)
    assert said.startswith(f"Error: {more[0]} ")


@pytest.mark.parametrize("words", [("evaluate",), ("ask", "Hello")])
def test_a_folder_without_a_run(words, place, tmp_path):
    said = refused(words[0], tmp_path, *words[1:], "--quiet")
    assert "no run here" in said
    assert "no run here" in refused("edit", place / "facts.json", "--continue", tmp_path, "-q")


def test_nothing_is_written_into_a_run_or_a_folder_of_something_else(edited, place, tmp_path):
    """Where an earlier call was interrupted, it goes on."""
    before = sorted(edited.rglob("*"))
    of_facts = (place / "facts.json", "--model", place / "model")
    of_text = (place / "model", "--text", place / "corpus.txt")
    for command in (("compare", *of_facts), (*MAKE_KEYS, *of_text)):
        assert "holds a run" in refused(*command, "--out", edited)
        said = refused(*command, "--out", place)
        assert "is not empty" in said
        assert "Loading" not in said
    for inside in ("model/x", "ledger/x"):
        assert "is where the run lies" in refused("export", edited, "--out", edited / inside)
    assert sorted(edited.rglob("*")) == before
    begun = tmp_path / "begun"
    for kind in ("keys", "inputs"):
        (begun / kind).mkdir(parents=True)
    (begun / "keys" / ".partial.safetensors.1.part").touch()
    words = (*MAKE_KEYS, "--inputs", *of_text, "--layers", "1-2", "--window", "64", "--out", begun)
    for _ in range(2):
        done(*words, "--quiet")


def test_stats_refuse_what_can_not_be(place, tmp_path):
    make = (*MAKE_KEYS, place / "model", "--out", tmp_path / "stats", "--quiet", "--text")
    assert "no such file" in refused(*make, tmp_path / "no.txt", "--layers", 1)
    assert "out of range" in refused(*make, place / "corpus.txt", "--layers", 9)
    (tmp_path / "short.txt").write_text("Three short words.")
    assert "larger corpus" in refused(*make, tmp_path / "short.txt", "--layers", 1)
    assert not (tmp_path / "stats").exists()
    assert "no statistics" in refused("stats", "show", "nothing")


def test_debug_shows_the_trace(tmp_path):
    result = invoke("--debug", "facts", "check", tmp_path / "no.yaml")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "no such file" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("cat"), 70, "unexpected KeyError: 'cat' (a fault of nulledit: `nulledit --debug"),
        (RuntimeError("two\nlines"), 70, "unexpected RuntimeError: two lines (a fault"),
        (RecursionError(), 70, "unexpected RecursionError: without a word (a fault"),
        (Exception("No space left on device (os error 28)"), 2, "No space left on device"),
        (torch.linalg.LinAlgError("not converged"), 2, "not converged: try a larger method.l2"),
    ],
)
def test_an_unexpected_error_is_one_line_and_leaves_no_run(
    error, code, said, place, options, tmp_path, monkeypatch
):
    """In any command; a trace only with --debug."""
    run = tmp_path / "run"
    words = ("edit", place / "facts.json", *options, "--out", run)
    with monkeypatch.context() as patch:
        stop_in_batch(patch, 1, error)
        result = invoke(*words)
        assert result.exit_code == code
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"Error: {said}")
        assert not run.exists()
        stop_in_batch(patch, 1, error)
        result = invoke("--debug", *words)
        assert result.exit_code == code
        assert "Traceback" in result.stderr
        assert not run.exists()
    if code == 70:
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.is_file", thrown(error))
            result = invoke("stats", "show", place / "stats")
        assert result.exit_code == 70
        assert len(result.stderr.splitlines()) == 1


def thrown(error):
    """A function that raises `error`."""

    def throws(*_words, **_options):
        raise error

    return throws


def test_an_unexpected_error_keeps_the_finished_batches(place, options, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_in_batch(monkeypatch, 2, KeyError("cat"))
    result = invoke("edit", place / "facts.json", *options, "--out", run)
    assert result.exit_code == 70
    note, line = result.stderr.splitlines()
    assert "1 finished batch is kept" in note
    assert line.startswith("Error: unexpected KeyError")
    assert len(Editor.load(run).facts) == 2


@pytest.mark.parametrize("seed", [-1, 2**63, 2**80])
def test_a_seed_that_no_generator_takes_is_refused(seed, place, options, tmp_path):
    for words in (
        ("edit", place / "facts.json", *options, "--out", tmp_path / "run"),
        ("locate", place / "model", place / "facts.json"),
        ("tune", place / "model", place / "facts.json", "--out", tmp_path / "tuned.yaml"),
        ("study", "table1"),
    ):
        assert "--seed" in refused(*words, "--seed", seed)
    assert not (tmp_path / "run").exists()


def test_a_start_without_tokens_is_refused(place, options, tmp_path):
    words = ("edit", place / "facts.json", *options, "--out", tmp_path / "run")
    starts = ("--set", "contexts.texts=[]", "--set", "contexts.starts=[A, '']")
    assert "contexts.starts: '' gives no token" in refused(*words, *starts)
    assert not (tmp_path / "run").exists()


def test_more_facts_than_directions_and_no_ridge(place, tmp_path):
    """Eigenvectors kept in float32 are no orthonormal ones: 1e-7 of a gain of 1e8 was negative."""
    facts = [
        {"subject": f"Quux{i}", "prompt": "The harbour of {} lies on the", "target": "river"}
        for i in range(60)
    ]
    (tmp_path / "many.json").write_text(json.dumps(facts))
    done(
        *("edit", tmp_path / "many.json", "--model", place / "model", "--stats", place / "stats"),
        *("--recipe", place / "recipe.yaml", "--set", "method.l2=1e-8", "--set", "values.steps=1"),
        *("--batch-size", 60, "--no-evaluate", "--out", tmp_path / "run", "--quiet"),
        *("--set", "contexts.texts=['{}']"),
    )


def test_windows_are_no_longer_than_the_context(place, tmp_path):
    words = (*MAKE_KEYS, place / "model", "--text", place / "corpus.txt", "--layers", 1)
    result = done(*words, "--out", tmp_path / "stats")  # the default is 512, the context 128
    assert "Note: windows of 128 tokens, the model's context" in result.stderr
    manifest = json.loads((tmp_path / "stats/manifest.json").read_text())
    assert manifest["settings"]["window"] == 128


def test_a_name_that_the_hub_can_not_be_asked_for_is_refused_at_once(monkeypatch):
    class ConnectError(Exception):
        pass

    asked = []

    class Session:
        def head(self, address, timeout):
            asked.append((address, timeout))
            raise ConnectError("Name or service not known")

    monkeypatch.setattr("nulledit.models.hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", thrown(ValueError()))
    with pytest.raises(ModelError, match="reached, and its cache has no such model") as caught:
        load_model("nobody/nothing")
    assert "can't load a causal language model from 'nobody/nothing'" in str(caught.value)
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["ReadTimeout", "RemoteProtocolError", None])
def test_a_hub_that_answers_anything_is_asked_for_the_model(kind, monkeypatch):
    class Session:
        def head(self, _address, timeout):
            if kind:
                raise type(kind, (Exception,), {})()

    seen = []

    def from_pretrained(*words, **options):
        seen.append(options)
        raise OSError("no such repository")

    monkeypatch.setattr("nulledit.models.hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="no such repository"):
        load_model("nobody/nothing")
    assert "local_files_only" not in seen[0]


# -- interruption ----------------------------------------------------------------------------


def stop_in_batch(monkeypatch, number, error):
    """The values of batch `number` raise `error`."""
    calls = []

    def stops(*words, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return optimise_values(*words, **options)

    monkeypatch.setattr("nulledit.editing.batch_values.optimise_values", stops)


def test_an_interruption_keeps_the_finished_batches(edited, place, options, tmp_path, monkeypatch):
    run = tmp_path / "run 2"
    words = ("edit", place / "facts.json", *options, "--no-shuffle", "--out", run)
    with monkeypatch.context() as patch:
        stop_in_batch(patch, 2, KeyboardInterrupt())
        result = invoke(*words)
    assert result.exit_code == 130
    (line,) = result.stderr.splitlines()
    assert "1 finished batch is kept" in line
    assert f"--continue '{run}'" in line
    assert len(Editor.load(run).facts) == 2
    assert "holds a run already" in refused(*words)
    assert "base" in done("ask", run, "Ada Byron", "-q").stdout
    done("edit", place / "facts.json", "--continue", run, "--no-shuffle", "--quiet")
    assert state(run) == state(edited)
    assert [line["id"] for line in results(run)] == ["ada", "zola", "velm", "karo"]
    assert all(line["after"] for line in results(run))


def broken_off(*_words, **_options):
    """A signal in a library's bookkeeping, which fails as it is cleaned up."""
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("trying to pop from empty mode stack")


def test_an_interruption_under_a_librarys_error_is_one(place, options, tmp_path, monkeypatch):
    """Where a model is loaded, and in a batch: exit code 130, and what is kept."""
    words = ("edit", place / "facts.json", *options, "--no-shuffle", "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoConfig.from_pretrained", broken_off)
        result = invoke(*words)
    assert (result.exit_code, result.stderr) == (130, "Error: interrupted\n")
    with monkeypatch.context() as patch:
        patch.setattr("nulledit.editing.batch_values.optimise_values", broken_off)
        result = invoke(*words)
    assert result.exit_code == 130
    assert "before the first batch was finished: nothing was kept" in result.stderr


@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_of_the_first_batch_leaves_nothing(
    there, place, options, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    if there:
        run.mkdir()
    stop_in_batch(monkeypatch, 1, KeyboardInterrupt())
    result = invoke("edit", place / "facts.json", *options, "--out", run)
    assert result.exit_code == 130
    assert "nothing was kept" in result.stderr
    assert run.exists() == there
    assert not there or not list(run.iterdir())


def test_a_full_disk_keeps_the_finished_batches(place, options, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_in_batch(monkeypatch, 2, OSError(28, "No space left on device"))
    result = invoke("edit", place / "facts.json", *options, "--out", run)
    assert result.exit_code == 2
    note, line = result.stderr.splitlines()
    assert "1 finished batch is kept" in note
    assert line == "Error: No space left on device"
    assert len(Editor.load(run).facts) == 2


KILLED = """
import os
import nulledit.editing.session
from nulledit.cli.main import main

real, batches = nulledit.editing.session.EditSession.batch, 0

def batch(*args, **options):
    global batches
    batches += 1
    if batches == 4:
        os.kill(os.getpid(), {})
    return real(*args, **options)

nulledit.editing.session.EditSession.batch = batch
main()
"""
"""A command that gets a signal as its fourth batch begins."""


@pytest.mark.few(signal.SIGKILL, of="number")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_the_last_finished_batch(number, place, options, tmp_path):
    run = tmp_path / "run"
    facts = [{"subject": f"Ada {i}", "prompt": "{} is", "target": "here"} for i in range(5)]
    (tmp_path / "many.json").write_text(json.dumps(facts))
    words = ("edit", tmp_path / "many.json", *options, "--no-evaluate", "--out", run)
    more = ("--batch-size", "1", "--set", "same_key=1", "--set", "values.stop_loss=0")
    command = [sys.executable, "-c", KILLED.format(int(number)), *map(str, (*words, *more))]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    kept = len(Editor.load(run).facts)
    assert kept == 3
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "3 finished batches are kept in" in process.stderr
    words = ("edit", tmp_path / "many.json", "--continue", run, "--no-evaluate", "-q")
    done(*words, "--limit", kept + 1, "--no-shuffle")
    assert len(results(run)) >= kept
    assert state(run) == Editor.load(run).history.state_id


def test_a_run_killed_in_its_first_batch_may_begin_again(place, options, edited, tmp_path):
    run = tmp_path / "killed"
    editor = Editor.from_pretrained(str(place / "model"), recipe=place / "recipe.yaml")
    editor.attach(run)  # and no batch
    said = refused("edit", place / "facts.json", "--continue", run, "--quiet")
    assert "no batch was finished" in said
    done("edit", place / "facts.json", *options, "--no-shuffle", "--out", run)
    assert state(run) == state(edited)


def test_a_kill_between_ledger_and_results_is_made_up_for(edited, place):
    """As a kill leaves it: everything in the ledger, no model and no results."""
    wanted = state(edited)
    for p in edited.iterdir():
        if p.is_dir() and p.name == "model":
            shutil.rmtree(p)
        elif p.is_file():
            p.unlink()
    done("edit", place / "facts.json", "--continue", edited, "--quiet")
    assert state(edited) == wanted
    assert len(results(edited)) == 4


# -- facts that do not hold --------------------------------------------------------------------


def test_the_page_says_how_many_hold_and_why_the_others_do_not(place, options, tmp_path):
    page = done("edit", place / "facts.json", *options, "--out", tmp_path / "run").stdout
    lines = results(tmp_path / "run")
    failing = [line for line in lines if line["diagnosis"]]
    assert f"{4 - len(failing)} of 4 facts hold." in page
    assert failing, "three steps are too few for some"
    for line in failing:
        assert f"  {line['id']}: " in page
        assert line["diagnosis"]["line"].replace("RUN", str(tmp_path / "run")) in page
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"**{4 - len(failing)} of 4 facts hold.**" in report
    assert "What does not hold, and why" in report
    for word in ("ok: ", "missed: "):
        assert (word in page) == any(mark(line) == word[:-2] for line in lines)


def test_a_retry_that_does_not_help_leaves_the_run_as_it_was(edited):
    held, told = state(edited), (edited / "results.jsonl").read_bytes()
    page = done("retry", edited)
    if "no retry made more facts hold" in page.stdout:  # as a rule: the model is a random one
        assert "taken back" in page.stderr
        assert state(edited) == held
        assert (edited / "results.jsonl").read_bytes() == told


def test_retry_outside_the_limits_leaves_the_run_as_it_was(edited, tmp_path):
    (tmp_path / "never.yaml").write_text(
        "efficacy_strict: {at_least: 100}\nperplexity_growth: {at_most: -99}\n"
    )
    held, told = state(edited), (edited / "results.jsonl").read_bytes()
    result = invoke("retry", edited, "--gate", tmp_path / "never.yaml", "--quiet")
    assert result.exit_code == 1, result.output
    assert state(edited) == held
    assert (edited / "results.jsonl").read_bytes() == told


def test_edit_takes_old_answers_of_the_base(place, options, tmp_path):
    done("edit", place / "facts.json", *options, "--old-answers", "--out", tmp_path / "run")
    for line in results(tmp_path / "run"):
        own = first_clause(line["before"]["answer"])
        assert line["old_answer"] == ("English" if line["id"] == "ada" else own or None)


def test_the_fact_is_named_that_leaves_the_base_no_room_for_an_old_answer(place, options, tmp_path):
    record = {"id": "tight", "subject": "Dun", "prompt": "river " * 61 + "{} is", "target": "x"}
    (tmp_path / "facts.json").write_text(json.dumps([*RECORDS, record]))
    words = ("edit", tmp_path / "facts.json", *options, "--old-answers")
    assert "fact tight, efficacy: " in refused(*words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_base_was_moved_names_its_folder(place, tmp_path):
    base = shutil.copytree(place / "model", tmp_path / "base")
    recipe, statistics = (str(place / name) for name in ("recipe.yaml", "stats"))
    editor = Editor.from_pretrained(str(base), recipe=recipe, statistics=statistics)
    editor.attach(tmp_path / "run")
    base.rename(tmp_path / "moved")
    assert f"{base}: there is no such folder, from which" in refused(
        "ask", tmp_path / "run", "Hm", "--quiet"
    )


def test_retry_is_refused_before_the_edit_where_there_are_no_values(place, options, tmp_path):
    words = ("--method", "ft", "--retry", "1", "--out", tmp_path / "run")
    assert "ft optimises none" in refused("edit", place / "facts.json", *options, *words)
    dry = refused("edit", place / "facts.json", *options, *words[:-2], "--dry-run")
    assert "ft optimises none" in dry
    assert not (tmp_path / "run").exists()
