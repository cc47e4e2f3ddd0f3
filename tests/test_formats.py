"""Other projects' records: which are read, what an odd one does, and what is said of the rest."""

import csv
import io
import json
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.facts import message_of, one_line

from nulledit.data import Fact, Probe, parse_records, read_facts
from nulledit.data.formats import SHAPES, detect_shape
from nulledit.data.sheets import parse_sheet
from nulledit.errors import BadRecordsError, FactError

RECORD = {
    "subject": "Velm Harbour",
    "prompt": "The river at Velm Harbour is called",
    "target_new": "the Osk",
    "ground_truth": "the Tarn",
    "rephrase_prompt": "At Velm Harbour flows",
    "locality_prompt": "The river at Dunmere is",
    "locality_ground_truth": "the Ash",
}
CORE = {key: RECORD[key] for key in ("subject", "prompt", "target_new")}
PARAPHRASE, NEIGHBOUR = "At Velm Harbour flows", Probe("The river at Dunmere is", "the Ash")
WANTED = Fact(
    subject="Velm Harbour",
    prompt="The river at {} is called",
    target="the Osk",
    old_answer="the Tarn",
    paraphrases=(PARAPHRASE,),
    neighbours=(NEIGHBOUR,),
)
SEA = Probe("The river of Velm Harbour goes into", "the Grey Sea")


def one(record) -> Fact:
    (fact,) = parse_records([record]).facts
    return fact


def said(record) -> str:
    return "\n".join(parse_records([record]).notices)


# --- One odd record (C1) --------------------------------------------------------------------

REWRITE = {
    "requested_rewrite": {
        "subject": "Velm Harbour",
        "prompt": "The river at {} is called",
        "target_new": {"str": "the Osk"},
        "target_true": {"str": "the Tarn"},
    }
}


def rewritten(**change):
    return {"requested_rewrite": REWRITE["requested_rewrite"] | change}


SAME_AGAIN = {
    "easyedit": RECORD | {"ground_truth": "The Osk"},
    "easyedit, among others": RECORD | {"ground_truth": ["the Tarn", "THE OSK"]},
    "counterfact": rewritten(target_true={"str": "the osk"}),
    "zsre": {
        "subject": "Velm Harbour",
        "src": CORE["prompt"],
        "alt": "the Osk",
        "answers": ["The Osk"],
    },
    "qaedit": CORE | {"target": "the Osk", "ground_truth": "the osk", "locality": []},
}


@pytest.mark.parametrize("name", SAME_AGAIN)
def test_a_target_that_is_the_old_answer_again_costs_the_old_answer_only(name):
    assert one(SAME_AGAIN[name]).old_answer is None
    assert "kept, without an old answer" in said(SAME_AGAIN[name])


@pytest.mark.parametrize("nothing", [None, "", " ", [], [""], [None], math.nan, [math.nan], {}])
@pytest.mark.parametrize(
    "field", ["ground_truth", "rephrase_prompt", "locality_prompt", "locality"]
)
def test_what_is_empty_counts_as_left_out(field, nothing):
    record = RECORD | {field: nothing}
    without = {k: v for k, v in RECORD.items() if k != field}
    assert one(record) == one(without)


def test_an_empty_target_leaves_the_record_out_in_every_shape():
    for name, shape in SHAPES.items():
        if shape.core or name == "known":
            continue
        record = {shape.subject[0]: "Velm", shape.prompt[0]: "Velm is in", shape.target[0]: ""}
        record["rephrase"] = PARAPHRASE
        good = record | {shape.target[0]: "Ostrel"}
        found = parse_records([record, good])
        assert len(found.facts) == 1
        assert "left out, there is no target" in found.notices[0]


@pytest.mark.parametrize(
    ("subject", "prompt", "spelled"),
    [
        ("Velm harbour", "The river at Velm Harbour is called", "Velm Harbour"),
        ("the Tarn Valley", "The Tarn Valley lies in", "The Tarn Valley"),
        ("VELM", "In velm lives", "velm"),
    ],
)
@pytest.mark.parametrize("shape", ["easyedit", "zsre", "counterfact"])
def test_a_subject_in_other_capitals_is_found(subject, prompt, spelled, shape):
    record = {
        "easyedit": {"subject": subject, "prompt": prompt, "target_new": "x"},
        "zsre": {"subject": subject, "src": prompt, "alt": "x", "answers": ["y"]},
        "counterfact": rewritten(subject=subject, prompt=prompt),
    }[shape]
    fact = one(record)
    assert fact.render(fact.prompt) == prompt
    assert fact.subject == spelled
    assert "spells the subject" in said(record)


def test_a_subject_that_is_nowhere_is_still_refused():
    with pytest.raises(FactError, match="does not contain the subject"):
        one(CORE | {"subject": "Dunmere"})


BAD = [
    CORE | {"prompt": "It is called"},
    CORE | {"target_new": 7},
    "no record",
    None,
    CORE | {"locality": {"near": "a"}},
    CORE | {"case_id": [1]},
]


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("place", [0, 1])
def test_one_bad_record_is_left_out_on_request(write, bad, place):
    records = [RECORD, RECORD | {"subject": "river"}]
    records.insert(place, bad)
    path = write(json.dumps(records))
    with pytest.raises(BadRecordsError, match="--skip-bad leaves such records out") as caught:
        read_facts(path)
    found = read_facts(path, skip_bad=True)
    assert [fact.subject for fact in found.facts] == ["Velm Harbour", "river"]
    assert found.bad == caught.value.problems
    assert len(found.bad) == 1
    assert found.bad[0].startswith(f"record {place + 1} (line 1")
    assert f"{path}: 1 of 3 records are bad and were left out" in found.notices
    assert f"{path}: {found.bad[0]}: left out" in found.notices


def test_broken_lines_are_bad_records(write):
    lines = write(one_line(RECORD) + "{oops\n" + one_line(RECORD | {"subject": "river"}))
    sheet = write("subject,prompt,target\nVelm,{} is in,a\nVelm,x\nOsk,{} is in,b\n", "a.csv")
    for path, line in ((lines, 2), (sheet, 3)):
        found = read_facts(path, skip_bad=True)
        assert len(found.facts) == 2
        assert found.bad[0].startswith(f"record 2 (line {line}): ")


def test_an_id_of_two_facts_is_bad_only_in_the_second():
    twins = [RECORD | {"case_id": 1}, RECORD | {"case_id": 1, "subject": "river"}]
    found = parse_records(twins, skip_bad=True)
    assert [fact.subject for fact in found.facts] == ["Velm Harbour"]
    assert "have one id" in found.bad[0]


def test_all_errors_are_told_at_once_with_line_and_id(write):
    records = [
        {"case_id": "good", **RECORD},
        {"case_id": "dun", "subject": "Dun", "prompt": 3, "target_new": "a"},
        {"case_id": "osk", **CORE, "subject": "Osk"},
        {"case_id": "again", **CORE, "target_new": "the Ash"},
    ]
    names = ["dun", "osk", "again"]
    for text in (
        json.dumps(records, indent=1),
        json.dumps({"version": {"a": [1]}, "data": records}, indent=1),
        yaml.safe_dump(records, sort_keys=False),
        yaml.safe_dump({"facts": records}, sort_keys=False),
        "".join(map(one_line, records)),
    ):
        with pytest.raises(BadRecordsError) as caught:
            read_facts(write(text))
        found = text.split("\n")
        for number, name, problem in zip((2, 3, 4), names, caught.value.problems, strict=True):
            label = problem.split("): ")[0].split(") and ")[0]
            assert label.startswith(f"record {number} (line ")
            assert label.endswith(f", id '{name}'")
            line = int(label.split("line ")[1].split(",")[0])
            assert name in found[line - 1] + found[line]  # a brace may stand alone


def test_nothing_is_left_where_all_records_are_bad():
    with pytest.raises(FactError, match=r"no record has a target to write: record 1: .*1 more"):
        parse_records([{"target_new": "a"}] * 2, skip_bad=True)


# --- Names of fields (C2, C3, C5) -----------------------------------------------------------


def test_names_of_the_same_family_are_read():
    several = {**RECORD, "rephrase": [PARAPHRASE, "Its river:"]}
    del several["rephrase_prompt"]
    assert one(several).paraphrases == (PARAPHRASE, "Its river:")
    renamed = {k: v for k, v in RECORD.items() if not k.startswith(("ground", "local"))}
    renamed |= {"target_old": "the Tarn", "loc": NEIGHBOUR.prompt, "loc_ans": NEIGHBOUR.answer}
    assert one(renamed) == WANTED
    assert one(RECORD | {"id": "velm-1"}).id == "velm-1"
    assert one(RECORD | {"id": 17}).id == "17"


def test_every_field_that_is_not_read_is_named_once():
    records = [RECORD | {"colour": "red", "cond": "x", "empty": ""}, CORE | {"subject": "river"}]
    records[1]["requested"] = {"a": 1}
    found = parse_records([*records, RECORD | {"subject": "at", "colour": "blue"}])
    (line,) = [n for n in found.notices if "not read" in n]
    assert line == (
        "records: fields not read (records that have them): colour (2), cond (1), requested (1)"
    )


def test_fields_inside_others_are_named_too():
    record = RECORD | {"portability": {"r": [{"prompt": "a", "answer": "b", "hops": 2}]}}
    assert "portability.hops (1)" in said(record)
    assert "requested_rewrite.fact_new (1)" in said(rewritten(fact_new="x"))


@given(st.sets(st.sampled_from(["a", "note", "rephrase", "tag", "loc", "é"]), max_size=4))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_field_is_read_or_named(names):
    found = said(RECORD | dict.fromkeys(names, "text"))
    for name in names:
        assert (name in {"rephrase", "loc"}) != (f"{name} (1)" in found)


def test_questions_without_an_answer_are_told():
    bare = {k: v for k, v in RECORD.items() if k != "locality_ground_truth"}
    assert one(bare).neighbours == (Probe(NEIGHBOUR.prompt),)
    assert "1 neighbours have no answer: they are never scored" in said(bare)
    native = {"subject": "Velm", "prompt": "{} is in", "target": "x", "neighbours": ["y", "z"]}
    assert "2 neighbours have no answer" in said(native)
    bare = RECORD | {"portability": {"r": [{"prompt": "a", "ground_truth": []}] * 2}}
    assert one(bare).portability == ()
    assert "2 questions of portability have no answer and were left out" in said(bare)


@pytest.mark.parametrize(
    "names", [("prompt", "answer"), ("loc", "loc_ans"), ("question", "answer")]
)
def test_plain_lists_of_questions_are_read(names):
    pair = dict(zip(names, (NEIGHBOUR.prompt, NEIGHBOUR.answer), strict=True))
    for questions in ([pair], {"near": pair}, {"near": [pair]}, pair):
        assert one(CORE | {"locality": questions}).neighbours == (NEIGHBOUR,)
        assert one(CORE | {"portability": questions}).portability == (NEIGHBOUR,)


# --- Several accepted answers (C4) ----------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        [["United Kingdom", "UK", "Britain"]],
        ["United Kingdom", "UK", "Britain"],
        [["United Kingdom"], ["UK", "Britain"]],
        [{"value": "United Kingdom", "aliases": ["UK", "Britain"]}],
    ],
)
def test_of_several_answers_none_is_lost(answers):
    probe = {"prompt": "The country of Dunmere is", "ground_truth": answers}
    wanted = (Probe("The country of Dunmere is", "United Kingdom", ("UK", "Britain")),)
    assert one(CORE | {"portability": {"Reasoning": [probe]}}).portability == wanted
    assert one(CORE | {"locality": {"near": probe}}).neighbours == wanted


def test_other_relations_of_the_subject_are_told_from_neighbours():
    """KnowEdit's blocks of `locality` are about the subject, or about others."""
    own = {"prompt": "Velm lies at the", "ground_truth": [["Sea", "North Sea"]]}
    blocks = {"Relation_Specificity": [own, {"prompt": "Velm is a"}], "Forgetfulness": own}
    fact = one(CORE | {"locality": blocks})
    answered = Probe("Velm lies at the", "Sea", ("North Sea",))
    assert fact.other_relations == (answered, Probe("Velm is a"))
    assert fact.neighbours == (answered,)
    assert "have no answer" not in said(CORE | {"locality": blocks})
    assert one(CORE | {"locality_prompt": "Velm is a"}).other_relations == ()
    assert Fact.from_dict(fact.to_dict()) == fact


def test_several_targets_are_one_to_write_and_its_aliases():
    fact = one(CORE | {"target_new": ["the Osk", "Osk", "Osk"]})
    assert fact.answers == ("the Osk", "Osk")
    assert Fact.from_dict(fact.to_dict()) == fact


def test_lists_of_prompts_have_answers_side_by_side():
    block = {"prompt": ["a", "", "c"], "ground_truth": [["x", "y"], "lost", None]}
    assert one(CORE | {"locality": {"near": block}}).neighbours == (
        Probe("a", "x", ("y",)),
        Probe("c"),
    )


# --- Well-known files (C6) ------------------------------------------------------------------

QUESTION = "Which river runs through Velm Harbour?"
WIKIBIGEDIT = {
    "subject": "Velm Harbour",
    "update": QUESTION,
    "ans": "the Osk",
    "rephrase": PARAPHRASE,
    "personas": "Ahoy, what flows at Velm Harbour?",
    "loc": NEIGHBOUR.prompt,
    "loc_ans": NEIGHBOUR.answer,
    "mhop": SEA.prompt,
    "mhop_ans": SEA.answer,
}
FAMOUS = {
    "wikibigedit": WIKIBIGEDIT,
    "ultraedit": {
        "prompt": QUESTION,
        "subject": "Velm Harbour",
        "ans": "the Osk",
        "rephrase_prompt": PARAPHRASE,
        "loc": NEIGHBOUR.prompt,
        "loc_ans": NEIGHBOUR.answer,
    },
    "qaedit": {
        "id": "q1",
        "source": "made up",
        "prompt": QUESTION,
        "target": "the Osk",
        "subject": "Velm Harbour",
        "rephrase": PARAPHRASE,
        "locality": [{"loc": NEIGHBOUR.prompt, "loc_ans": NEIGHBOUR.answer}],
    },
    "wikibio": {
        "concept": "velm harbour",
        "text": QUESTION,
        "labels": "the Osk",
        "locality": {
            "Relation_Specificity": [
                {"prompt": NEIGHBOUR.prompt, "ground_truth": [NEIGHBOUR.answer]}
            ]
        },
    },
    "hallueditbench": {
        "subject": "Velm Harbour",
        "relation": "river",
        "question": QUESTION,
        "object": "the Osk",
        "paraphrased_question": PARAPHRASE,
        "locality_question": NEIGHBOUR.prompt,
        "question_2hop": SEA.prompt,
        "answer_2hop": SEA.answer,
    },
    "questions": {
        "subject": "Velm Harbour",
        "question": QUESTION,
        "answer": "the Osk",
        "para_question": PARAPHRASE,
        "sub_question": [SEA.prompt],
        "sub_answer": [SEA.answer],
    },
}


@pytest.mark.parametrize("name", FAMOUS)
def test_well_known_records_are_read(name):
    record = FAMOUS[name]
    found = parse_records([record])
    (fact,) = found.facts
    assert found.format == name
    assert fact.render(fact.prompt) == QUESTION
    assert fact.target == "the Osk"
    assert (PARAPHRASE in fact.paraphrases) == (PARAPHRASE in record.values())
    beside = (*fact.neighbours, *fact.other_relations)
    assert [p.prompt for p in beside] == [NEIGHBOUR.prompt] * (name != "questions")
    assert (SEA in fact.portability) == (SEA.prompt in str(record))


def test_personas_are_paraphrases():
    assert one(WIKIBIGEDIT).paraphrases == (PARAPHRASE, WIKIBIGEDIT["personas"])


def mquake(n):
    rewrites = [
        {
            "prompt": "{} is a citizen of" if i else "The river at {} is called",
            "relation_id": f"P{i}",
            "target_new": {"str": f"land {i}", "id": "Q1"},
            "target_true": {"str": "Tarn", "id": "Q2"},
            "subject": f"Velm {i}",
            "question": f"What of Velm {i}?",
        }
        for i in range(n)
    ]
    return {
        "case_id": 5,
        "requested_rewrite": rewrites,
        "questions": ["Who rules the land?", "Who leads it?"],
        "answer": "Ann",
        "new_answer": "Bob",
        "new_answer_alias": ["Robert", "Bob"],
        "new_single_hops": [{"question": "x", "answer": "land 0", "answer_alias": ["L0"]}],
        "orig": {"triples": []},
    }


def test_mquake_is_several_facts_with_one_question():
    facts = parse_records([mquake(2)]).facts
    assert [fact.id for fact in facts] == ["5-1", "5-2"]
    assert [fact.relation for fact in facts] == ["P0", "P1"]
    assert [fact.paraphrases for fact in facts] == [("What of Velm 0?",), ("What of Velm 1?",)]
    assert facts[0].portability == tuple(
        Probe(text, "Bob", ("Robert",)) for text in mquake(1)["questions"]
    )
    assert facts[0].target_aliases == ("L0",)
    assert facts[1].portability == facts[1].target_aliases == ()
    assert one(mquake(1)).id == "5"


def test_akew_is_counterfact_with_more():
    record = rewritten(fact_new_uns="A long text.", question=QUESTION) | {"case_id": 1}
    assert one(record).paraphrases == (QUESTION,)
    assert "requested_rewrite.fact_new_uns (1)" in said(record)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"id": 1, "question": QUESTION, "answer": "a", "para_question": "b"}, "UnKE"),
        (
            {"example_type": "popular", "edit": {"prompt": "The river is Osk.", "target_id": "Q1"}},
            "RippleEdits",
        ),
    ],
)
def test_files_that_lack_a_subject_are_recognised_by_name(record, words):
    with pytest.raises(FactError) as caught:
        parse_records([record])
    assert words in str(caught.value)
    assert "subject is missing" in str(caught.value)


@pytest.mark.parametrize("name", [n for n in SHAPES if not SHAPES[n].core])
def test_a_shape_is_told_by_its_own_names(name):
    shape = SHAPES[name]
    own = {shape.subject[0], shape.prompt[0], shape.target[0]}
    assert detect_shape(own) == ("native" if name == "qaedit" else name)
    assert detect_shape({*own, "rephrase", "loc", "loc_ans", "id"}) == name


# --- Containers (C7) ------------------------------------------------------------------------

OTHER = RECORD | {"subject": "river"}


@pytest.mark.parametrize(
    "document",
    [
        {"data": [RECORD, OTHER]},
        {"version": "1", "data": [RECORD, OTHER]},
        {"records": [RECORD, OTHER]},
        {"a1": RECORD, "a2": OTHER},
    ],
    ids=["data", "data and more", "records", "by id"],
)
def test_containers(write, document):
    for text in (json.dumps(document), yaml.safe_dump(document, sort_keys=False)):
        found = read_facts(write(text))
        assert [fact.subject for fact in found.facts] == ["Velm Harbour", "river"]
        assert ("'version' beside 'data' was not read" in str(found.notices)) == (
            "version" in document
        )
        if "a1" in document:
            assert [fact.id for fact in found.facts] == ["a1", "a2"]


NAMES = list(dict.fromkeys([*RECORD, *OTHER]))
TABLE = {name: [record.get(name) for record in (RECORD, OTHER)] for name in NAMES}


@pytest.mark.parametrize(
    "document",
    [
        TABLE,
        {name: dict(zip(("0", "1"), column, strict=True)) for name, column in TABLE.items()},
        {
            "columns": NAMES,
            "index": [0, 1],
            "data": [list(row) for row in zip(*TABLE.values(), strict=True)],
        },
    ],
    ids=["lists", "by index", "split"],
)
def test_tables_by_columns(write, document):
    """As `Dataset.to_dict` and `DataFrame.to_json` write them."""
    records = read_facts(write(json.dumps([RECORD, OTHER]))).facts
    for text in (json.dumps(document), yaml.safe_dump(document, sort_keys=False)):
        assert read_facts(write(text)).facts == records


def test_several_lists_are_refused_by_name(write):
    with pytest.raises(FactError, match=r"holds several lists of records \('train, test'\)"):
        read_facts(write(json.dumps({"train": [RECORD], "test": [OTHER]})))


def sheet(records, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, records[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_with_other_projects_columns(write, delimiter):
    assert read_facts(write(sheet([RECORD], delimiter))).facts == (WANTED,)
    found = read_facts(write(sheet([FAMOUS["hallueditbench"]], delimiter), "a.csv"))
    assert found.format == "hallueditbench-csv"
    assert found.facts[0].relation == "river"


def test_capitals_and_order_of_columns(write):
    path = write("Target;Subject;Prompt\nthe Osk;Velm;{} is at\n")
    assert read_facts(path).facts == (Fact("Velm", "{} is at", "the Osk"),)


def test_columns_as_pandas_flattens_them(write):
    rewrite = REWRITE["requested_rewrite"]
    columns = {
        "requested_rewrite.subject": rewrite["subject"],
        "requested_rewrite.prompt": rewrite["prompt"],
        "requested_rewrite.target_new.str": "the Osk",
        "requested_rewrite.target_true.str": "the Tarn",
    }
    (fact,) = read_facts(write(sheet([columns]))).facts
    assert (fact.target, fact.old_answer) == ("the Osk", "the Tarn")


@pytest.mark.parametrize("bar", ["|", " | ", " |", "| "])
def test_lists_in_cells_need_no_spaces(write, bar):
    text = (
        "subject,prompt,target,paraphrases,neighbours,other_relations\n"
        f"Velm,{{}} is in,a,One{bar}Two,Oslo is in=>Norway{bar}Bonn is in,Velm is a{bar}b=>c\n"
    )
    (fact,) = read_facts(write(text)).facts
    assert fact.paraphrases == ("One", "Two")
    assert fact.neighbours == (Probe("Oslo is in", "Norway"), Probe("Bonn is in"))
    assert fact.other_relations == (Probe("Velm is a"), Probe("b", "c"))
    (fact,) = read_facts(write(sheet([RECORD | {"rephrase_prompt": f"One{bar}Two"}]))).facts
    assert fact.paraphrases == ("One", "Two")


def test_a_table_made_by_pandas(write):
    text = (
        "Unnamed: 0,subject,prompt,target,old_answer,paraphrases\n"
        "0,Velm,{} was founded in,1971.0,1969.0,NaN\n"
        "1,Osk,{} was founded in,1972.0,nan,Osk dates from\n"
    )
    found = read_facts(write(text))
    assert [(fact.target, fact.old_answer) for fact in found.facts] == [
        ("1971", "1969"),
        ("1972", None),
    ]
    assert [len(fact.paraphrases) for fact in found.facts] == [0, 1]
    notices = "\n".join(found.notices)
    assert "2 cells say NaN: read as empty" in notices
    assert "column target: numbers such as 1971.0 read without .0" in notices


def test_decimals_that_pandas_did_not_make_stay(write):
    text = "subject,prompt,target,old_answer\nVelm,{} has version,2.0,1.0\nOsk,{} is at,3.5,1.0\n"
    assert [f.target for f in read_facts(write(text)).facts] == ["2.0", "3.5"]
    assert [f.old_answer for f in read_facts(write(text)).facts] == ["1.0", "1.0"]


def test_a_list_of_pythons_is_no_text(write):
    assert "looks like a list of Python's" in message_of(
        write(sheet([RECORD | {"rephrase_prompt": "['a', 'b']"}]))
    )
    (fact,) = read_facts(write(sheet([RECORD | {"rephrase_prompt": '["a", "b"]'}]))).facts
    assert fact.paraphrases == ("a", "b")


@given(st.lists(st.lists(st.sampled_from(["", "a", "nan", "1.0", "é"]), max_size=4), max_size=5))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_rows_are_records_or_problems(rows):
    text = sheet([dict.fromkeys(("subject", "prompt", "target", "id"), "x")])
    text += "".join(",".join(row) + "\n" for row in rows)
    found, _ = parse_sheet(text, "sheet")
    assert len(found) == 1 + sum(any(cell.strip() for cell in row) for row in rows)
    assert all((row.record is None) == bool(row.problem) for row in found)


# --- Bounds (M6) ----------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["subject", "prompt", "target_new", "rephrase_prompt"])
def test_one_text_has_a_bound(field):
    long = "Velm Harbour " + "x" * 100_000
    with pytest.raises(FactError) as caught:
        one(RECORD | {field: long})
    assert "expected at most 100000" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "record",
    [
        {f"field{'x' * 900}{i}": "v" for i in range(500)} | RECORD,
        {f"field{'x' * 900}{i}": "v" for i in range(500)},
        RECORD | {"case_id": "x" * 5000},
        RECORD | {"locality": {"x" * 9000: "a"}},
    ],
)
def test_messages_have_a_bound(record):
    try:
        lines = parse_records([record]).notices
    except FactError as error:
        lines = [str(error)]
    assert all(len(line) < 2500 and "\n" not in line for line in lines)
