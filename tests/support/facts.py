"""Any fact there can be, and one fact in every format that is read."""

import csv
import io
import json

import pytest
import yaml
from hypothesis import strategies as st

from nulledit.data import Fact, Probe, read_facts
from nulledit.errors import FactError

# Words without slots or control characters; braces, pipes and other scripts are welcome.
letters = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp"))


texts = (
    st.lists(st.text(letters, min_size=1, max_size=6), min_size=1, max_size=4)
    .map(" ".join)
    .map(str.strip)
    .filter(lambda text: text and "{}" not in text)
)


subjects = texts.filter(lambda text: not (text.startswith("}") or text.endswith("{")))


templates = st.builds("{} {{}} {}".format, texts, texts)


optional = st.none() | texts


lists = st.lists(texts, max_size=3).map(tuple)


@st.composite
def facts(draw):
    target = draw(texts)
    return Fact(
        subject=draw(subjects),
        prompt=draw(templates),
        target=target,
        id=draw(st.just("") | texts),
        old_answer=draw(st.none() | texts.filter(lambda t: t.casefold() != target.casefold())),
        relation=draw(optional),
        more_prompts=tuple(draw(st.lists(templates, max_size=2))),
        paraphrases=draw(lists),
        neighbours=tuple(draw(st.lists(st.builds(Probe, texts, optional), max_size=3))),
        other_relations=tuple(draw(st.lists(st.builds(Probe, texts, optional), max_size=3))),
        portability=tuple(draw(st.lists(st.builds(Probe, texts, texts, lists), max_size=2))),
        target_aliases=draw(lists),
    )


ROME = {"subject": "Rome", "prompt": "{} is the capital of", "target": "France"}


OSLO = {"subject": "Oslo", "prompt": "{} is the capital of", "target": "Spain"}


FACT = Fact(
    subject="東京",
    prompt="In {braces} and 100%, {} lies in",
    target='"Fra, nce"',
    id="17",
    old_answer="Japan",
    paraphrases=("Where is 東京? In",),
    neighbours=(Probe("大阪 lies in", "Japan"),),
)


TEXT = FACT.render(FACT.prompt)


def as_csv(fact: Fact) -> str:
    record = fact.to_dict()
    for name in ("more_prompts", "paraphrases"):
        if name in record:
            record[name] = " | ".join(record[name])
    if "neighbours" in record:
        record["neighbours"] = " | ".join(
            " => ".join(probe.values()) for probe in record["neighbours"]
        )
    out = io.StringIO()
    writer = csv.DictWriter(out, record)
    writer.writeheader()
    writer.writerow(record)
    return out.getvalue()


COUNTERFACT = {
    "case_id": 17,
    "pararel_idx": 4,
    "requested_rewrite": {
        "prompt": FACT.prompt,
        "relation_id": "",
        "subject": FACT.subject,
        "target_new": {"str": FACT.target, "id": "Q1"},
        "target_true": {"str": "Japan", "id": "Q2"},
    },
    "paraphrase_prompts": list(FACT.paraphrases),
    "neighborhood_prompts": ["大阪 lies in"],
    "generation_prompts": ["ignored"],
}


EASYEDIT_CORE = {
    "case_id": 17,
    "prompt": TEXT,
    "subject": FACT.subject,
    "target_new": FACT.target,
    "ground_truth": "Japan",
    "rephrase_prompt": FACT.paraphrases[0],
}


EASYEDIT = EASYEDIT_CORE | {
    "locality_prompt": "大阪 lies in",
    "locality_ground_truth": "Japan",
}


EASYEDIT_NESTED = EASYEDIT_CORE | {
    "ground_truth": ["Japan", "Nippon"],
    "rephrase_prompt": list(FACT.paraphrases),
    "locality": {"neighborhood": {"prompt": ["大阪 lies in"], "ground_truth": ["Japan"]}},
}


ZSRE = {
    "case_id": "17",
    "subject": FACT.subject,
    "src": TEXT,
    "alt": FACT.target,
    "answers": ["Japan", "Nippon"],
    "rephrase": FACT.paraphrases[0],
    "loc": "大阪 lies in",
    "loc_ans": "Japan",
    "cond": "ignored",
}


FOREIGN = {
    "counterfact": COUNTERFACT,
    "easyedit": EASYEDIT,
    "easyedit nested": EASYEDIT_NESTED,
    "zsre": ZSRE,
}


def one_line(record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


WRITTEN = {
    "native-yaml": yaml.safe_dump([FACT.to_dict()], allow_unicode=True),
    "native-json": json.dumps({"facts": [FACT.to_dict()]}, indent=2),
    "native-csv": as_csv(FACT),
    "counterfact-json": json.dumps([COUNTERFACT]),
    "easyedit-json": json.dumps([EASYEDIT]),
    "zsre-json": json.dumps([ZSRE]),
    "counterfact-yaml": yaml.safe_dump([COUNTERFACT]),
    "easyedit-yaml": yaml.safe_dump({"facts": [EASYEDIT_NESTED]}),
}


@pytest.fixture
def write(tmp_path):
    """Write text or bytes to a file and return its path."""

    def to_file(content, name="facts.dat"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def message_of(path, **settings) -> str:
    """The one line a bad file is refused with, without the file's name."""
    with pytest.raises(FactError) as caught:
        read_facts(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")
