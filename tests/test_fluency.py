"""Longer texts and what is said of them, against textbook formulas and plain sampling."""

import json
import math

import pytest
import torch

from nulledit import Editor, Fact
from nulledit.errors import FactError
from nulledit.evaluation import evaluate, generate_texts, generation_entropy, write_texts
from nulledit.evaluation.fluency import TfIdf, ngram_entropy, words
from nulledit.evaluation.generation import TopK
from nulledit.models.editable_model import EditableModel

ADA = Fact(
    id="ada",
    subject="Ada Byron",
    prompt="The mother tongue of {} is",
    target="Velmish",
    relation="tongue",
    paraphrases=("{} speaks the language", "The mother tongue of Ada Byron is"),
)
KARO = Fact(id="karo", subject="Karo Dun", prompt="{} works as a", target="sailor")
PROMPTS = ["The river", "Because the harbour of Velm lies on the", "Ada Byron", "I know that Karo"]


@pytest.fixture
def model(tiny_model, tokenizer, family):
    return EditableModel(tiny_model(family), tokenizer)


# --- Entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_entropy_is_shannons_of_the_counts(n):
    split = "the sea and the river and the sea and the end".split()
    grams = [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]
    shares = [grams.count(g) / len(grams) for g in set(grams)]
    expected = sum(p * math.log(1 / p, 2) for p in shares)
    assert ngram_entropy(split, n) == pytest.approx(expected, rel=1e-12)


def test_a_text_of_different_words_has_the_most_and_a_repetition_none():
    different = [f"w{i}" for i in range(33)]
    assert ngram_entropy(different, 2) == pytest.approx(5)  # 32 pairs
    assert ngram_entropy(["a"] * 33, 2) == 0
    assert math.copysign(1, ngram_entropy(["a"] * 33, 2)) == 1
    assert ngram_entropy(["a", "b"], 3) is None


def test_fluency_weighs_the_entropies_as_published():
    text = "the sea and the river, and the sea and the end."
    split = [
        "the",
        "sea",
        "and",
        "the",
        "river",
        ",",
        "and",
        "the",
        "sea",
        "and",
        "the",
        "end",
        ".",
    ]
    two, three = (ngram_entropy(split, n) for n in (2, 3))
    assert generation_entropy(text) == pytest.approx((2 / 3 * two + 4 / 3 * three) / 2, rel=1e-12)
    assert generation_entropy("so it goes") == pytest.approx(1 / 3)  # two pairs, one triple
    assert generation_entropy("only two") is None
    assert generation_entropy("") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The sea, the\n sea!", ["The", "sea", ",", "the", "sea", "!"]),
        ("don't stop well-known O’Brien", ["don't", "stop", "well-known", "O’Brien"]),
        ("'tis - the dogs' - ...", ["'", "tis", "-", "the", "dogs", "'", "-", ".", ".", "."]),
        ("In 1969 3.5%", ["In", "1969", "3", ".", "5", "%"]),
        ("東京は大きい。", ["東", "京", "は", "大", "き", "い", "。"]),
        ("東京IBMの製品", ["東", "京", "IBM", "の", "製", "品"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("cafe\u0301 noir", ["café", "noir"]),
        ("  ", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


# --- TF-IDF ---------------------------------------------------------------------------------


def test_the_cosine_is_the_textbooks():
    documents = ["The sea is wide, the sea is deep.", "The river is long", "A long winter"]
    split = [
        ["the", "sea", "is", "wide", "the", "sea", "is", "deep"],
        ["the", "river", "is", "long"],
        ["a", "long", "winter"],
    ]
    vocabulary = sorted({word for d in split for word in d})

    def vector(text):
        holding = {w: sum(w in d for d in split) for w in vocabulary}
        return torch.tensor(
            [text.count(w) * (math.log((1 + 3) / (1 + holding[w])) + 1) for w in vocabulary]
        )

    rare = TfIdf.of(documents)
    for a in range(3):
        for b in range(3):
            expected = torch.cosine_similarity(vector(split[a]), vector(split[b]), dim=0)
            assert rare.cosine(documents[a], documents[b]) == pytest.approx(float(expected))
    assert rare.cosine(documents[0], documents[0]) == pytest.approx(1)
    assert rare.cosine("LONG!", "a long night") == pytest.approx(
        float(torch.cosine_similarity(vector(["long"]), vector(["a", "long"]), dim=0))
    )
    assert rare.cosine("nothing known", documents[0]) == 0
    assert rare.cosine("", "") == 0


# --- Texts ----------------------------------------------------------------------------------


def test_a_text_depends_on_its_prompt_and_the_seed_alone(model):
    state = torch.get_rng_state()
    alone = [generate_texts(model, [p], length=30)[0] for p in PROMPTS]
    ends = []
    together = generate_texts(
        model, PROMPTS, length=30, batch_size=3, progress=lambda *n: ends.append(n)
    )
    assert together == alone
    assert ends == [(3, 4), (4, 4)]
    assert generate_texts(model, PROMPTS[::-1], length=30) == alone[::-1]
    assert generate_texts(model, PROMPTS, length=30, seed=1) != alone
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_begin_with_their_prompt_and_have_the_length(tiny_model, tokenizer):
    model = EditableModel(tiny_model("llama"), tokenizer)
    chosen = []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **more: (chosen.append(ids), decode(ids, **more))[1]
    try:
        texts = generate_texts(model, PROMPTS, length=40)
        endless = generate_texts(model, PROMPTS[:1], length=10**6)
    finally:
        del tokenizer.decode
    assert [len(ids) for ids in chosen] == [40, 40, 40, 40, 128]  # the model's context
    prompts = [*PROMPTS, PROMPTS[0]]
    assert all(t.startswith(p) for t, p in zip([*texts, *endless], prompts, strict=True))
    with pytest.raises(FactError, match=r"prompt of \d+ tokens leaves no room in a text of 2"):
        generate_texts(model, PROMPTS, length=2)


def test_an_end_of_text_token_does_not_end_the_text(tiny_model, tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all alike: the first id, the end of text, comes up often
    asked = EditableModel(model, tokenizer)
    text = generate_texts(asked, ["The river"], length=60, top_k=2)[0]
    other = tokenizer.decode([1])
    drawn = text.removeprefix("The river")
    assert set(drawn) == set(other)
    assert 10 < len(drawn) / len(other) < 58


def test_one_candidate_is_greedy(model, tokenizer):
    for prompt in PROMPTS[:2]:
        ids = tokenizer(prompt)["input_ids"]
        while len(ids) < 20:
            with torch.no_grad():
                ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert generate_texts(model, [prompt], length=20, top_k=1) == [expected]


def test_tokens_are_drawn_by_their_probability_among_the_likeliest():
    n, logits = 4000, torch.tensor([0.5, -1.0, 2.0, 1.0, -3.0], dtype=torch.float64)
    draw = TopK([torch.Generator().manual_seed(i) for i in range(n)], 3)
    left = draw(torch.zeros(n, 1), logits.expand(n, -1))
    assert (left.isfinite().sum(1) == 1).all()
    counts = left.argmax(1).bincount(minlength=5).double() / n
    p = torch.zeros(5, dtype=torch.float64)
    p[[0, 2, 3]] = logits[[0, 2, 3]].softmax(0)
    assert ((counts - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


# --- Per fact -------------------------------------------------------------------------------


def test_each_prompt_of_a_fact_is_written_on_once(tiny_model, tokenizer):
    model = EditableModel(tiny_model("llama"), tokenizer)
    found = write_texts(model, [ADA, KARO], length=40)
    prompts = ["The mother tongue of Ada Byron is", "Ada Byron speaks the language"]
    expected = generate_texts(model, [*prompts, "Karo Dun works as a"], length=40)
    assert found.texts == {"ada": tuple(expected[:2]), "karo": tuple(expected[2:])}
    bits = [generation_entropy(text) for text in expected]
    assert found.fluency == {"ada": pytest.approx(sum(bits[:2]) / 2), "karo": bits[2]}
    assert found.consistency == {}


def test_a_prompt_that_fills_half_of_the_text_is_left_out(tiny_model, tokenizer):
    model = EditableModel(tiny_model("llama"), tokenizer)
    own, other = "The mother tongue of Ada Byron is", "Ada Byron speaks the language"
    tokens = len(tokenizer(own)["input_ids"])
    assert tokens < len(tokenizer(other)["input_ids"])
    found = write_texts(model, [ADA], length=2 * tokens)
    assert [text[: len(own)] for text in found.texts["ada"]] == [own]
    none = write_texts(model, [ADA], length=2 * tokens - 1)
    assert (none.texts, none.fluency, none.consistency) == ({}, {}, {})


def test_references_are_found_by_id_or_by_relation_and_target(tiny_model, tokenizer):
    model = EditableModel(tiny_model("llama"), tokenizer)
    about = {"tongue/Velmish": ["People in Velm speak.", "The river"], "nobody": ["the sea"]}
    found = write_texts(model, [ADA, KARO], references=about, length=40)
    rare = TfIdf.of(["People in Velm speak.", "The river", "the sea"])
    expected = rare.cosine(" ".join(found.texts["ada"]), "People in Velm speak. The river")
    assert found.consistency == {"ada": expected}
    assert expected > 0
    by_id = about | {"ada": ["no such words"]}
    assert write_texts(model, [ADA], references=by_id, length=40).consistency != {"ada": expected}
    for bad in ("one text", ["..."], [3]):
        with pytest.raises(FactError, match="references of 'ada' must be a list of texts"):
            write_texts(model, [ADA], references={"ada": bad})


def test_an_evaluation_writes_on_request(tiny_model, tokenizer, recipe, make_statistics):
    model = tiny_model("llama")
    editor = Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))
    stages = []
    found = evaluate(
        editor.editable,
        [ADA, KARO],
        generate=False,
        fluency=True,
        seed=3,
        progress=lambda *told: stages.append(told),
    )
    writing = write_texts(editor.editable, [ADA, KARO], seed=3)
    assert found.writing == writing
    assert ("texts", 3, 3) in stages
    values = list(writing.fluency.values())
    assert (found.fluency.mean, found.fluency.n) == (pytest.approx(sum(values) / 2), 2)
    assert found.fluency.standard_error == pytest.approx(abs(values[0] - values[1]) / 2)
    assert found.consistency is None
    assert found.rows()["ada"]["fluency"] == writing.fluency["ada"]
    assert found.rows()["ada"]["consistency"] is None
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["fluency"]["n"] == 2
    assert data["consistency"] is None
    assert data["texts"]["karo"] == list(writing.texts["karo"])

    about = {"karo": ["a sailor works"]}
    found = evaluate(editor.editable, [ADA, KARO], generate=False, references=about)
    assert (found.fluency.n, found.consistency.n) == (2, 1)
