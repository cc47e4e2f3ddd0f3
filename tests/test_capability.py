"""The general-capability test against slow, plain computations of the same numbers."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.capability import capability, compare, weighted_f1
from nulledit.evaluation.tasks import TASKS, Item, Task, read_tasks
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder

RECORDS = {
    "sst2": [{"sentence": f"the river {i} is long ", "label": i % 2, "idx": i} for i in range(9)],
    "mrpc": [
        {"sentence1": f"Ada lives in town {i}.", "sentence2": "She lives.", "label": i % 2}
        for i in range(4)
    ],
    "cola": [{"sentence": f"The {i} winters are.", "label": i % 2} for i in range(4)],
    "rte": [
        {"sentence1": f"Karo {i} is a baker.", "sentence2": "Karo bakes.", "label": i % 2}
        for i in range(4)
    ],
    "mmlu": [
        {"question": f"What is {i}?", "subject": "x", "choices": list("pqrs"), "answer": i % 4}
        for i in range(8)
    ],
    "nli": [
        {"sentence1": f"Velm {i}.", "sentence2": "A town.", "label": label, "index": str(i)}
        for i, label in enumerate(["entailment", "not_entailment"] * 2)
    ],
}
# Choices of one, two and more tokens, some of which begin others.
LONG = Task(
    name="long",
    prompt="{text}\nIt is",
    passage="text",
    answer="label",
    labels=("a", "b", "c"),
    choices=("the river", "the", "winter in London"),
)


@pytest.fixture
def folder(tmp_path):
    for name, records in RECORDS.items():
        lines = "\n".join(json.dumps(record) for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def llama(tiny_model, tokenizer):
    return EditableModel(tiny_model("llama"), tokenizer)


@pytest.fixture
def long_items():
    texts = ["The river flows.", "Ada, in London", "You know it, too: the winters are long."]
    return [Item(LONG, f"long/{i}", {"text": t}, i % 3) for i, t in enumerate(texts * 2)]


def plain_likelihoods(model, tokenizer, text, choices):
    """Log-likelihood of each choice after `text`, from the whole model, one row at a time."""
    values = []
    for choice in choices:
        ids = tokenizer(f"{text} {choice}")["input_ids"]
        start = len(tokenizer(text)["input_ids"])
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(float(chances[i - 1, ids[i]]) for i in range(start, len(ids))))
    return values


def slow_f1(truth, said):
    """Weighted F1 by its definition, from precision and recall of each class."""
    total = 0.0
    for one in set(truth):
        hits = sum(t == s == one for t, s in zip(truth, said, strict=True))
        precision = hits / said.count(one) if said.count(one) else 0.0
        recall = hits / truth.count(one)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        total += f1 * truth.count(one) / len(truth)
    return total


def test_records_become_the_questions_of_their_task(folder):
    texts = {i.task.name: i.task.render(i.record) for i in read_tasks(folder, limit=1)}
    assert list(texts) == list(TASKS)
    assert texts["sst2"].startswith("Review : the river")
    assert texts["sst2"].endswith("is long\nSentiment :")  # without the record's trailing space
    assert "(A) p\n(B) q\n(C) r\n(D) s\nAnswer:" in texts["mmlu"]
    for item in read_tasks(folder):
        stored = item.record[item.task.answer]
        assert item.task.labels[item.answer] == stored
        assert len(item.task.choices) == len(item.task.labels)


@pytest.mark.parametrize(
    ("name", "label", "said"),
    [
        ("sst2", 1, "positive"),
        ("mrpc", 1, "Yes"),
        ("cola", 1, "Yes"),
        ("rte", 0, "True"),  # GLUE: 0 is entailment
        ("mmlu", 2, "C"),
        ("nli", "entailment", "True"),
    ],
)
def test_labels_say_what_their_data_sets_mean(name, label, said):
    task = TASKS[name]
    assert task.choices[task.labels.index(label)] == said


def test_items_are_drawn_balanced_and_a_limit_only_cuts(folder):
    for name in RECORDS:
        whole = read_tasks(folder, [name], seed=3)
        assert sorted(i.id for i in whole) == sorted(
            f"{name}/{line + 1}" for line in range(len(RECORDS[name]))
        )
        for limit in range(1, len(whole) + 1):
            part = read_tasks(folder, [name], limit, seed=3)
            assert part == whole[:limit]
            counts = Counter(item.answer for item in part)
            if limit <= 4 * min(Counter(i.answer for i in whole).values()):
                assert max(counts.values()) - min(counts.values()) <= 1
    orders = {tuple(i.id for i in read_tasks(folder, ["sst2"], seed=s)) for s in range(5)}
    assert len(orders) > 1


def test_a_class_that_runs_out_leaves_the_rest_to_the_others(folder):
    lines = [json.dumps({"sentence": str(i), "label": int(i == 5)}) for i in range(6)]
    (folder / "sst2.jsonl").write_text("\n".join(lines))
    answers = [item.answer for item in read_tasks(folder, ["sst2"])]
    assert sorted(answers[:2]) == [0, 1]
    assert answers[2:] == [0] * 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"sst2\.jsonl: line 2: broken JSON"),
        ('{"label": 1}', r"line 2: no field 'sentence'"),
        ('["a"]', r"line 2: no field"),
        ('{"sentence": "a", "label": 2}', r"line 2: label is 2; expected one of 0, 1"),
        ('{"sentence": 7, "label": 1}', r"line 2: can't fill the prompt"),
    ],
)
def test_a_bad_record_is_named(folder, line, message):
    (folder / "sst2.jsonl").write_text('{"sentence": "a", "label": 0}\n' + line)
    with pytest.raises(FactError, match=message):
        read_tasks(folder, ["sst2"])


def test_bad_names_files_and_limits_are_named(folder):
    with pytest.raises(ConfigError, match=r"no task 'sst' \(did you mean 'sst2'\?\)"):
        read_tasks(folder, ["sst"])
    with pytest.raises(ConfigError, match="limit is 0"):
        read_tasks(folder, limit=0)
    (folder / "nli.jsonl").unlink()
    with pytest.raises(FactError, match=r"nli\.jsonl: no such file"):
        read_tasks(folder)
    (folder / "nli.jsonl").write_text("\n\n")
    with pytest.raises(FactError, match="holds no records"):
        read_tasks(folder)
    (folder / "mmlu.jsonl").write_text('{"question": "?", "choices": ["a"], "answer": 0}')
    with pytest.raises(FactError, match="can't fill the prompt of mmlu"):
        read_tasks(folder, ["mmlu"])


def test_results_are_those_of_the_whole_model(tiny_model, family, tokenizer, long_items):
    """Every number from summed log-likelihoods of one row at a time; choices of any length."""
    model = tiny_model(family)
    result = capability(EditableModel(model, tokenizer), long_items)["long"]
    truth, said, right, likelihood = [], [], [], []
    for item, found in zip(long_items, result.items, strict=True):
        values = plain_likelihoods(model, tokenizer, item.task.render(item.record), LONG.choices)
        chances = torch.tensor(values).softmax(0)
        truth.append(item.answer)
        said.append(int(np.argmax(values)))
        right.append(float(chances[item.answer]))
        likelihood.append(values[item.answer])
        assert (found.id, found.answer, found.predicted) == (item.id, item.answer, said[-1])
        assert found.probability == pytest.approx(right[-1], rel=1e-5)
        assert found.log_likelihood == pytest.approx(likelihood[-1], rel=1e-6)
    assert result.n == len(long_items)
    assert result.f1 == pytest.approx(slow_f1(truth, said))
    assert result.accuracy.mean == pytest.approx(np.equal(truth, said).mean())
    assert result.probability.mean == pytest.approx(np.mean(right), rel=1e-5)
    assert result.probability.standard_error == pytest.approx(
        np.std(right, ddof=1) / math.sqrt(len(right)), rel=1e-4
    )
    assert result.log_likelihood.mean == pytest.approx(np.mean(likelihood), rel=1e-6)
    assert result.predicted == {c: said.count(i) for i, c in enumerate(LONG.choices)}
    assert (result.undecided, result.shortened) == (0, 0)
    assert result.chance_accuracy == pytest.approx(1 / 3)
    assert result.chance_f1 == pytest.approx(slow_f1(truth, [0] * len(truth)))


def test_results_depend_neither_on_the_chunk_nor_on_padding(llama, tokenizer, long_items):
    padded = EditableModel(llama.model, tokenizer)
    padded.pad_id = 7
    whole = capability(llama, long_items)["long"]
    told = []
    for model, positions in ((padded, 2048), (llama, 1)):
        other = capability(
            model, long_items, positions=positions, progress=lambda *at: told.append(at)
        )["long"]
        for a, b in zip(whole.items, other.items, strict=True):
            assert a.predicted == b.predicted
            assert a.probability == pytest.approx(b.probability, rel=1e-6)
        assert told[-1][0] == told[-1][1]
        assert whole.f1_standard_error == other.f1_standard_error  # seeded


def test_tasks_are_summarised_one_by_one(llama, folder):
    items = read_tasks(folder, ["sst2", "mmlu"])
    both = capability(llama, items)
    assert list(both) == ["sst2", "mmlu"]
    for name, result in both.items():
        alone = capability(llama, read_tasks(folder, [name]))[name]
        assert [i.id for i in alone.items] == [i.id for i in result.items]
        assert alone.f1 == result.f1
        assert alone.probability.mean == pytest.approx(result.probability.mean, rel=1e-6)
    assert both["mmlu"].chance_accuracy == 0.25
    json.dumps({name: result.to_dict() for name, result in both.items()}, allow_nan=False)
    assert "items" not in both["mmlu"].summary()


def test_examples_stand_in_front_and_are_not_asked(llama, tokenizer, long_items):
    result = capability(llama, long_items, shots=2)["long"]
    assert [item.id for item in result.items] == [item.id for item in long_items[2:]]
    shown = "".join(
        f"{item.record['text']}\nIt is {LONG.choices[item.answer]}\n" for item in long_items[:2]
    )
    for item, found in zip(long_items[2:], result.items, strict=True):
        text = shown + item.task.render(item.record)
        values = plain_likelihoods(llama.model, tokenizer, text, LONG.choices)
        assert found.log_likelihood == pytest.approx(values[item.answer], rel=1e-6)
    with pytest.raises(ConfigError, match="leave none to ask after 6 examples"):
        capability(llama, long_items, shots=6)
    with pytest.raises(ConfigError, match="shots is -1"):
        capability(llama, long_items, shots=-1)


def test_a_long_prompt_loses_examples_then_its_passage_but_never_the_question(llama, tokenizer):
    """What is left of the passage is its end, and fits with the longest choice."""
    task = Task(
        name="t",
        prompt="{passage}\nquestion: {question}?\nanswer:",
        passage="passage",
        answer="label",
        labels=(0, 1),
        choices=("London", "the river in London"),
    )
    passage = " ".join(f"word{i} é" for i in range(60))
    records = [{"passage": p, "question": "who", "label": 0} for p in ("short", passage, "brief")]
    items = [Item(task, f"t/{i}", record, 0) for i, record in enumerate(records)]
    for length in (60, 64, 90):
        seen = []

        class Watching(RowEncoder):
            def encode(self, text, seen=seen, **more):
                row = super().encode(text, **more)
                seen.append((text, len(row.ids)))
                return row

        model = llama.asked(Watching(tokenizer, max_length=length))
        result = capability(model, items, shots=1)["t"]
        assert result.shortened == 1
        cut = {text for text, _ in seen if "word59" in text}
        assert len(cut) == 1
        (text,) = cut
        assert text.endswith("word59 é\nquestion: who?\nanswer:")
        kept = text.removesuffix("\nquestion: who?\nanswer:")
        assert passage.endswith(kept)
        assert max(n for t, n in seen if t == text) <= length
        assert max(n for t, n in seen if t == text) > length - 8  # no more is lost than needed
        whole = {text for text, _ in seen if "brief" in text}
        assert all(
            text.startswith("short\nquestion: who?\nanswer: London\nbrief") for text in whole
        )
    narrow = llama.asked(RowEncoder(tokenizer, max_length=10))
    with pytest.raises(FactError, match=r"t/1: without its passage the prompt is still \d+ tokens"):
        capability(narrow, items[1:])


class Fixed(torch.nn.Module):
    """A head that gives some logits, whatever the state."""

    def __init__(self, logits):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logits = logits

    def forward(self, states):
        return self.logits.expand(*states.shape[:-1], -1)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_equal_or_broken_answers_are_undecided_and_wrong(llama, tokenizer, value):
    """No choice may win by its place in the list, and a broken model must not look unhurt."""
    llama.model.set_output_embeddings(Fixed(torch.full((400,), value, dtype=torch.float64)))
    task = Task("t", "{text} is", "text", "label", (0, 1), ("in", "on"))
    assert len({len(tokenizer(f" {choice}")["input_ids"]) for choice in task.choices}) == 1
    items = [Item(task, f"t/{i}", {"text": "The river"}, i % 2) for i in range(4)]
    result = capability(llama, items)["t"]
    assert (result.undecided, result.accuracy.mean, result.f1) == (4, 0, 0)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["probability"]["mean"] == (0.5 if value == 1 else None)
    assert compare({"t": result}, {"t": result}) == {"t": (0, 0, 0) if value == 1 else None}


def test_two_models_are_compared_item_by_item(tiny_model, tokenizer, long_items):
    one, two = (
        capability(EditableModel(tiny_model("llama", seed=seed), tokenizer), long_items)
        for seed in (0, 1)
    )
    (mean, low, high) = compare(one, two)["long"]
    expected = [
        b.probability - a.probability
        for a, b in zip(one["long"].items, two["long"].items, strict=True)
    ]
    assert mean == pytest.approx(np.mean(expected))
    assert low <= mean <= high
    assert compare(one, one)["long"] == (0, 0, 0)
    part = capability(EditableModel(tiny_model("llama"), tokenizer), long_items[:3])
    with pytest.raises(ValueError, match="not of the same items"):
        compare(one, part)
    with pytest.raises(ValueError, match="not of the same items"):
        compare(one, {})


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=100)
def test_weighted_f1_is_its_definition(pairs):
    """Rows of counts against lists of labels; 3 stands for no answer."""
    confusion = np.zeros((3, 4), dtype=int)
    for truth, said in pairs:
        confusion[truth, said] += 1
    truth, said = zip(*pairs, strict=True)
    assert float(weighted_f1(confusion)) == pytest.approx(slow_f1(list(truth), list(said)))
    stacked = weighted_f1(np.stack([confusion, confusion * 2]))
    assert stacked == pytest.approx(float(weighted_f1(confusion)))


def test_the_error_of_f1_is_that_of_drawing_items_within_their_class(
    tiny_model, tokenizer, long_items
):
    model = EditableModel(tiny_model("llama", seed=4), tokenizer)
    letters = replace(LONG, choices=("x", "y", "z"))
    items = [
        Item(letters, f"long/{i}", {"text": f"{item.record['text']} {i}"}, i % 3)
        for i, item in enumerate(long_items * 5)
    ]
    result = capability(model, items)["long"]
    assert len([c for c in result.predicted.values() if c]) > 1
    draw = np.random.default_rng(5)
    classes = [[item for item in result.items if item.answer == a] for a in range(3)]
    values = []
    for _ in range(1000):
        drawn = [group[i] for group in classes for i in draw.integers(len(group), size=len(group))]
        values.append(slow_f1([i.answer for i in drawn], [i.predicted for i in drawn]))
    assert result.f1_standard_error == pytest.approx(np.std(values), rel=0.1)
    single = capability(model, items[:3])["long"]
    assert math.isnan(single.f1_standard_error)
