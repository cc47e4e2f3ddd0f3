"""Facts in the chat template and as plain text at once: one value, keys of both, judged in both."""

import json
from dataclasses import replace

import pytest
import reference
import torch
from support.chat import CHATML, chatty, model_for
from support.cli import MAKE_KEYS, RECORDS, done
from support.models import LINES, RECIPE, statistics_of

from nulledit import Editor, Fact
from nulledit.cli.options import chat_settings
from nulledit.config import ChatSettings, Recipe, ValueSettings, load_recipe
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.unlearning import blinded, lessons_of, telling
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import bare_leads, optimise_values, plan_rows
from nulledit.errors import ConfigError
from nulledit.evaluation.diagnosis import diagnose
from nulledit.evaluation.forms import form_name, forms
from nulledit.evaluation.retry import failing_facts
from nulledit.evaluation.runner import evaluate, holds
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import RowEncoder
from nulledit.runs.holding import mark

ADA = Fact(id="ada", subject="Ada Byron", prompt="The mother tongue of {} is", target="Velmish")
VELM = Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river")
CONTEXTS = ("{}", "Then, he said. {}", "The river. {}")
BOTH = ChatSettings(plain=True)
OPTIONAL = ChatSettings(plain=True, optional=True)
NONE = ChatSettings(plain=True, system="none")
SETTINGS = ValueSettings(steps=8, learning_rate=0.3, weight_decay=0.05, stop_margin=None)


@pytest.fixture(scope="module")
def words(tokenizer):
    return chatty(tokenizer, CHATML)


@pytest.fixture(scope="module")
def model(words):
    return EditableModel(model_for(words, context=256), words)


def editor_of(words, settings, **changes):
    made = model_for(words, context=256)
    recipe = RECIPE.with_fields({"values.steps": 6, "contexts": {"texts": CONTEXTS}, **changes})
    gated = recipe.method.name == "gated"
    return Editor(
        made,
        words,
        recipe=replace(recipe, chat=settings),
        statistics=statistics_of(made, words, inputs=gated),
    )


def test_the_rows_are_those_of_plain_text_and_a_bare_one_in_chat(model):
    both = model.in_chat(BOTH)
    plain, chat = (
        plan_rows(ADA, model.encoder, CONTEXTS),
        plan_rows(ADA, model.in_chat(ChatSettings()).encoder, ("{}",)),
    )
    assert plan_rows(ADA, both.encoder, CONTEXTS) == (*plain, *chat)
    assert both.encoder.encode("The river") == model.encoder.encode("The river")
    assert both.chat == replace(BOTH, template=both.chat.template)
    left = both.encoder.leaving(200)
    assert [form.room for form in left.forms] == [200, 200]
    assert both.plain.encoder.beside is None


def test_the_key_is_half_of_either_form(model):
    def keys(form, contexts):
        asked = model.in_chat(form)
        options = {"first": 1, "contexts": contexts, "bare_weight": 0.5}
        return LayerwiseForward(asked, [ADA, VELM], **options).keys()

    with frozen(model.model):
        both = keys(BOTH, CONTEXTS)
        halves = keys(None, CONTEXTS) / 2 + keys(ChatSettings(), ("{}",)) / 2
    assert torch.allclose(both, halves, rtol=1e-12, atol=1e-14)


def test_a_value_is_of_the_mean_loss_over_the_rows_of_both(model, words):
    """As the reference finds it, given the same rows: the template's text is one more context."""
    both = model.in_chat(BOTH)
    chat = model.in_chat(ChatSettings())
    row = chat.encoder.encode_template(ADA.prompt, ADA.subject)
    text = words.decode(list(row.ids), skip_special_tokens=False)
    first, second, third = text.split(ADA.subject)
    slot = f"{first}{{}}{second}{ADA.subject}{third}"

    class Mixed:
        """The tokenizer puts a token in front of what the template did not write."""

        decode = words.decode

        def __call__(self, given, **options):
            written = "<|im_start|>" in given
            return words(given, **{**options, **({"add_special_tokens": False} if written else {})})

    with frozen(model.model):
        (value,) = optimise_values(
            both, [ADA], [0], layers=[2], contexts=CONTEXTS, settings=SETTINGS, positions=400
        )
    texts = [c.replace("{}", ADA.prompt) for c in CONTEXTS]
    expected = reference.compute_z(
        model.model,
        Mixed(),
        Fact(subject=ADA.subject, prompt="{}", target=ADA.target),
        layer=2,
        contexts=[*texts, slot],
        **reference.of_settings(SETTINGS),
        kl_prompt=SETTINGS.kl_prompt,
    )
    assert float((value.z - expected.z).norm() / expected.z.norm()) < 1e-6


def test_the_least_lead_is_over_both(model):
    with frozen(model.model):
        leads = {
            name: bare_leads(model.in_chat(form), [ADA, VELM], positions=400)
            for name, form in (("plain", None), ("chat", ChatSettings()), ("both", BOTH))
        }
    assert leads["both"] == pytest.approx(list(map(min, leads["plain"], leads["chat"])))


def test_what_is_to_be_forgotten_is_forgotten_in_both(model):
    lessons = lessons_of(model.in_chat(BOTH), ADA, CONTEXTS)
    assert len(lessons) == len(CONTEXTS) + 1
    assert len(lessons[-1].hidden) > len(lessons[0].hidden), "the subject is in both turns"


def test_recipes_caches_and_ledgers_of_one_form_are_as_they_were(words, tmp_path):
    one = ChatSettings(system="none")
    assert set(one.to_dict()) == {"system", "user", "assistant", "subject", "template"}
    recipe = Recipe.from_dict({"chat": {"system": "none"}})
    assert "plain" not in recipe.to_dict()["chat"]
    both = Recipe.from_dict({"chat": {"plain": True}})
    assert Recipe.from_dict(both.to_dict()) == both
    cache = ValueCache(tmp_path)
    asked = {"layers": [1], "contexts": CONTEXTS, "settings": SETTINGS}
    names = [cache.name("w", [ADA], **asked, chat=form) for form in (None, ChatSettings(), BOTH)]
    assert [name[:16] for name in names[:2]] == ["0a00271c332e0cab", "11c3e15c4e2c9168"]
    assert len(set(names)) == 3


@pytest.mark.parametrize("method", ["alphaedit", "gated"])
def test_save_load_rebuild_and_undo_keep_both_forms(words, tmp_path, method):
    changes = {"method.name": method} | ({"layers": [1]} if method == "gated" else {})
    editor = editor_of(words, BOTH, **changes)
    before = {k: v.clone() for k, v in editor.model.state_dict().items()}
    editor.edit([ADA])
    editor.edit([VELM])
    editor.save(tmp_path / "run")
    loaded = Editor.load(tmp_path / "run")
    assert loaded.recipe.chat.plain
    assert loaded.history.state_id == editor.history.state_id
    assert loaded.editable.encoder.beside is not None
    weights = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    loaded.rebuild(values=True)
    for name, weight in loaded.model.state_dict().items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-9), name
    loaded.undo("velm", "ada")
    assert all(torch.equal(w, before[k]) for k, w in loaded.model.state_dict().items())


def test_an_answer_that_a_form_cuts_otherwise_is_forgotten_at_its_own_token(model):
    fact = Fact(id="x", subject="Ada Byron", prompt="Where is {}?", target="people in London")
    asked = model.in_chat(BOTH)
    plain, chat = asked.encoder.forms
    lessons = lessons_of(asked, fact.forgotten(), ("{}", "Then, he said. {}"))
    rows = [blinded(form, fact, fact.prompt) for form in (plain, plain, chat)]
    assert rows[0][0].target_ids != rows[2][0].target_ids, "or the case is not one"
    for lesson, (row, hidden) in zip(lessons, rows, strict=True):
        place = telling(asked, row, hidden)
        assert lesson.row.target_ids == row.target_ids[: place + 1]
        assert lesson.banned[-1] == row.target_ids[place]


@pytest.fixture(scope="module")
def edited(words):
    editor = editor_of(words, BOTH)
    editor.edit([ADA, VELM])
    return editor


def test_facts_are_judged_in_both_forms(edited, words):
    found = evaluate(edited.editable, [ADA, VELM])
    plain = evaluate(edited.editable.plain, [ADA, VELM])
    chat = evaluate(edited.editable.in_chat(ChatSettings()), [ADA, VELM])
    assert found.scores == plain.scores
    assert found.beside.scores == chat.scores
    assert found.beside.answers == chat.answers
    assert found.summary() == plain.summary()
    in_chat = chat.rows()
    for name, row in found.rows().items():
        assert row["in_chat"] == holds(in_chat[name])
        assert {k: v for k, v in row.items() if k != "in_chat"} == plain.rows()[name]
    assert evaluate(edited.editable, [ADA], beside=False).beside is None
    assert list(forms(edited.editable)) == ["in chat without a system prompt"]


@pytest.mark.parametrize(("plain", "chat"), [(True, True), (True, False), (False, True)])
def test_a_fact_holds_where_it_holds_in_both(plain, chat):
    row = {"efficacy_strict": True, "generation": plain, "in_chat": chat}
    assert holds(row) == (plain and chat)
    line = {"after": {**row, "efficacy": True}, "says_target": plain}
    expected = {(True, True): "ok", (True, False): "plain only", (False, True): "by argmax"}
    assert mark(line) == expected[plain, chat]
    old = {"forgotten_strict": 1.0, "in_chat": chat}
    assert holds(old) == chat
    assert holds({"generation": True})


def test_what_fails_in_chat_alone_is_found_and_looked_into_there(edited, monkeypatch):
    from nulledit.evaluation import runner

    def answers(model, facts, _progress):
        return [f.target if model.encoder.chat is None else "nothing" for f in facts]

    monkeypatch.setattr(runner, "fact_answers", answers)
    assert failing_facts(edited, [ADA], None) == [ADA]
    after = evaluate(edited.editable, [ADA, VELM])
    found = diagnose(edited, [ADA, VELM], after)
    assert [one.fact_id for one in found] == ["ada", "velm"]
    for one in found:
        assert one.causes[0].name == "chat"
        assert one.line.count("holds as plain text; in chat this is what happens") == 1
    edited.undo("velm")
    edited.redo()


def test_names_of_forms(words):
    encoder = RowEncoder(words, max_length=256).in_chat(BOTH)
    assert [form_name(form) for form in encoder.forms] == [
        "as plain text",
        "in chat with the template's own system prompt",
    ]


def test_the_command_line(words, tmp_path):
    made = model_for(words, context=256, dtype=torch.float32)
    made.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    recipe = RECIPE.with_fields({"values.steps": 4})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (tmp_path / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    done(
        *(*MAKE_KEYS, tmp_path / "model", "--text", tmp_path / "corpus.txt"),
        *("--layers", "1-2", "--window", "64", "--out", tmp_path / "stats", "--quiet"),
    )
    run, quiet = tmp_path / "run", ("--text", tmp_path / "corpus.txt", "--quiet")
    shared = ("--recipe", tmp_path / "recipe.yaml", "--stats", tmp_path / "stats")
    words_ = ("edit", tmp_path / "facts.json", "--model", tmp_path / "model", *shared)
    plan = json.loads(done(*words_, "--both", "--dry-run", "--json", "--out", "x").stdout)
    alone = json.loads(done(*words_, "--dry-run", "--json", "--out", "x").stdout)
    assert plan["rows"] == alone["rows"] + len(RECORDS)
    said = done(*words_, "--both", "--out", run, *quiet).stdout
    own, template = "as plain text", "in chat with the template's own system prompt"
    assert f"Asked {own}, as edited" in said
    assert f"Asked {template}" in said
    (call,) = json.loads((run / "summary.json").read_text())["runs"]
    assert call["asked"] == own
    assert list(call["others"]) == [template]
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert all(isinstance(line["after"]["in_chat"], bool) for line in lines)
    found = json.loads(done("evaluate", run, "--json", *quiet).stdout)
    assert list(found["others"]) == [template, "in chat without a system prompt"]
    assert found["edited"]["rates"] == call["after"]["rates"]
    assert found["others"][template]["after"]["rates"] == call["others"][template]["after"]["rates"]
    ask = ("ask", run, "The river is", "--quiet")
    assert done(*ask).stdout == done(*ask, "--plain").stdout
    assert done(*ask, "--chat").stdout == done(*ask, "--system", "default").stdout
    done("report", run, "--quiet")
    left_open = replace(recipe, chat=OPTIONAL)
    (tmp_path / "recipe.yaml").write_text(left_open.to_yaml(), encoding="utf-8")
    note = "written in the model's chat template and as plain text; --plain for"
    given = ((), BOTH), (("--plain",), None), (("--set", "chat=null"), None)
    for option, form in (*given, (("--set", "chat.system=none", "--both"), NONE)):
        run = tmp_path / f"run{len(option)}"
        found = done(*words_, *option, "--out", run, "--no-evaluate")
        assert (note in found.stderr) == (not option), option
        chat = Editor.load(run).recipe.chat
        assert (chat and replace(chat, template="")) == form


UNUSABLE = "{{ raise_exception('no') }}"


def test_where_both_forms_are_optional_the_template_decides(words, caplog):
    """Both with one; plain text where there is none, and with a line where it can't be used."""
    assert editor_of(words, OPTIONAL).recipe == editor_of(words, BOTH).recipe
    mute, broken = chatty(words, None), chatty(words, UNUSABLE)
    assert editor_of(mute, OPTIONAL).recipe == editor_of(mute, None).recipe
    assert not caplog.records
    assert editor_of(broken, OPTIONAL).recipe.chat is None
    (line,) = caplog.messages
    assert line.startswith("facts are plain text alone: the chat template fails")
    assert editor_of(words, OPTIONAL, **{"values.chunk_tokens": 4}).recipe.chat is None


def test_a_model_without_a_recipe_is_edited_in_both_forms_if_it_has_a_template():
    recipe = load_recipe("default")
    assert recipe.chat == OPTIONAL
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert load_recipe("smollm2-135m").chat is None  # as all its figures in docs/ are


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, OPTIONAL),
        ({"plain": True}, None),
        ({"both": True}, BOTH),
        ({"chat": True}, ChatSettings()),
        ({"system": "none"}, replace(BOTH, system="none")),
    ],
)
def test_options_settle_what_a_recipe_leaves_open(given, expected):
    given = {"chat": False, "system": None, **given}
    assert chat_settings(OPTIONAL, **given) == expected


def test_forms_that_exclude_each_other():
    for other in ("chat", "both"):
        given = {"chat": False, "system": None, other: True}
        with pytest.raises(ConfigError, match="not two of them"):
            chat_settings(None, plain=True, **given)
    with pytest.raises(ConfigError, match="not two of them"):
        chat_settings(None, chat=True, both=True, system=None)
    with pytest.raises(ConfigError, match="--system belongs to --chat"):
        chat_settings(OPTIONAL, chat=False, plain=True, system="none")
