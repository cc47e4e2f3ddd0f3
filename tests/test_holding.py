"""Whether facts hold, why one does not, and what writing it again does."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from support import world
from support.cli import MAKE_KEYS
from support.editors import LASTING, WORLD, in_the_world, sayable
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.cli.main import cli
from nulledit.editing.stronger import differences, stronger
from nulledit.errors import FactError, LedgerError
from nulledit.evaluation import evaluate, retry_failing
from nulledit.evaluation.diagnosis import diagnose, first_slip, holds
from nulledit.evaluation.generation import ANSWER_TOKENS, loops, says
from nulledit.evaluation.old_answers import disagreements, first_clause, with_base_answers
from nulledit.evaluation.outlook import Outlook, outlook
from nulledit.runs.document import side_effects
from nulledit.runs.holding import headline, held, legend, mark, reasons


@pytest.fixture(scope="module")
def known(worlds):
    return worlds("llama")


@pytest.fixture
def edits(known):
    return sayable(known, 4)


@pytest.fixture
def make(tokenizer):
    def make(**changes):
        model = build_model("llama")
        recipe = RECIPE.with_fields({k.replace("__", "."): v for k, v in changes.items()})
        return Editor(model, tokenizer, recipe=recipe, statistics=statistics_of(model, tokenizer))

    return make


def causes(editor, facts, **more):
    found = diagnose(editor, facts, evaluate(editor.editable, facts), **more)
    return {d.fact_id: [cause.name for cause in d.causes] for d in found}


def test_what_ran_out_of_steps_or_met_the_clamp_is_told(make, facts):
    few = make(values__steps=2)
    few.edit(facts)
    assert all(found == ["steps"] for found in causes(few, facts).values())
    assert set(causes(few, facts)) == {f.id for f in facts}
    tight = make(values__steps=12, values__clamp=0.01)
    tight.edit(facts)
    assert {tuple(found) for found in causes(tight, facts).values()} == {("clamp",)}


def test_a_value_that_the_solve_did_not_take_up_is_told(known, edits):
    editor = in_the_world(known, method__l2=1e6)
    before = evaluate(editor.editable, edits).answers
    editor.edit(edits)
    assert all(c.outcome.lead > 0 for c in editor.history.active)
    # The base may come to a target further on, in words about somebody else.
    unsaid = [fact for fact in edits if not says(before[fact.id], fact.target)]
    assert len(unsaid) > 1
    assert causes(editor, edits) == {fact.id: ["solve"] for fact in unsaid}


def test_facts_that_hold_have_no_diagnosis(known, edits):
    editor = in_the_world(known, LASTING)
    editor.edit(edits)
    rows = evaluate(editor.editable, edits).rows()
    failing = {f.id for f in edits if not holds(rows[f.id])}
    assert set(causes(editor, edits)) == failing
    assert len(failing) < len(edits)


def test_facts_on_one_key_and_a_first_token_are_named(make):
    pair = [
        Fact(id="job", subject="Karo Dun", prompt="{} works as a", target="sailor"),
        Fact(id="home", subject="Karo Dun", prompt="{} was born in", target="London"),
        Fact(id="first", subject="V", prompt="{} is the", target="river"),
    ]
    editor = make(values__steps=2)
    editor.edit(pair)
    found = diagnose(editor, pair, evaluate(editor.editable, pair))
    told = {d.fact_id: d for d in found}
    assert told["job"].causes[0].name == "key"
    assert "home" in told["job"].causes[0].text
    assert told["first"].causes[0].name == "first token"
    assert told["first"].remedy == "put words before the subject"
    assert told["job"].line.endswith(told["job"].remedy)
    json.dumps([d.to_dict() for d in found])


def test_a_silent_base_and_a_looping_answer_are_told(make, facts):
    editor = make(values__steps=2)
    editor.edit(facts)
    after = evaluate(editor.editable, facts)
    silent = dataclasses.replace(after, answers={f.id: "" for f in facts})
    for found in causes(editor, facts, before=silent).values():
        assert found[0] == "silent"
    assert loops("大阪大阪大阪大阪")
    assert loops("the franc, the franc, the franc")
    assert not loops("the sky, the sea and the land")
    assert not loops("1000000 people", "1000000 people")
    assert says("Paris, the city", "Paris")
    assert not says("Paris Paris Paris Paris", "Paris")


def test_an_alias_that_is_said_and_then_repeated_is_told(make, facts, monkeypatch):
    editor = make(values__steps=2)
    fact = dataclasses.replace(facts[0], target_aliases=("Velmian tongue",))
    editor.edit([fact])
    after = evaluate(editor.editable, [fact])
    said = {fact.id: "Velmian tongue, and so on, and so on, and so on"}
    looping = dataclasses.replace(after, answers=said, says_target={fact.id: False})
    monkeypatch.setattr("nulledit.evaluation.diagnosis.first_slip", lambda *_: None)
    (found,) = diagnose(editor, [fact], looping)
    assert [cause.name for cause in found.causes] == ["loops"]


def test_a_control_character_hides_no_old_answer(make, facts):
    """Neither from the notice of an edit nor from `facts check --model`."""
    fact = dataclasses.replace(facts[1], old_answer="Paris")
    said = "Par\x07is, a city"
    base = dataclasses.replace(evaluate(make().editable, [fact]), answers={fact.id: said})
    assert not disagreements([fact], base)
    assert Outlook(fact, 1, False, said, ()).says_old_answer


def test_the_first_slip_is_where_a_whole_run_goes_another_way(make, facts):
    editor = make(values__steps=2)
    editor.edit(facts)
    for fact in facts:
        row = editor.editable.encoder.encode_template(fact.prompt, fact.subject, target=fact.target)
        logits = editor.model(input_ids=torch.tensor([row.ids])).logits.detach()[
            0, row.target_start - 1 :
        ]
        best = logits.argmax(-1).tolist()[:-1]
        wrong = [i for i, (a, b) in enumerate(zip(best, row.target_ids, strict=True)) if a != b]
        slip = first_slip(editor.editable, row)
        assert (slip is None) == (not wrong)
        if slip:
            assert slip.place == wrong[0]
            scores, wanted = logits[wrong[0]], row.target_ids[wrong[0]]
            assert slip.rank == 1 + int((scores > scores[wanted]).sum())
            assert slip.short == pytest.approx(float(scores.max() - scores[wanted]))


def test_retry_writes_what_does_not_hold(known):
    edits = sayable(known, 4, slow=True)
    editor = in_the_world(known, values__steps=2, values__learning_rate=0.1)
    editor.edit(edits)
    failing = set(causes(editor, edits))
    assert failing
    report = retry_failing(editor, edits, 5)
    assert {c.fact.id for c in report.columns} >= failing
    assert len(causes(editor, edits)) < len(failing)
    assert len(editor.facts) == len(edits)
    assert any("values.steps 4" in notice for notice in report.notices)
    kinds = [event.kind for event in editor.history.events]
    assert kinds == ["edit", *["retry"] * (len(kinds) - 1)]
    for column in editor.history.active:
        changed = column.outcome.settings
        assert bool(changed) == (column.batch > 1)
        assert not changed or changed["values.steps"] in [2**n for n in range(2, 7)]


def test_a_retry_after_which_fewer_facts_hold_is_taken_back(known, monkeypatch):
    edits = sayable(known, 4, slow=True)
    editor = in_the_world(known, values__steps=2, values__learning_rate=0.05)
    editor.edit(edits)
    before, state = causes(editor, edits), editor.history.state_id
    weights = {layer: editor.weights.exact(layer) for layer in editor.weights.layers}
    weak = dataclasses.replace(editor.recipe.values, steps=2, learning_rate=9.0, weight_decay=0.0)
    monkeypatch.setattr("nulledit.evaluation.retry.stronger", lambda *_: weak)
    report = retry_failing(editor, edits)
    if "taken back" in report.notices[0]:
        assert report.columns == ()
        assert editor.history.state_id == state
        for layer, weight in weights.items():
            assert torch.equal(editor.weights.exact(layer), weight)
    assert len(causes(editor, edits)) <= len(before)


def test_nothing_is_written_where_every_fact_holds(known, edits):
    editor = in_the_world(known, LASTING)
    editor.edit(edits[:1])
    assert causes(editor, edits[:1]) == {}
    assert retry_failing(editor, edits[:1]).columns == ()
    assert [event.kind for event in editor.history.events] == ["edit"]


def test_a_retried_fact_is_undone_as_a_whole_and_rebuilt_as_it_was(make, facts):
    editor = make(values__steps=3)
    editor.edit(facts[1:])
    alone = {layer: editor.weights.exact(layer) for layer in editor.weights.layers}
    editor = make(values__steps=3)
    editor.edit(facts[1:])
    editor.edit(facts[:1])
    editor.retry(facts[0].id)
    assert not editor.undo(facts[0].id).restored
    assert facts[0].id not in {f.id for f in editor.facts}
    for layer, weight in alone.items():
        torch.testing.assert_close(editor.weights.exact(layer), weight, rtol=0, atol=1e-10)
    editor.redo()
    editor.rebuild()
    assert {f.id for f in editor.facts} == {f.id for f in facts}


def test_retry_refuses_what_it_can_not_do(make, facts):
    editor = make()
    with pytest.raises(LedgerError, match="no fact"):
        editor.retry("ada")
    editor.edit(facts[:2])
    with pytest.raises(LedgerError, match="was named"):
        editor.retry()
    editor.forget(facts[2:3])
    with pytest.raises(FactError, match="forgotten"):
        editor.retry(facts[2].id)


def test_stronger_settings_are_stronger_and_named(recipe):
    once, twice = stronger(recipe.values), stronger(recipe.values, 2)
    assert stronger(once) == twice
    assert (once.steps, once.stop_margin) == (16, 1.0)
    assert differences(recipe.values, recipe.values) == {}
    changed = differences(recipe.values, once)
    assert recipe.with_fields(changed).values == once


def test_old_answers_are_compared_with_the_base_and_taken_from_it(make, facts):
    editor = make()
    base = evaluate(editor.editable, facts)
    told = disagreements(facts, base)
    assert len(told) == 1
    assert "in 1 of 1 facts with one" in told[0]
    assert "ada" in told[0]
    taken = with_base_answers(editor, facts)
    assert taken[0] == facts[0]
    assert first_clause("Par\x07is. It is a city") == "Paris"
    for before, after in zip(facts[1:], taken[1:], strict=True):
        own = first_clause(base.answers[before.id])
        assert after.old_answer == (own or None)
    assert not disagreements(taken[1:], base)
    assert first_clause("Paris. It is a city") == "Paris"
    assert first_clause("3.5 kg, or so") == "3.5 kg"
    assert first_clause("中国的首\ufffd") == "中国的首"
    assert first_clause("\ufffd") == ""


def test_a_long_old_answer_is_heard_whole(make, monkeypatch):
    """By the notice of an edit and by `facts check --model` alike."""
    words = [f"word{n}" for n in range(30)]

    def talk(_model, prompts, max_new_tokens=(ANSWER_TOKENS,), **_):
        """No word is less than a token."""
        return [" ".join(words[:n]) for _, n in zip(prompts, max_new_tokens, strict=True)]

    monkeypatch.setattr("nulledit.evaluation.generation.generate_answers", talk)
    editor, old = make(), " ".join(words[:20])
    fact = Fact(subject="Karo Dun", prompt="{} works as a", target="sailor", old_answer=old)
    assert not disagreements([fact], evaluate(editor.editable, [fact]))
    (seen,) = outlook(editor.editable, [fact])
    assert seen.says_old_answer


def test_marks_are_explained_and_counted():
    def line(**given):
        rest = {"id": "a", "says_target": False, "diagnosis": None, "after": {}}
        return {**rest, **given}

    lines = [
        line(says_target=True),
        line(after={"efficacy_strict": True}),
        line(after={"efficacy": True}),
        line(),
        line(after={"forgotten_strict": 1.0}, says_target=None),
        line(diagnosis={"line": "why: nulledit retry RUN", "causes": [{"name": "loops"}]}),
        line(after=None),
    ]
    found = [mark(item) for item in lines]
    wanted = ["ok", "by argmax", "prefers", "missed", "forgotten", "loops", "not evaluated"]
    assert found == wanted
    assert headline(lines) == "2 of 6 facts hold."
    assert headline(lines[:1]) == "1 of 1 fact holds."
    assert all(f"{name}: " in legend(lines) for name in wanted[:-1])
    assert "leaks" not in legend(lines)
    assert reasons(lines, "my/run") == [("a", "why: nulledit retry my/run")]


@pytest.mark.parametrize("generation", [True, False, None])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("forgotten", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("old", [True, False], ids=["older line", "line"])
def test_reports_and_retry_hold_by_one_rule(generation, strict, forgotten, old):
    row = {"efficacy": True, "efficacy_strict": strict, "forgotten_strict": forgotten}
    after = row if old else {**row, "generation": generation}
    line = {"id": "a", "after": after, "says_target": generation, "diagnosis": None}
    good = holds({**row, "generation": generation})
    assert (mark(line) in ("ok", "forgotten")) == held(line) == good
    assert headline([line]) == f"{int(good)} of 1 fact holds."


@pytest.fixture(scope="module")
def world_folder(known, tmp_path_factory):
    """A trained model, its statistics, and a recipe with too few steps, as files."""
    folder = tmp_path_factory.mktemp("world")
    known[0].save_pretrained(folder / "model")
    known[1].save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(world.sentences()), encoding="utf-8")
    recipe = WORLD.with_fields({"values.steps": 1})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    made = (
        *(*MAKE_KEYS, folder / "model", "--text", folder / "text.txt"),
        "--layers",
        "0-1",
    )
    invoke(*made, "--window", 32, "--out", folder / "stats", "--quiet")
    return folder


def invoke(*words):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def lines_of(run):
    told = (run / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, told) if line["active"]]


@pytest.mark.parametrize("at_once", [False, True])
def test_retry_on_the_command_line(world_folder, edits, tmp_path, at_once):
    facts, run = tmp_path / "facts.json", tmp_path / "run"
    asked = [
        {"id": f.id, "subject": f.subject, "prompt": f.prompt, "target": f.target} for f in edits
    ]
    facts.write_text(json.dumps(asked))
    words = ("edit", facts, "--model", world_folder / "model", "--stats", world_folder / "stats")
    more = ("--retry", 5) if at_once else ()
    page = invoke(*words, "--recipe", world_folder / "recipe.yaml", "--out", run, *more)
    if not at_once:
        failing = {line["id"] for line in lines_of(run) if line["diagnosis"]}
        assert failing
        page = invoke("retry", run, "--times", 5)
        assert {line["id"] for line in lines_of(run) if line["run"] == 2} >= failing
    assert "written again with values.steps" in page.stderr
    last = [line for line in lines_of(run) if at_once or line["run"] == 2]
    held = sum(line["diagnosis"] is None for line in last)
    assert held > 0
    assert f"{held} of {len(last)} facts hold." in page.stdout
    assert "retry" in invoke("log", run).stdout
    assert invoke("verify", run).exit_code == 0


def test_what_else_changed_is_one_line():
    def line(then, now):
        before, after = ({} if x is None else {"specificity_strict": x} for x in (then, now))
        return {"before": before, "after": after}

    kl = {"kl": {"value": 1.52, "standard_error": 1.0, "tokens": 99, "worst_share": 0.5}}
    lines = [line(1.0, 1.0), line(0.5, 1.0), line(None, None)]
    assert side_effects(lines, kl) == (
        "Strict answers of neighbours of 1 fact changed, KL on other text 1.5 mnat a token."
    )
    assert side_effects(lines[:1], None) == "No neighbour's strict answer changed."
    assert side_effects(lines[2:], kl) == "KL on other text 1.5 mnat a token."
    assert side_effects([], None) == ""
