"""What long streams need: which facts come together, and what a batch does to those before."""

from hashlib import sha256

import pytest
import torch
from support.models import LINES, RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.config import StatisticsSettings
from nulledit.data.corpus import open_corpus
from nulledit.editing.batching import batches
from nulledit.editing.call_log import CallLog
from nulledit.editing.displacement import of_history
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in
from nulledit.models.load import model_hash
from nulledit.runs.gate import check
from nulledit.runs.limits import Limits
from nulledit.statistics.collect import collect
from nulledit.statistics.found import find_statistics
from nulledit.statistics.manifest import Manifest
from nulledit.statistics.names import name_ends

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


# -- what a batch does to the facts before it ------------------------------------------------------


def dense_displacement(weights, keys):
    """‖(W_t − W_{t−1}) K_old‖ / ‖W_{t−1} K_old‖ of each batch t after the first."""
    found = []
    for t in range(1, len(keys)):
        old, change = torch.cat(keys[:t], dim=1), weights[t + 1] - weights[t]
        found.append(float((change @ old).norm() / (weights[t] @ old).norm()))
    return found


@pytest.mark.parametrize("method", ["alphaedit", "memit", "ft"])
def test_displacement_is_its_formula_in_report_and_ledger(method, make):
    editor = make(method__name=method)
    weights = {i: [as_out_in(editor.editable.mlp_out(i)).clone()] for i in (1, 2)}
    told = []
    for at in (0, 2, 4):
        report = editor.edit(FACTS[at : at + 2])
        told += report.displaced
        for layer, kept in weights.items():
            kept.append(editor.weights.exact(layer))
    again = of_history(editor.weights)
    assert [d.batch for d in told] == [d.batch for d in again] == [2, 3]
    by_batch = [[c for c in editor.history.active if c.batch == b] for b in (1, 2, 3)]
    for layer, kept in weights.items():
        keys = [editor.weights.recorded(batch, layer)[0] for batch in by_batch]
        expected = dense_displacement(kept, keys)
        assert [d.layers[layer] for d in told] == pytest.approx(expected, rel=1e-8)
        assert [d.layers[layer] for d in again] == pytest.approx(expected, rel=1e-8)
        assert min(expected) > 1e-6
    editor.undo(*[c.fact.id for c in by_batch[1]])
    assert [d.batch for d in of_history(editor.weights)] == [3]


def test_displacement_is_a_limit(make):
    editor = make()
    report = editor.edit(FACTS)
    most = 100 * max(d.largest for d in report.displaced)
    for bound, passed in ((1.01 * most, True), (0.99 * most, False)):
        found = check(editor, Limits.from_dict({"displacement": {"at_most": bound}}))
        assert found.passed == passed
        assert found.rows[0].found == pytest.approx(most, rel=1e-6)
        assert found.rows[0].note.startswith("batch ")
    editor.undo(*[c.fact.id for c in editor.history.active if c.batch > 1])
    assert check(editor, Limits.from_dict({"displacement": {"at_most": 0}})).passed


# -- subjects' last tokens as what is preserved ----------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_names_end_where_capitalised_words_do(size):
    text = (
        "The river flows to Paris. Then Émile Zola met Du Fu's aunt in New York-Newark, and He said"
    )
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    ends = [text.index(name) + len(name) - 1 for name in ("Paris", "Zola", "Du Fu", "Newark", "He")]
    expected = {end // size for end in ends}
    assert {i for i, is_end in enumerate(name_ends(pieces)) if is_end} == expected


def test_statistics_of_names_are_the_moment_of_their_last_tokens(tokenizer, tmp_path):
    model = EditableModel(build_model("llama"), tokenizer)
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(LINES * 12), encoding="utf-8")
    given = {"layers": [1], "name": "tiny", "model_hash": model_hash(model.model)}

    def made(where, **settings):
        settings = StatisticsSettings(packing="lines", window=64, **settings)
        return collect(model, open_corpus(file), settings, folder=tmp_path / where, **given)

    found, plain = made("names", names=True), made("plain")
    keys = []
    for line in LINES * 12:
        ids = tokenizer(line)["input_ids"][:64]
        ends = name_ends([tokenizer.decode([i]) for i in ids])
        with model.reading_keys([1]) as read:
            model.run(model.collate([ids]), last=1)
        keys.append(read[1][0][torch.tensor(ends)])
    keys = torch.cat(keys)
    assert found.manifest.tokens == len(keys) < plain.manifest.tokens / 4
    eigenvalues = torch.linalg.eigvalsh(keys.double().mT @ keys.double() / len(keys))
    assert torch.allclose(found.spectra[1].eigenvalues.double(), eigenvalues, atol=1e-5)
    assert "names" not in plain.manifest.to_json()  # as in manifests from before there was one
    assert Manifest.from_json(found.manifest.to_json(), "") == found.manifest
    found.check(given["model_hash"], [1])  # an edit takes them where they are given


def test_statistics_of_names_are_not_taken_unasked(tokenizer, tmp_path):
    model = EditableModel(build_model("llama"), tokenizer)
    file, digest = tmp_path / "corpus.txt", model_hash(model.model)
    file.write_text("\n".join(LINES * 12), encoding="utf-8")
    settings = StatisticsSettings(packing="lines", window=64, names=True)
    collect(model, open_corpus(file), settings, layers=[1], name="tiny", model_hash=digest)
    assert next(find_statistics(digest, [1]), None) is None


def batch_ids(editor):
    found = {}
    for column in editor.history.active:
        found.setdefault(column.batch, []).append(column.fact.id)
    return list(found.values())
