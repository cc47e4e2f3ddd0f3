"""What long streams need: which facts come together, and what a batch does to those before."""

from hashlib import sha256

import pytest
import torch
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.editing.batching import batches
from nulledit.editing.call_log import CallLog

PEOPLE = ("Ada Byron", "Émile Zola", "Karo Dun", "Velm", "Ostrel", "Lyra Holm", "Ada Zola")
FACTS = [Fact(id=f"f{i}", subject=s, prompt="{} says", target="x") for i, s in enumerate(PEOPLE)]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def make(tokenizer):
    def editor(**changes):
        model = build_model("llama")
        fields = {"values.steps": 2, "batch_size": 2}
        fields |= {k.replace("__", "."): v for k, v in changes.items()}
        recipe = RECIPE.with_fields(fields)
        return Editor(model, tokenizer, recipe=recipe, statistics=statistics_of(model, tokenizer))

    return editor


# -- batches of like keys --------------------------------------------------------------------------


def told(found):
    return [[fact.id for fact in batch] for batch in found]


@pytest.mark.parametrize("seed", [None, 0, 3])
def test_a_batch_of_like_keys_is_the_next_fact_dealt_and_its_nearest(seed):
    keys = draw(5, len(FACTS), seed=1)
    left, expected = list(range(len(FACTS))), []
    if seed is not None:
        left.sort(key=lambda i: sha256(f"{seed}/{FACTS[i].id}".encode()).hexdigest())
    while left:
        first = keys[:, left[0]]
        near = sorted(
            left, key=lambda i: -float(torch.cosine_similarity(first, keys[:, i], dim=0))
        )[:3]
        expected.append([FACTS[i].id for i in sorted(near)])
        left = [i for i in left if i not in near]
    assert told(batches(FACTS, 3, seed=seed, keys=keys)) == expected
    assert told(batches(FACTS, 3, seed=seed)) != expected


def test_like_facts_come_together_and_batches_in_no_order():
    centres, facts = draw(8, 10, seed=2), [
        Fact(id=str(i), subject=f"s{i}", prompt="{} is", target="x") for i in range(40)
    ]  # fmt: skip
    keys = torch.stack([centres[:, i % 10] for i in range(40)], dim=1) + 0.01 * draw(8, 40, seed=3)
    found = told(batches(facts, 4, seed=0, keys=keys))
    assert all(len({int(i) % 10 for i in batch}) == 1 for batch in found)
    firsts = [int(batch[0]) % 10 for batch in found]
    assert sorted(firsts) == list(range(10))
    assert firsts != sorted(firsts)
    assert firsts != [int(b[0]) % 10 for b in told(batches(facts, 4, seed=1, keys=keys))]


def test_an_interrupted_stream_goes_on_with_the_batches_that_would_have_come(make, monkeypatch):
    whole, cut = make(batching="keys"), make(batching="keys")
    whole.edit(FACTS)
    assert [len(b) for b in batch_ids(whole)] == [2, 2, 2, 1]
    keys = whole._session.keys_alone(FACTS, CallLog(None))
    assert batch_ids(whole) == told(batches(FACTS, 2, seed=0, keys=keys))
    assert batch_ids(whole) != told(batches(FACTS, 2, seed=0))

    batch, made = type(cut._session).batch, []

    def twice(session, *args, **given):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(batch(session, *args, **given))

    with monkeypatch.context() as patch:
        patch.setattr(type(cut._session), "batch", twice)
        with pytest.raises(KeyboardInterrupt):
            cut.edit(FACTS)
    assert len(cut.facts) == 4
    cut.edit([f for f in FACTS if f.id not in {c.id for c in cut.facts}])  # as `--continue` does
    assert batch_ids(cut) == batch_ids(whole)
    assert cut.history.state_id == whole.history.state_id


def batch_ids(editor):
    found = {}
    for column in editor.history.active:
        found.setdefault(column.batch, []).append(column.fact.id)
    return list(found.values())
