"""Facts files: one fact in every format, every bad file in one line, repetitions, conflicts."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from support.facts import (
    COUNTERFACT,
    EASYEDIT,
    EASYEDIT_NESTED,
    FACT,
    FOREIGN,
    OSLO,
    ROME,
    WRITTEN,
    ZSRE,
    facts,
    message_of,
    one_line,
)

from nulledit.data import Fact, Probe, parse_records, read_facts, readers
from nulledit.errors import FactError

# --- Formats --------------------------------------------------------------------------------


IGNORED = {
    "counterfact": ("generation_prompts", "pararel_idx"),
    "zsre": ("cond",),
}


def unread(source, shape) -> tuple[str, ...]:
    """The notice of what is not read in one record of the shapes above."""
    names = ", ".join(f"{name} (1)" for name in IGNORED.get(shape, ()))
    return (f"{source}: fields not read (records that have them): {names}",) if names else ()


@pytest.mark.parametrize("name", ["facts.txt", "facts.json", "facts.yaml", "facts"])
@pytest.mark.parametrize(("format", "text"), WRITTEN.items(), ids=WRITTEN)
def test_every_format_gives_the_same_fact_whatever_the_name(write, format, text, name):
    path = write(text, name)
    found = read_facts(path)
    assert found.facts == (FACT,)
    assert (found.format, found.notices) == (format, unread(path, format.split("-")[0]))


@pytest.mark.parametrize(("shape", "record"), FOREIGN.items(), ids=FOREIGN)
def test_json_lines_carry_every_shape(write, shape, record):
    other = json.loads(json.dumps(record).replace('"17"', "17").replace("17", "18"))
    rewrite = other.get("requested_rewrite", other)
    rewrite["subject"] = "大阪"
    for name in ("prompt", "src"):
        if name in rewrite:
            rewrite[name] = FACT.prompt
    found = read_facts(write(one_line(record) + "\n" + one_line(other)))
    assert found.facts[0] == FACT
    assert [fact.id for fact in found.facts] == ["17", "18"]
    assert found.format == shape.split()[0] + "-jsonl"


def test_native_json_lines(write):
    # U+2028 ends a line for str.splitlines, but not in JSON.
    odd = ROME | {"target": "a\u2028b"}
    found = read_facts(write(one_line(odd) + one_line(OSLO)))
    assert found.facts == (Fact(**odd), Fact(**OSLO))
    assert found.format == "native-jsonl"


@given(facts())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_native_yaml_and_json_lose_nothing(tmp_path_factory, fact):
    folder = tmp_path_factory.mktemp("facts")
    for name, text in {
        "a.yaml": yaml.safe_dump([fact.to_dict()], allow_unicode=True),
        "a.json": json.dumps([fact.to_dict()]),
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
        assert read_facts(folder / name).facts == (fact,)


@pytest.mark.parametrize("record", [FACT.to_dict(), *FOREIGN.values()], ids=["native", *FOREIGN])
def test_records_in_memory_read_the_same(record):
    assert parse_records([record]).facts == (FACT,)


def test_one_fact_alone_needs_no_list(write):
    assert read_facts(write(yaml.safe_dump(ROME))).facts == (Fact(**ROME),)
    assert read_facts(write(json.dumps(ROME, indent=1))).facts == (Fact(**ROME),)


def test_flow_style_yaml_by_its_name(write):
    text = "[{subject: Rome, prompt: '{} is the capital of', target: France}]"
    assert read_facts(write(text, "facts.yaml")).facts == (Fact(**ROME),)
    assert "broken JSON" in message_of(write(text, "facts.json"))


def test_yaml_text_may_be_tagged_as_text(write):
    text = "- {subject: Rome, prompt: '{} is the capital of', target: !!str 1969}"
    assert read_facts(write(text)).facts[0].target == "1969"


def test_csv_lists_and_blank_cells(write):
    text = (
        "\ufeffsubject,prompt,target,id,paraphrases,neighbours\r\n"
        '"Rome, Italy",{} is in,1969,,One | Two,Oslo is in => Norway | Bonn is in\r\n'
        ",,,,,\r\n"
        'Bonn,"{} lies\r\nin",yes,b,,\r\n'
    )
    rome, bonn = read_facts(write(text)).facts
    assert (rome.subject, rome.target, rome.id[0]) == ("Rome, Italy", "1969", "f")
    assert rome.paraphrases == ("One", "Two")
    assert rome.neighbours == (Probe("Oslo is in", "Norway"), Probe("Bonn is in"))
    assert bonn == Fact("Bonn", "{} lies\nin", "yes", id="b")


def test_counterfact_relation_and_neighbours():
    rewrite = COUNTERFACT["requested_rewrite"] | {"relation_id": "P17"}
    record = COUNTERFACT | {"requested_rewrite": rewrite, "neighborhood_prompts": ["a", "b"]}
    (fact,) = parse_records([record]).facts
    assert fact.portability == ()
    assert fact.key == ("東京", "P17")
    assert fact.neighbours == (Probe("a", "Japan"), Probe("b", "Japan"))


FOLLOWING = (Probe("Its money is the", "franc"), Probe("Its tongue is", "French"))
PORTABILITY = {
    "beside the prompt": {
        "portability_prompt": [probe.prompt for probe in FOLLOWING],
        "portability_ground_truth": [probe.answer for probe in FOLLOWING],
    },
    "named blocks": {
        "portability": {
            "one_hop": {"prompt": FOLLOWING[0].prompt, "ground_truth": FOLLOWING[0].answer},
            "two_hop": {"prompt": [FOLLOWING[1].prompt], "ground_truth": [FOLLOWING[1].answer]},
        }
    },
    "KnowEdit": {
        "portability": {
            "Reasoning": [
                {"prompt": FOLLOWING[0].prompt, "ground_truth": [["franc", "the franc"], ["euro"]]},
                {"prompt": "nobody knows", "ground_truth": []},
            ],
            "Logical_Generalization": [],
            "Subject_Aliasing": [{"prompt": FOLLOWING[1].prompt, "ground_truth": "French"}],
        },
        "locality": {
            "Forgetfulness": [{"prompt": "大阪 lies in", "ground_truth": [["Japan", "Nippon"]]}]
        },
        "locality_prompt": None,
        "locality_ground_truth": None,
    },
}


@pytest.mark.parametrize("name", PORTABILITY)
def test_easyedits_portability(name):
    (fact,) = parse_records([EASYEDIT | PORTABILITY[name]]).facts
    assert [(p.prompt, p.answer) for p in fact.portability] == [
        (p.prompt, p.answer) for p in FOLLOWING
    ]


def test_zsre_with_the_portability_question_of_easyedit():
    more = {"Recalled Relation": "x", "New Question": "Its money is the", "New Answer": "franc"}
    (fact,) = parse_records([ZSRE | {"portability": more}]).facts
    assert fact == replace(FACT, portability=FOLLOWING[:1])


def test_portability_in_csv(write):
    text = "subject,prompt,target,portability\nRome,{} is in,France,One => two | Three => four\n"
    (fact,) = read_facts(write(text)).facts
    assert fact.portability == (Probe("One", "two"), Probe("Three", "four"))
    short = write(text.replace(" => four", ""))
    assert message_of(short) == "record 1 (line 2): portability[1].answer is missing or empty: " + (
        "expected text; --skip-bad leaves such records out"
    )


def test_a_record_with_little_but_portability_is_told_apart():
    probes = [{"prompt": "Its money is the", "answer": "franc"}]
    assert parse_records([ROME | {"portability": probes}]).format == "native"
    core = {"subject": "Rome", "prompt": "Rome is in", "target_new": "France"}
    assert parse_records([core | PORTABILITY["KnowEdit"]]).format == "easyedit"


def test_the_unrelated_question_of_zsre_gets_its_question_mark():
    for raw in ("nq question: who wrote it", "nq question: who wrote it?"):
        (fact,) = parse_records([ZSRE | {"loc": raw}]).facts
        assert fact.neighbours == (Probe("nq question: who wrote it?", "Japan"),)


@pytest.mark.parametrize("shape", FOREIGN)
def test_probes_and_case_ids_may_be_missing(shape):
    probes = ("paraphrase_prompts", "neighborhood_prompts", "rephrase_prompt", "rephrase", "loc")
    probes += ("locality", "locality_prompt", "locality_ground_truth", "loc_ans", "case_id")
    record = {k: v for k, v in FOREIGN[shape].items() if k not in probes}
    (fact,) = parse_records([record]).facts
    assert fact == Fact(FACT.subject, FACT.prompt, FACT.target, old_answer="Japan")


@pytest.mark.parametrize("record", [EASYEDIT, ZSRE], ids=["easyedit", "zsre"])
def test_of_several_mentions_in_a_foreign_prompt_the_first_is_taken(record):
    field = "prompt" if "prompt" in record else "src"
    found = parse_records([record | {field: "東京 or 東京 is in"}])
    assert found.facts[0].prompt == "{} or 東京 is in"
    notice = found.notices[0]
    assert (
        notice
        == f"records: record 1 (id '17'): {field} contains the subject '東京' more than once: "
        + ("the first is taken")
    )


def test_zsre_without_a_new_answer():
    same, empty = ZSRE | {"alt": "japan"}, ZSRE | {"alt": "", "case_id": "18"}
    found = parse_records([same, empty])
    assert [(fact.target, fact.old_answer) for fact in found.facts] == [("japan", None)]
    assert found.notices[:2] == (
        "records: record 1 (id '17'): alt is the old answer 'Japan': kept, without an old answer",
        "records: record 2 (id '18'): alt is empty: left out, there is no target",
    )
    with pytest.raises(FactError, match="no record has a target"):
        parse_records([empty])


# --- Bad files ------------------------------------------------------------------------------

GOOD_LINE = one_line(ROME)
DEEP = 100_000
BAD_FILES = {
    "empty": ("", ["the file is empty"]),
    "only blanks": (" \n\n", ["the file is empty"]),
    "byte order mark alone": (b"\xef\xbb\xbf", ["the file is empty"]),
    "no records, JSON": ("[]", ["holds no facts"]),
    "no records, YAML": ("facts: []", ["holds no facts"]),
    "no records, comments": ("# facts\n", ["holds no facts"]),
    "no records, CSV": ("subject,prompt,target\n", ["holds no facts"]),
    "facts null": ("facts:\n", ["expected a list of facts", "NoneType"]),
    "facts no list": ("facts: {}\n", ["facts: expected a list of facts (found dict {})"]),
    "random bytes": (bytes(range(256)), ["not UTF-8 text", "0x80 at offset 128"]),
    "UTF-16": ("[]".encode("utf-16"), ["not UTF-8 text", "0xFF at offset 0"]),
    "control bytes": (b"ab\n\x00\x01\x02", ["line 2", "not a text file", "U+0000"]),
    "plain text": ("Rome is in France", ["expected a list of facts", "'Rome is in France'"]),
    "a number": ("17", ["expected a list of facts", "int 17"]),
    "other key": ("fact:\n- a\n", ["'facts'", "did you mean 'facts'?"]),
    "key beside facts": ("facts: [a]\nmodel: b\n", ["unknown key 'model' beside 'facts'"]),
    "broken YAML": ("- subject: Rome\n  prompt: 'x\n", ["line 3", "broken YAML"]),
    "YAML indentation": ("- subject: Rome\n   prompt: x\n", ["line 2", "broken YAML"]),
    "YAML tag": (
        "- subject: a\n- !!python/object/apply:os.system ['exit 3']\n",
        ["line 2", "broken YAML", "tags are not allowed", "python/object"],
    ),
    "YAML tag PyYAML trips over": ("- !!timestamp a\n", ["line 1", "tags are not allowed"]),
    "YAML aliases": ("- &a {subject: x}\n- *a\n", ["line 2", "aliases (*a) are not allowed"]),
    "YAML alias bomb": (
        "a: &a [x,x]\n" + "".join(f"{q}: &{q} [*{p},*{p}]\n" for p, q in pairwise("abcdefg")),
        ["line 2", "aliases"],
    ),
    "deep YAML": ("- " * DEEP, ["line 1", "nested deeper than 20"]),
    "deep YAML in flow": ("- " + "[" * DEEP + "]" * DEEP, ["line 1", "nested deeper than 20"]),
    "YAML key twice": (
        "- subject: Rome\n  target: a\n  target: b\n",
        ["line 3", "the key 'target' stands twice"],
    ),
    "YAML date that is none": ("- target: 2021-13-45\n", ["broken YAML", "month"]),
    "YAML documents": ("- a\n---\n- b\n", ["line 2", "broken YAML", "another document"]),
    "YAML number": (
        "- {subject: Rome, prompt: '{} is', target: 1969}\n",
        ["record 1", "target must be text: write it in quotes", "1969"],
    ),
    "YAML bool": (
        "- {subject: Rome, prompt: '{} is', target: yes}\n",
        ["record 1", "target must be text: write it in quotes", "True"],
    ),
    "YAML date": (
        "- {subject: Rome, prompt: '{} is', target: 1969-07-20}\n",
        ["record 1", "target must be text: write it in quotes", "date"],
    ),
    "YAML empty field": (
        "- subject: Rome\n  prompt: '{} is'\n  target:\n",
        ["record 1", "target is missing or empty"],
    ),
    "YAML escaped nul": (
        '- {subject: Rome, prompt: "{} is", target: "a\\0"}\n',
        ["record 1", "target holds the control character U+0000"],
    ),
    "broken JSON": ('[\n{"subject": "Rome",}\n]', ["line 2", "broken JSON"]),
    "JSON cut off": ('[{"subject": "Rome"}', ["line 1", "broken JSON"]),
    "JSON and more": ("[]\n[]", ["line 2", "broken JSON", "Extra data"]),
    "deep JSON": ("[" * DEEP, ["broken JSON", "nested too deeply"]),
    "deep JSON line": (
        GOOD_LINE + '{"subject":' * DEEP,
        ["record 2 (line 2)", "nested too deeply"],
    ),
    "JSON key twice": ('[{"target": "a", "target": "b"}]', ["the key 'target' stands twice"]),
    "JSON long number": ("[" + "1" * 5000 + "]", ["broken JSON", "4300 digits"]),
    "JSON NaN": (
        json.dumps([ROME, OSLO | {"target": float("nan")}]),
        ["record 2", "target must be text: write it in quotes", "nan"],
    ),
    "JSON surrogate": (
        json.dumps([ROME | {"subject": "\ud800"}]),
        ["record 1", "subject holds the lone surrogate U+D800"],
    ),
    "JSON nul": (
        json.dumps([ROME, ROME | {"prompt": "{} \0"}]),
        ["record 2", "prompt holds the control character U+0000"],
    ),
    "JSON records not mappings": ('["a"]', ["record 1", "expected a mapping", "str 'a'"]),
    "broken JSON line": (GOOD_LINE + "\n{oops\n", ["record 2 (line 3)", "broken JSON"]),
    "JSON line not a mapping": (GOOD_LINE + "[1]\n", ["record 2 (line 2)", "expected a mapping"]),
    "JSON line lacks a field": (
        GOOD_LINE + '{"subject": "Rome", "prompt": "{} is"}',
        ["record 2 (line 2)", "target is missing"],
    ),
    "unknown field": (
        json.dumps([ROME, ROME | {"paraphrase": []}]),
        ["record 2", "unknown field 'paraphrase' (did you mean 'paraphrases'?)"],
    ),
    "CSV too many columns": (
        "subject,prompt,target\nRome,{} is,a\nRome, that is,{} lies in,France\n",
        ["record 2 (line 3)", "found 4 columns, expected 3"],
    ),
    "CSV too few columns": (
        "subject,prompt,target\nRome,{} is\n",
        ["record 1 (line 2)", "found 2 columns, expected 3"],
    ),
    "CSV header lacks a column": ("subject,prompt\na,b\n", ["line 1", "no column target"]),
    "CSV unknown column": (
        "subject,prompt,target,paraphrase\n",
        ["line 1", "unknown column 'paraphrase' (did you mean 'paraphrases'?)"],
    ),
    "CSV column twice": ("subject,prompt,target,target\n", ["line 1", "'target' stands twice"]),
    "CSV open quote": ('subject,prompt,target\nRome,"{} is,a\n', ["line 2", "broken CSV"]),
    "CSV text after a quote": (
        'subject,prompt,target\n"Rome" x,{} is,a\n',
        ["line 2", "broken CSV"],
    ),
    "CSV huge cell": (
        "subject,prompt,target\nRome,{} is," + "x" * 200_000,
        ["line 2", "broken CSV", "field larger"],
    ),
    "CSV empty cell": (
        "subject,prompt,target\nRome,{} is, \n",
        ["record 1 (line 2)", "target is empty"],
    ),
    "CSV nul": (
        "subject,prompt,target\nRome,{} is,a\0\n",
        ["record 1 (line 2)", "target holds the control character U+0000"],
    ),
}


@pytest.mark.parametrize(("content", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(write, content, expected):
    message = message_of(write(content))
    for part in expected:
        assert part in message


def test_csv_without_a_header(write):
    path = write("Rome,{} is the capital of,France\n", "facts.csv")
    assert message_of(path).startswith("line 1: the header has no column subject")


def test_missing_file_and_folder(tmp_path):
    assert message_of(tmp_path / "no.json") == "no such file"
    assert message_of(tmp_path).startswith("is a folder")


def test_a_huge_file_is_refused_unread(write, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BYTES", 10)
    assert message_of(write("x" * 11)) == "has 11 bytes: expected at most 10"


def without(record, *path):
    """A deep copy of `record` that lacks the field at `path`."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return copy


def rewritten(**change):
    return COUNTERFACT | {"requested_rewrite": COUNTERFACT["requested_rewrite"] | change}


BAD_RECORDS = {
    "counterfact, no rewrite": (
        without(COUNTERFACT, "requested_rewrite"),
        ["requested_rewrite is missing"],
    ),
    "counterfact, rewrites no mappings": (
        COUNTERFACT | {"requested_rewrite": [1]},
        ["requested_rewrite[0] must be a mapping"],
    ),
    "counterfact, no subject": (
        without(COUNTERFACT, "requested_rewrite", "subject"),
        ["requested_rewrite.subject is missing"],
    ),
    "counterfact, no target": (
        without(COUNTERFACT, "requested_rewrite", "target_new", "str"),
        ["requested_rewrite.target_new must be text"],
    ),
    "counterfact, empty subject": (
        rewritten(subject=" "),
        ["requested_rewrite.subject is empty"],
    ),
    "counterfact, no slot": (
        rewritten(prompt="this lies in"),
        ["requested_rewrite.prompt has no slot"],
    ),
    "counterfact, relation a number": (rewritten(relation_id=17), ["relation must be text"]),
    "counterfact, paraphrase a number": (
        COUNTERFACT | {"paraphrase_prompts": ["a", 1]},
        ["paraphrase_prompts[1] must be text"],
    ),
    "counterfact, id a bool": (COUNTERFACT | {"case_id": True}, ["case_id must be text"]),
    "easyedit, no subject in the prompt": (
        EASYEDIT | {"prompt": "this lies in"},
        ["prompt has no slot {} and does not contain the subject '東京'"],
    ),
    "easyedit, two slots": (EASYEDIT | {"prompt": "{} {}"}, ["prompt has 2 slots"]),
    "easyedit, no target": (without(EASYEDIT, "target_new"), ["target_new is missing"]),
    "easyedit, target a number": (
        EASYEDIT | {"target_new": 1969},
        ["target_new must be text: write it in quotes"],
    ),
    "easyedit, nul": (
        EASYEDIT | {"rephrase_prompt": "a\0"},
        ["rephrase_prompt holds the control character U+0000"],
    ),
    "easyedit, locality a list of texts": (
        EASYEDIT_NESTED | {"locality": ["a"]},
        ["locality[0] must be a mapping"],
    ),
    "easyedit, locality without blocks": (
        EASYEDIT_NESTED | {"locality": {"near": "a"}},
        ["locality['near'] must be a mapping"],
    ),
    "easyedit, answers of other number": (
        EASYEDIT_NESTED | {"locality": {"ne\nar": {"prompt": ["a", "b"], "ground_truth": "c"}}},
        ["locality['ne\\nar'].ground_truth has 1 texts and locality['ne\\nar'].prompt 2"],
    ),
    "easyedit, locality items of other kind": (
        EASYEDIT_NESTED | {"locality": {"near": [{"prompt": "a"}, "b"]}},
        ["locality['near'][1] must be a mapping"],
    ),
    "easyedit, portability a text": (
        EASYEDIT | {"portability": "a"},
        ["portability must be a mapping"],
    ),
    "easyedit, portability's answer a number": (
        EASYEDIT | {"portability": {"r": [{"prompt": "a", "ground_truth": [[7]]}]}},
        ["portability['r'][0].ground_truth[0][0] must be text"],
    ),
    "zsre, no question": (without(ZSRE, "src"), ["src is missing"]),
    "zsre, no alt": (without(ZSRE, "alt"), ["alt is missing"]),
    "zsre, answer a number": (ZSRE | {"answers": [1]}, ["answers[0] must be text"]),
    "zsre, no subject in the question": (ZSRE | {"src": "Where?"}, ["src has no slot"]),
    "native, a slot too many": (ROME | {"prompt": "{} {}"}, ["prompt has 2 slots"]),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named(write, name):
    record, expected = BAD_RECORDS[name]
    message = message_of(write(json.dumps([record])))
    assert message.startswith("record 1 (line 1")
    for part in expected:
        assert part in message
    good = FOREIGN.get(name.split(",")[0], ROME)
    assert message_of(write(one_line(good) + one_line(record))).startswith("record 2 (line 2")


# --- Repetitions and contradictions ---------------------------------------------------------


def test_a_repetition_is_dropped_with_a_notice_that_names_both(write):
    again = ROME | {"id": "again", "subject": " Rome ", "paraphrases": ["x"]}
    path = write(json.dumps([ROME | {"id": "a"}, OSLO, again]))
    found = read_facts(path)
    assert found.facts == (Fact(**ROME, id="a"), Fact(**OSLO))
    assert found.notices == (
        f"{path}: record 3 (line 1, id 'again') repeats record 1 (line 1, id 'a'): dropped",
    )


CONFLICT = [
    ROME | {"id": "a"},
    OSLO | {"id": "b"},
    ROME | {"id": "c", "target": "Spain"},
    ROME | {"id": "d"},
]


def test_a_contradiction_names_both_records_and_the_way_out(write):
    message = message_of(write(json.dumps(CONFLICT)))
    assert message == (
        "record 3 (line 1, id 'c') and record 1 (line 1, id 'a') contradict: "
        "for the subject 'Rome' and the prompt "
        "'{} is the capital of' they say 'Spain' and 'France'; give --on-conflict first or last"
    )
    more = [*CONFLICT, ROME | {"id": "e", "target": "Peru"}]
    assert message_of(write(json.dumps(more))).endswith("first or last (1 more like it)")


@pytest.mark.parametrize(
    ("on_conflict", "kept", "dropped"),
    [
        ("first", ["a", "b"], ["id 'd') repeats record 1 (line 1, id 'a'", "id 'c') is dropped"]),
        ("last", ["b", "d"], ["id 'a') repeats record 4 (line 1, id 'd'", "id 'c') is dropped"]),
    ],
)
def test_on_conflict_decides(write, on_conflict, kept, dropped):
    found = read_facts(write(json.dumps(CONFLICT)), on_conflict=on_conflict)
    assert [fact.id for fact in found.facts] == kept
    assert len(found.notices) == 2
    for notice, part in zip(found.notices, dropped, strict=True):
        assert part in notice


def test_one_relation_under_two_prompts():
    first = ROME | {"relation": "capital of"}
    other = first | {"prompt": "The country of {} is"}
    assert len(parse_records([first, other]).facts) == 2
    with pytest.raises(FactError, match="the relation 'capital of'"):
        parse_records([first, other | {"target": "Spain"}])


def test_case_counts():
    records = [ROME, ROME | {"target": "france"}]
    with pytest.raises(FactError, match="contradict"):
        parse_records(records)


def test_one_id_for_two_facts():
    with pytest.raises(FactError, match=r"record 2 .* and record 1 .* have one id, 'a'"):
        parse_records([ROME | {"id": "a"}, OSLO | {"id": "a"}])
    same = [ROME | {"id": "a"}, ROME | {"id": "a"}]
    assert len(parse_records(same).facts) == 1


def test_counts_agree_with_a_plain_count():
    """Many records with few subjects: what is dropped agrees with sets and dictionaries."""
    records = [
        {"subject": f"s{i * 7 % 11}", "prompt": "{} is in", "target": f"t{i * 5 % 3}"}
        for i in range(60)
    ]
    for choice, order in (("first", records[::-1]), ("last", records)):
        winners = {record["subject"]: record["target"] for record in order}  # the last one stays
        found = parse_records(records, on_conflict=choice)
        assert {fact.subject: fact.target for fact in found.facts} == winners
        assert len(found.facts) + len(found.notices) == len(records)


# --- Selection ------------------------------------------------------------------------------


def test_skip_and_limit_come_first(write):
    path = write(json.dumps([*CONFLICT, {"broken": 1}]))
    assert [fact.id for fact in read_facts(path, limit=2).facts] == ["a", "b"]
    found = read_facts(path, skip=1, limit=2)
    assert ([fact.id for fact in found.facts], found.notices) == (["b", "c"], ())
    assert message_of(path, skip=4).startswith("record 5 (line 1): unknown field 'broken'")
    assert message_of(path, skip=5) == "has 5 records: skipping 5 leaves none"


@pytest.mark.parametrize("bad", [{"skip": -1}, {"limit": 0}, {"on_conflict": "second"}])
def test_slips_of_the_caller_are_value_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        parse_records([ROME], **bad)


@pytest.mark.parametrize("records", [[], {"facts": []}, "facts.json"])
def test_records_that_are_no_list(records):
    with pytest.raises(FactError, match=r"^cases: "):
        parse_records(records, source="cases")
