"""Facts: how they are cleaned, what they refuse, and that their native records lose nothing."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.facts import ROME, facts, subjects, texts

from nulledit.data.facts import PROBES, Fact, Probe
from nulledit.errors import CheckFailed, FactError, NullEditError


@given(facts())
@settings(deadline=None, max_examples=80, derandomize=True)
def test_a_native_record_loses_nothing(fact):
    assert Fact.from_dict(fact.to_dict()) == fact


@given(facts())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_the_subject_stands_where_the_slot_was(fact):
    for template in fact.prompts:
        before, after = template.split("{}")
        assert fact.render(template) == before + fact.subject + after


@given(subjects, texts, st.sampled_from(["first", "middle", "last"]))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_a_prompt_that_names_the_subject_once_becomes_a_template(subject, words, place):
    prompt = {"first": f"{subject} {words}", "last": f"{words} {subject}"}.get(
        place, f"{words} {subject} {words}"
    )
    mentions = sum(prompt.startswith(subject, i) for i in range(len(prompt)))
    if mentions == 1:
        fact = Fact(subject, prompt, "a target")
        assert fact.prompt.count("{}") == 1
        assert fact.render(fact.prompt) == prompt
    else:
        with pytest.raises(FactError, match="more than once"):
            Fact(subject, prompt, "a target")


@pytest.mark.parametrize(
    ("subject", "prompt", "template"),
    [
        ("Rome", "Rome is the capital of", "{} is the capital of"),
        ("Rome", "Rome, that is {}, lies in", "Rome, that is {}, lies in"),
        ("東京", "日本の首都は東京です。東京でなく", None),
        ("東京", "日本の首都、東京の人口は", "日本の首都、{}の人口は"),
        ("Москва", "Столица России — Москва, страна", "Столица России — {}, страна"),
        ("القاهرة", "تقع القاهرة في", "تقع {} في"),
        ("👩‍🔬 Ada", "👩‍🔬 Ada works in", "{} works in"),
        ("Rome", 'json: {"city": "{}", "in": {0} %s', 'json: {"city": "{}", "in": {0} %s'),
        ("Rome", "the set {Rome}", "the set {{}}"),
        ("Rome", "  {} lies in \n", "{} lies in"),
    ],
)
def test_where_the_slot_goes(subject, prompt, template):
    if template is None:
        with pytest.raises(FactError, match=r"^prompt .*more than once: mark one"):
            Fact(subject, prompt, "X")
    else:
        fact = Fact(subject, prompt, "X")
        assert fact.prompt == template
        assert fact.render(fact.prompt) == prompt.strip().replace("{}", subject)


def test_texts_are_stripped_and_slots_of_paraphrases_filled():
    fact = Fact(
        " Rome\n",
        "{} lies in ",
        " France ",
        old_answer=" Italy",
        more_prompts=["Find {} in "],
        paraphrases=["Where is {}? {} is in", " The Eternal City is in "],
        neighbours=["Milan is in ", {"prompt": " Oslo is in", "answer": "Norway "}],
        portability=[{"prompt": "The language of Rome is ", "answer": " French"}],
    )
    assert (fact.subject, fact.target, fact.old_answer) == ("Rome", "France", "Italy")
    assert fact.prompts == ("{} lies in", "Find {} in")
    assert fact.paraphrases == ("Where is Rome? Rome is in", "The Eternal City is in")
    assert fact.neighbours == (Probe("Milan is in"), Probe("Oslo is in", "Norway"))
    assert fact.portability == (Probe("The language of Rome is", "French"),)
    assert hash(fact) == hash(Fact.from_dict(fact.to_dict()))


def test_the_default_id_is_a_hash_of_what_is_edited():
    digest = hashlib.sha256(b"Rome\0{} is the capital of\0France").hexdigest()
    assert Fact(**ROME).id == "f" + digest[:10]
    assert Fact(**ROME, paraphrases=("Of what is Rome the capital?",)).id == Fact(**ROME).id
    assert Fact(**{**ROME, "target": "Spain"}).id != Fact(**ROME).id


def test_the_key_is_the_relation_or_else_the_prompt():
    assert Fact(**ROME).key == ("Rome", "{} is the capital of")
    assert Fact(**ROME, relation="P1376").key == ("Rome", "P1376")


def test_null_stands_for_a_field_left_out():
    blank = dict.fromkeys(("id", "old_answer", "relation", "paraphrases", *PROBES))
    assert Fact.from_dict(ROME | blank) == Fact(**ROME)


BAD = {
    "subject a number": ({"subject": 7}, ["subject must be text: write it in quotes", "int 7"]),
    "target a number": ({"target": 1969}, ["target must be text: write it in quotes", "1969"]),
    "target a bool": ({"target": True}, ["target must be text: write it in quotes", "bool True"]),
    "target not a number": (
        {"target": float("nan")},
        ["target must be text: write it in quotes", "nan"],
    ),
    "target a list": ({"target": ["a"]}, ["target must be text", "list"]),
    "target null": ({"target": None}, ["target is missing or empty"]),
    "subject empty": ({"subject": ""}, ["subject is empty"]),
    "target only blanks": ({"target": " \n "}, ["target is empty"]),
    "prompt empty": ({"prompt": " "}, ["prompt is empty"]),
    "no slot": ({"prompt": "Paris is in"}, ["prompt has no slot {}", "'Rome'", "'Paris is in'"]),
    "two slots": ({"prompt": "{} and {}"}, ["prompt has 2 slots", "exactly one"]),
    "subject twice": (
        {"prompt": "Rome is not Rome but"},
        ["prompt contains the subject 'Rome' more than once", "mark one"],
    ),
    "overlapping mentions": (
        {"subject": "anana", "prompt": "ananana is"},
        ["prompt contains the subject 'anana' more than once"],
    ),
    "slot in the subject": ({"subject": "a {} b"}, ["subject must not hold {}"]),
    "brace at the subject's end": ({"subject": "a {"}, ["subject must not", "end with {"]),
    "brace at the subject's start": ({"subject": "} a"}, ["subject must not", "begin with }"]),
    "second prompt without slot": (
        {"more_prompts": ["{} is", "this is"]},
        ["more_prompts[1] has no slot"],
    ),
    "old answer the target": (
        {"old_answer": "FRANCE "},
        ["target 'France' is the same as old_answer 'FRANCE'"],
    ),
    "old answer a number": ({"old_answer": 1.5}, ["old_answer must be text: write it in quotes"]),
    "relation empty": ({"relation": " "}, ["relation is empty"]),
    "nul": ({"target": "Fra\0nce"}, ["target holds the control character U+0000 at character 3"]),
    "escape": ({"prompt": "{} \x1b[1m"}, ["prompt holds the control character U+001B"]),
    "carriage return": ({"subject": "Rome\r"}, ["subject holds the control character U+000D"]),
    "C1 control": ({"target": "a\x85"}, ["target holds the control character U+0085"]),
    "lone surrogate": ({"target": "\ud83d"}, ["target holds the lone surrogate U+D83D"]),
    "nul in a paraphrase": ({"paraphrases": ["a", "\0"]}, ["paraphrases[1] holds the control"]),
    "paraphrases one text": ({"paraphrases": "Where is Rome?"}, ["paraphrases must be a list"]),
    "paraphrase a number": ({"paraphrases": [3]}, ["paraphrases[0] must be text: write it in"]),
    "neighbours a mapping": ({"neighbours": {"prompt": "a"}}, ["neighbours must be a list"]),
    "neighbour a number": ({"neighbours": ["a", 3]}, ["neighbours[1] must be text or a mapping"]),
    "neighbour without prompt": (
        {"neighbours": [{"answer": "a"}]},
        ["neighbours[0].prompt is missing"],
    ),
    "neighbour's answer a bool": (
        {"neighbours": [{"prompt": "a", "answer": False}]},
        ["neighbours[0].answer must be text: write it in quotes"],
    ),
    "neighbour's unknown field": (
        {"neighbours": [{"promt": "a"}]},
        ["unknown field neighbours[0].'promt' (did you mean 'prompt'?)"],
    ),
    "aliases without an answer": (
        {"neighbours": [{"prompt": "a", "aliases": ["b"]}]},
        ["neighbours[0].answer is missing", "as there are aliases"],
    ),
    "target aliases one text": ({"target_aliases": "a"}, ["target_aliases must be a list"]),
    "portability one text": ({"portability": "a"}, ["portability must be a list"]),
    "portability without answer": (
        {"portability": [{"prompt": "a", "answer": "b"}, {"prompt": "a"}]},
        ["portability[1].answer is missing"],
    ),
    "portability's unknown field": (
        {"portability": [{"prompt": "a", "anwser": "b"}]},
        ["unknown field portability[0].'anwser' (did you mean 'answer'?)"],
    ),
    "id a number": ({"id": 7}, ["id must be text: write it in quotes"]),
    "id of blanks": ({"id": " "}, ["id is empty"]),
    "id of two lines": ({"id": "a\nb"}, ["id must be one line"]),
    "id too long": ({"id": "x" * 201}, ["id has 201 characters", "at most 200"]),
    "unknown field": ({"taget": "x"}, ["unknown field 'taget' (did you mean 'target'?)"]),
    "unknown field, nothing near": ({"zzz": 1}, ["unknown field 'zzz'; expected subject, prompt"]),
    "unknown key a number": ({3: 1}, ["unknown field 3"]),
}


@pytest.mark.parametrize(("change", "expected"), BAD.values(), ids=BAD)
def test_refused(change, expected):
    with pytest.raises(FactError) as caught:
        Fact.from_dict(ROME | change)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("name", ROME)
def test_a_missing_field_is_named(name):
    record = {key: value for key, value in ROME.items() if key != name}
    with pytest.raises(FactError, match=f"^{name} is missing"):
        Fact.from_dict(record)


def test_aliases_leave_out_the_answer_itself():
    assert Fact(**ROME, target_aliases=("France", "Gaul", "Gaul ")).answers == ("France", "Gaul")
    assert Probe("a", "b ", ("b", "c")).aliases == ("c",)


def test_a_long_text_is_shortened_in_messages():
    with pytest.raises(FactError) as caught:
        Fact("Rome", "x" * 100_000, "France")
    assert len(str(caught.value)) < 400


def test_longest_id_is_accepted():
    assert Fact(**ROME, id="x" * 200).id == "x" * 200


def test_exit_codes():
    assert FactError("x").exit_code == NullEditError.exit_code == 2
    assert CheckFailed.exit_code == 1
