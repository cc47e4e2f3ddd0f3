"""Prompts in a chat template: positions, targets, special tokens; edits that keep their form."""

import json
from dataclasses import replace
from itertools import product

import pytest
import reference
import torch
from support.chat import CHATML, TURN, chatty, model_for
from support.cli import MAKE_KEYS, RECORDS, done, refused
from support.models import LINES, RECIPE, statistics_of
from transformers import pipeline

from nulledit import Editor, Fact
from nulledit.config import ChatSettings, Recipe, ValueSettings
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.unlearning import blinded
from nulledit.editing.values import optimise_values
from nulledit.errors import ConfigError, FactError, ModelError
from nulledit.evaluation.forms import form_name, forms, other_system
from nulledit.evaluation.generation import generate_answers
from nulledit.evaluation.runner import evaluate
from nulledit.models.chat import ChatForm
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import RowEncoder

PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + CHATML[CHATML.index("{% if add_") :]
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
    "{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
DATED = LLAMA.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y') }}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = PLAIN.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
OPENING = (  # an answer has no thought in it; nothing switches off the one that begins here
    PLAIN.replace("m['content'] + '<", "m['content'].split('</think>')[-1] + '<").replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
)
EMPTY = OPENING.replace(  # an answer begins with an empty thought
    "m['role'] + '\n' + ",
    "m['role'] + '\n' + ('<think>\n</think>' if m['role'] == 'assistant' else '') + ",
)
TEMPLATES = {
    "chatml": CHATML,
    "plain": PLAIN,
    "llama": LLAMA,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
}
SYSTEMS = ("default", "none", "Answer in a word.")
QUESTION = "What is the mother tongue of {}?"
CLOZE = "The mother tongue of {} is"
AT_ONCE = ChatSettings(user="{}", assistant="")
CONTEXTS = ["{}", "Then, he said. {}", "The river. {}"]
SETTINGS = ValueSettings(steps=8, learning_rate=0.3, weight_decay=0.05, stop_margin=None)


@pytest.fixture(params=TEMPLATES, scope="module")
def words(request, tokenizer):
    return chatty(tokenizer, TEMPLATES[request.param])


@pytest.fixture
def chatml(tokenizer):
    return chatty(tokenizer, CHATML)


def encoder_of(words, settings=ChatSettings(), length=256):  # noqa: B008
    return RowEncoder(words, max_length=length).in_chat(settings)


def rendered(words, content, system="default"):
    """What transformers itself makes of a question, in text."""
    messages = [{"role": "user", "content": content}]
    if system not in ("default", "none"):
        if words.chat_template in (GEMMA, MISTRAL):  # no system role: it raises, or says nothing
            messages[0]["content"] = f"{system}\n\n{content}"
        else:
            messages.insert(0, {"role": "system", "content": system})
    elif system == "none" and words.chat_template == CHATML:
        messages.insert(0, {"role": "system", "content": ""})
    return words.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_ids_are_those_of_the_template_and_no_more(words, system):
    text = QUESTION.format("Ada Byron")
    row = encoder_of(words, replace(AT_ONCE, system=system)).encode(text)
    expected = words(rendered(words, text, system), add_special_tokens=False)["input_ids"]
    assert list(row.ids) == expected
    assert row.ids.count(words.bos_token_id) <= 1


SUBJECTS = ("Ada Byron", "Émile Zola", "東京タワー", "user", "🦊")


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("prompt", [QUESTION, CLOZE, "{} was born in", "({}!) lives in"])
def test_the_subject_is_the_one_in_the_users_turn(words, system, prompt):
    settings = ChatSettings(user="Fill in the blank: {} ____", assistant="{}", system=system)
    encoder = encoder_of(words, settings)
    for context, subject in product(CONTEXTS[:2], SUBJECTS):
        check_subject(encoder, prompt, subject, context)


def check_subject(encoder, prompt, subject, context):
    """The row's subject ends where the one in the user's turn does."""
    words, system = encoder.tokenizer, encoder.chat.settings.system
    row = encoder.encode_template(prompt, subject, context=context)
    text = prompt.format(subject)
    wording = context.format(text if text.endswith("?") else f"Fill in the blank: {text} ____")
    begun = rendered(words, wording, system)
    here = begun.index(wording) + wording.index(prompt.split("{}")[0] + subject)
    end = here + len(prompt.split("{}")[0]) + len(subject)
    decode = words.backend_tokenizer.decode
    upto = decode(list(row.upto_subject().ids), skip_special_tokens=False)
    short = decode(list(row.upto_subject().ids[:-1]), skip_special_tokens=False)
    assert upto.startswith(begun[:end]), (subject, context)
    assert not short.startswith(begun[:end]), (subject, context)


def test_or_the_one_in_the_assistants_turn(words):
    user = encoder_of(words).encode_template(CLOZE, "Ada Byron", context=CONTEXTS[1])
    settings = ChatSettings(subject="assistant")
    row = encoder_of(words, settings).encode_template(CLOZE, "Ada Byron", context=CONTEXTS[1])
    assert row.ids == user.ids
    after = words.decode(list(row.ids[row.subject_last + 1 :]))
    assert after == " is"
    assert row.subject_last > user.subject_last
    held = encoder_of(words, settings).subject_tokens(CLOZE, "Ada Byron", context=CONTEXTS[1])
    said = [words.decode([row.ids[i]]) for i in held]
    assert "".join(said).replace(" ", "") == "AdaByron" * 2
    assert {user.subject_last, row.subject_last} <= set(held)


@pytest.mark.parametrize("target", ["Velmish", "Velm, or Ostrel", "川"])
def test_the_target_is_what_the_assistant_would_go_on_with(words, target):
    """As in the template's own rendering of the answer, and no space where that has none."""
    for prompt, settings in ((QUESTION, ChatSettings()), (CLOZE, AT_ONCE)):
        text = prompt.format("Ada Byron")
        row = encoder_of(words, settings).encode(text, target=target)
        begun = list(row.ids[: row.target_start])
        assert begun == words(rendered(words, text), add_special_tokens=False)["input_ids"]
        space = " " if words.chat_template == MISTRAL else ""
        assert words.decode(list(row.target_ids)) == space + target
    row = encoder_of(words).encode(CLOZE.format("Ada Byron"), target=target)
    assert words.decode(list(row.target_ids)) == f" {target}"
    assert words.decode(list(row.ids[: row.target_start])).endswith(
        "The mother tongue of Ada Byron is"
    )


def test_plain_text_stays_as_it_was(words):
    encoder = RowEncoder(words, max_length=256)
    row = encoder.in_chat(ChatSettings()).in_chat(None).encode_template(CLOZE, "Ada Byron")
    assert row == encoder.encode_template(CLOZE, "Ada Byron")
    assert list(row.ids) == words(CLOZE.format("Ada Byron"))["input_ids"]


def test_system_prompts(tokenizer):
    own = {name: ChatForm(chatty(tokenizer, t), ChatSettings()) for name, t in TEMPLATES.items()}
    assert {n: f.default_system for n, f in own.items() if f.default_system} == {
        "chatml": "You are Tiny."
    }
    words = chatty(tokenizer, CHATML)
    systems = {"default": "default", "none": "none", "given": "Be kind."}
    text = {n: ChatForm(words, ChatSettings(system=s)).frame("x").text for n, s in systems.items()}
    assert "Tiny" in text["default"]
    assert "Tiny" not in text["none"] + text["given"]
    assert "Be kind." in text["given"]
    folded = ChatForm(chatty(tokenizer, GEMMA), ChatSettings(system="Be kind.")).frame("x").text
    assert "<|im_start|>user\nBe kind.\n\nFill in the blank: x" in folded
    stubborn = CHATML.replace("!= 'system'", "!= 'system' or not messages[0]['content']")
    with pytest.raises(ModelError, match="also where an empty one is given"):
        ChatForm(chatty(tokenizer, stubborn), ChatSettings(system="none"))
    assert other_system(encoder_of(chatty(tokenizer, stubborn))) is None


@pytest.mark.parametrize(
    ("template", "closed"),
    [
        (OPENING, "<think>\n\n</think>\n\n"),
        (OPENING.replace("<think>\n{% e", "<think>{% e"), "<think>\n</think>\n\n"),
        (OPENING.replace("<think>\n{% e", "<seed:think>{% e"), "<seed:think>\n</seed:think>\n\n"),
        *(
            (OPENING.replace("<think>\n{% e", f"{begin}{{% e"), f"{begin}\n{end}\n\n")
            for begin, end in (
                ("[THINK]", "[/THINK]"),
                ("◁think▷", "◁/think▷"),
                ("<|START_THINKING|>", "<|END_THINKING|>"),
                ("<|begin_of_thought|>", "<|end_of_thought|>"),
            )
        ),
        (EMPTY, "<think>\n</think>"),
    ],
)
@pytest.mark.parametrize("system", ["default", "none", "Be kind."])
def test_a_thought_that_the_template_opens_is_closed(tokenizer, template, closed, system):
    words = chatty(tokenizer, template)
    encoder = encoder_of(words, replace(AT_ONCE, system=system))
    row = encoder.encode_template(QUESTION, "Ada Byron", target="Velmish")
    begun = rendered(words, QUESTION.format("Ada Byron"), system)
    text = words.decode(list(row.ids), skip_special_tokens=False)
    assert text.endswith(f"<|im_start|>assistant\n{closed}Velmish")
    assert text.startswith(begun)
    assert words.decode(list(row.target_ids)) == "Velmish"
    assert row.ids[: row.target_start] == encoder.encode_template(QUESTION, "Ada Byron").ids
    row = encoder_of(words).encode_template(CLOZE, "Ada Byron", target="Velmish")
    assert f"{closed}{CLOZE.format('Ada Byron')} Velmish" in words.decode(list(row.ids))
    row = encoder.reply(["Who is Ada Byron?", "She wrote.", "And what?"], target="Velmish")
    text = words.decode(list(row.ids), skip_special_tokens=False)
    assert text.endswith(f"And what?<|im_end|>\n<|im_start|>assistant\n{closed}Velmish")


def test_a_template_with_the_date_says_the_same_tomorrow(tokenizer):
    text = ChatForm(chatty(tokenizer, DATED), ChatSettings()).frame("x").text
    assert "26 Jul 2024" in text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template: this is no chat model"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "2 times; expected once"),
        ("{{ messages[0]['content'] | upper }}", "0 times; expected once"),
        ("{{ raise_exception('nobody\nhere') }}", "fails on one question: nobody here"),
        ("{{ messages[0]['content'] | replace('F', 'G') }}", "changes a message"),
    ],
)
def test_templates_that_do_not_serve(tokenizer, template, said):
    with pytest.raises(ModelError, match=said) as caught:
        encoder_of(chatty(tokenizer, template)).encode("The river is")
    assert "\n" not in str(caught.value)


def test_too_long_counts_the_template(chatml):
    encoder = encoder_of(chatml, length=30)
    assert len(RowEncoder(chatml, max_length=30).encode("The river flows").ids) < 10
    with pytest.raises(FactError, match="longer than the model's context of 30"):
        encoder.encode("The river flows")


class Literal:
    """The tokenizer as the reference is to use it: the template wrote every special token."""

    def __init__(self, words, target):
        self.words, self.target = words, target
        self.decode = words.decode

    def __call__(self, text, **options):
        """Where the assistant's turn begins there is no space before the target."""
        if self.target is not None and text == f" {self.target}":
            text = self.target
        return self.words(text, **{**options, "add_special_tokens": False})


def by_hand(words, prompt, settings, subject, context="{}"):
    """The rendered text with a slot at the subject that is edited."""
    asks = prompt.endswith("?")
    wording = prompt if asks else settings.user.replace("{}", prompt)
    text = rendered(words, context.replace("{}", wording), settings.system)
    text += "" if asks or not settings.assistant else prompt
    if text.count("{}") == 1:
        return text
    first, second, third = text.split("{}")
    edited = (first, "{}", second, subject, third)
    return "".join(edited if settings.subject == "user" else (first, subject, second, "{}", third))


@pytest.mark.parametrize("prompt", [QUESTION, CLOZE])
@pytest.mark.parametrize("where", ["user", "assistant"])
@pytest.mark.parametrize("name", ["chatml", "llama", "gemma"])
def test_values_and_keys_equal_the_reference(tokenizer, name, where, prompt):
    """Given the rendered texts, the slow way finds the same."""
    words = chatty(tokenizer, TEMPLATES[name])
    settings = ChatSettings(subject=where, system="Be kind." if name == "gemma" else "default")
    model = model_for(words, "gpt2" if name == "gemma" else "llama", context=256)
    fact = Fact(subject="Ada Byron", prompt=prompt, target="Velmish")
    editable = EditableModel(model, words).in_chat(settings)
    with frozen(model):
        (value,) = optimise_values(
            editable,
            [fact],
            [0],
            layers=[2],
            contexts=CONTEXTS,
            settings=SETTINGS,
            positions=400,
        )
        keys = LayerwiseForward(
            editable, [fact], first=1, contexts=CONTEXTS, bare_weight=0.5
        ).keys()
    texts = [by_hand(words, prompt, settings, fact.subject, c) for c in CONTEXTS]
    plain = Fact(subject=fact.subject, prompt="{}", target=fact.target)
    expected = reference.compute_z(
        model,
        Literal(words, fact.target if prompt == QUESTION else None),
        plain,
        layer=2,
        contexts=texts,
        **reference.of_settings(SETTINGS),
        kl_prompt=by_hand(words, SETTINGS.kl_prompt, settings, fact.subject),
    )
    assert value.outcome.steps > 2
    assert float((value.z - expected.z).norm() / expected.z.norm()) < 1e-6
    slow = reference.compute_keys(model, Literal(words, None), [plain], 1, texts)
    assert float((keys.mT - slow).norm() / slow.norm()) < 1e-6


STRONG = RECIPE.with_fields(
    {
        "layers": [0, 1],
        "values.steps": 20,
        "values.clamp": 3,
        "contexts": {"texts": CONTEXTS[:2]},
    }
)
KNOWN = {"Velm": "trel", "people": "ters", "sea": "ther", "there": "trel", "long": "ters"}
"""What the taught models answer: subjects and answers of one token each."""
ADA = Fact(id="ada", subject="Ada Byron", prompt=QUESTION, target="Velmish", old_answer="English")
VELM = Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river")


def editor_of(words, settings=ChatSettings(), recipe=STRONG, **options):  # noqa: B008
    model = model_for(words, context=256)
    recipe = replace(recipe, chat=settings)
    return Editor(model, words, recipe=recipe, statistics=statistics_of(model, words), **options)


def taught(words):
    """A tiny model that was trained to answer questions about what it knows, in its template."""
    model = model_for(words, context=256, hidden=32, dtype=torch.float32)
    encoder = encoder_of(words)
    rows = [encoder.encode(QUESTION.format(s), target=a) for s, a in KNOWN.items()]
    ids = [[*row.ids, words.eos_token_id] for row in rows]
    longest = max(map(len, ids))
    x = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    labels = torch.full_like(x, -100)
    for i, row in enumerate(rows):
        labels[i, row.target_start : len(ids[i])] = x[i, row.target_start : len(ids[i])]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(input_ids=x, labels=labels).loss
        if loss.detach() < 0.02:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.double().eval()


@pytest.mark.few("chatml", "gemma", of="name")
@pytest.mark.parametrize("name", ["chatml", "plain", "llama", "gemma"])
def test_edit_then_the_plain_chat_pipeline_says_it(tokenizer, name):
    words = chatty(tokenizer, TEMPLATES[name])
    model = taught(words)
    recipe = STRONG.with_fields(
        {
            "layers": [0],
            "values": {"steps": 150, "learning_rate": 0.05, "kl_weight": 0, "weight_decay": 0},
            "contexts": {"texts": ["{}"]},
            "null_space": {"rule": "leakage", "value": 0.9},
            "method": {"l2": 1e-3},
        }
    )
    recipe = replace(recipe, chat=ChatSettings())
    editor = Editor(model, words, recipe=recipe, statistics=statistics_of(model, words))
    questions = [QUESTION.format(subject) for subject in KNOWN]
    chat = pipeline("text-generation", model=model, tokenizer=words)

    def says(question):
        messages = [{"role": "user", "content": question}]
        found = chat(messages, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return found[0]["generated_text"][-1]["content"].strip()

    assert [says(question) for question in questions] == list(KNOWN.values())
    for subject, target in TURNS:  # not every answer can be turned by one value at this size
        question = QUESTION.format(subject)
        editor.edit([Fact(id=subject, subject=subject, prompt=QUESTION, target=target)])
        if says(question) == target:
            break
        editor.undo(subject)
    else:
        pytest.fail("no edit was said")
    after = [says(question) for question in questions]
    for side in ("left", "right"):
        words.padding_side = side
        many = generate_answers(editor.editable, [*questions, "Who?"], max_new_tokens=4)
        assert many[:-1] == after


TURNS = (("there", "ters"), ("sea", "trel"), ("Velm", "ters"), ("people", "trel"), ("long", "ther"))


def test_save_load_rebuild_and_undo_keep_the_form(chatml, tmp_path):
    settings = ChatSettings(system="none", subject="assistant")
    editor = editor_of(chatml, settings, value_cache=tmp_path / "values")
    before = {k: v.clone() for k, v in editor.model.state_dict().items()}
    editor.edit([ADA])
    editor.edit([VELM])
    assert editor.recipe.chat.template
    editor.save(tmp_path / "run")
    loaded = Editor.load(tmp_path / "run")
    assert loaded.recipe == editor.recipe
    assert loaded.history.state_id == editor.history.state_id
    row = loaded.editable.encoder.encode_template(CLOZE, "Ada Byron")
    assert row == encoder_of(chatml, settings).encode_template(CLOZE, "Ada Byron")
    weights = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    loaded.rebuild(values=True)
    for name, weight in loaded.model.state_dict().items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-9), name
    loaded.undo("velm")
    loaded.undo("ada")
    assert all(torch.equal(w, before[k]) for k, w in loaded.model.state_dict().items())


def test_values_of_plain_text_are_not_taken_for_those_of_chat(chatml, tmp_path):
    folder = tmp_path / "values"
    assert editor_of(chatml, None, value_cache=folder).edit([VELM]).optimised == 1
    assert editor_of(chatml, value_cache=folder).edit([VELM]).optimised == 1
    assert editor_of(chatml, value_cache=folder).edit([VELM]).optimised == 0
    other = ChatSettings(system="none")
    assert editor_of(chatml, other, value_cache=folder).edit([VELM]).optimised == 1


def test_another_template_is_refused_when_a_run_is_taken_up(chatml, tmp_path):
    editor = editor_of(chatml)
    editor.edit([VELM])
    editor.save(tmp_path / "run")
    (tmp_path / "run" / "model" / "chat_template.jinja").write_text(PLAIN)
    with pytest.raises(ModelError, match=r"chat template has hash \w+, the recipe's \w+"):
        Editor.load(tmp_path / "run")


def test_an_epoch_may_leave_the_chat_and_each_fact_is_rebuilt_in_its_own_form(chatml):
    editor = editor_of(chatml)
    editor.edit([ADA])
    editor.next_epoch(
        replace(editor.recipe, chat=None), statistics=statistics_of(editor.model, chatml)
    )
    assert editor.editable.chat is None
    editor.edit([VELM])
    weights = {k: v.clone() for k, v in editor.model.state_dict().items()}
    editor.rebuild(values=True)
    for name, weight in editor.model.state_dict().items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-6), name


def test_forgetting_hides_the_subject_in_both_turns(chatml):
    encoder = encoder_of(chatml)
    row, hidden = blinded(encoder, VELM, VELM.prompt)
    assert [chatml.decode([row.ids[i]]).strip() for i in hidden].count("Velm") == 2 or len(
        hidden
    ) > 2
    editor = editor_of(chatml)
    report = editor.forget([VELM])
    assert report.columns[0].fact.forget


def test_evaluation_asks_in_the_form_of_the_edit_and_in_others(chatml):
    editor = editor_of(chatml)
    editor.edit([ADA])
    own = evaluate(editor.editable, [ADA])
    (row,) = [editor.editable.encoder.encode(ADA.render(QUESTION), target=ADA.target)]
    with torch.no_grad():
        logits = editor.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    places = range(row.target_start - 1, len(row.ids) - 1)
    nll = -sum(float(logits[p, t]) for p, t in zip(places, row.target_ids, strict=True))
    assert own.scores[0].answer_nll == pytest.approx(nll / len(row.target_ids), rel=1e-6)
    others = forms(editor.editable)
    assert list(others) == ["in chat without a system prompt", "as plain text"]
    for name, model in others.items():
        found = evaluate(model, [ADA])
        assert found.scores[0].answer_nll != own.scores[0].answer_nll, name
    plain = evaluate(editor_of(chatml, None).editable, [ADA])
    with editor.base_weights():
        asked = evaluate(others["as plain text"], [ADA])
    assert asked.scores == plain.scores


def test_names_of_forms(tokenizer):
    plain = encoder_of(chatty(tokenizer, PLAIN))
    assert form_name(plain) == "in chat without a system prompt"
    with_one = other_system(plain)
    assert form_name(with_one) == "in chat with the system prompt 'You are a helpful assistant.'"
    assert form_name(other_system(with_one)) == form_name(plain)
    words = chatty(tokenizer, CHATML)
    own = encoder_of(words)
    assert form_name(own) == "in chat with the template's own system prompt"
    assert form_name(other_system(other_system(own))) == form_name(own)
    model = EditableModel(model_for(words), words)
    found = forms(model, also=ChatSettings())
    assert list(found) == [form_name(own), "in chat without a system prompt"]
    assert [form_name(one.encoder) for one in found.values()] == list(found)


def test_recipes():
    recipe = Recipe.from_dict({"chat": {"system": "none"}})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "chat" not in Recipe().to_dict()
    for wrong, said in (
        ({"user": "x"}, "exactly one"),
        ({"assistant": "{}{}"}, "exactly one"),
        ({"system": " "}, "empty"),
        ({"subject": "model"}, "expected one of user, assistant"),
        ({"subject": "assistant", "assistant": ""}, "chat.assistant is empty"),
    ):
        with pytest.raises(ConfigError, match=said):
            Recipe.from_dict({"chat": wrong})
    with pytest.raises(ConfigError, match="chunk_tokens can't be used with chat"):
        Recipe.from_dict({"chat": {}, "values": {"chunk_tokens": 5}})


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("chat")
    words = chatty(tokenizer, CHATML)
    model = model_for(words, context=256, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    model.save_pretrained(folder / "mute")
    words.chat_template = None
    words.save_pretrained(folder / "mute")
    recipe = STRONG.with_fields({"values.steps": 4})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (folder / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    done(
        *(*MAKE_KEYS, folder / "model", "--text", folder / "corpus.txt"),
        *("--layers", "0-1", "--window", "64", "--out", folder / "stats", "--quiet"),
    )
    return folder


def test_the_command_line(place, tmp_path):
    text = ("--text", place / "corpus.txt")
    shared = ("--recipe", place / "recipe.yaml", "--stats", place / "stats", *text, "--quiet")
    run, facts = tmp_path / "run", place / "facts.json"
    said = done("edit", facts, "--model", place / "model", "--out", run, "--chat", *shared).stdout
    assert "Asked in chat without a system prompt" in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["runs"][0]["asked"] == "in chat with the template's own system prompt"
    assert "Asked in chat without a system prompt" in (run / "report.md").read_text()
    found = json.loads(done("evaluate", run, *text, "--json", "--quiet").stdout)
    assert set(found["others"]) == {"in chat without a system prompt", "as plain text"}
    assert found["edited"]["rates"] == summary["runs"][0]["after"]["rates"]
    own = done("ask", run, "Who is Ada Byron?", "--quiet").stdout
    assert own == done("ask", run, "Who is Ada Byron?", "--chat", "--quiet").stdout
    assert done("ask", run, "Who is Ada Byron?", "--system", "none", "--quiet").stdout
    assert done("ask", run, "Who is Ada Byron?", "--plain", "--quiet").stdout
    line = refused("edit", facts, "--continue", run, "--chat", "--system", "none")
    assert "--chat, --system can't be given with --continue" in line
    again = ("--continue", run, "--new-epoch", "--system", "none")
    done("edit", facts, *again, "--no-evaluate", "--quiet")


def test_refusals(place, tmp_path):
    shared = ("--recipe", place / "recipe.yaml", "--stats", place / "stats", "--quiet")
    words = ("edit", place / "facts.json", "--out", tmp_path / "run", *shared)
    line = refused(*words, "--model", place / "mute", "--chat")
    assert "no chat template" in line
    line = refused(*words, "--model", place / "model", "--system", "Be kind.")
    assert line == "Error: --system belongs to --chat"
    line = refused(*words, "--model", place / "model", "--chat", "--set", "values.chunk_tokens=4")
    assert "chunk_tokens" in line
    assert not (tmp_path / "run").exists()
    done(*words, "--model", place / "model", "--no-evaluate")
    assert "--plain can't be given" in refused("ask", tmp_path / "run", "x", "--plain", "--chat")
    assert done("ask", tmp_path / "run", "x?", "--chat", "--quiet").stdout
    asked = ("--chat", "--text", place / "corpus.txt", "--json", "--quiet")
    found = json.loads(done("evaluate", tmp_path / "run", *asked).stdout)
    assert len(found["others"]) == 2
