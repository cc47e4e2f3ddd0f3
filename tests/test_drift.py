"""Drift of hidden states against plain computations on the whole model."""

import json
import math

import pytest
import torch

from nulledit import Editor
from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.drift import (
    States,
    default_layers,
    drift,
    drift_report,
    edited_token_norm,
    energy_coefficient,
    picture,
    read_states,
    read_texts,
)
from nulledit.models.editable_model import EditableModel
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import RowEncoder

TEXTS = [
    "The river flows to the sea.",
    "Ada",
    "People in the valley speak Velmish, and the winters are long.",
    "The river flows",
    "You know it too.",
]


@pytest.fixture
def encoder(tokenizer):
    return RowEncoder(tokenizer, max_length=128)


@pytest.fixture
def rows(encoder):
    return [encoder.encode(text).ids for text in TEXTS]


@pytest.fixture
def editor(tiny_model, tokenizer, recipe, make_statistics):
    model = tiny_model("llama")
    return Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))


@pytest.fixture
def edited(editor, facts):
    editor.edit(facts[:2])
    return editor


def plain_states(model, rows, layer):
    """States [n, d] after block `layer` at each last token; one row at a time, read by a hook."""
    found = []

    def hook(_module, _args, output):
        found.append((output[0] if isinstance(output, tuple) else output)[0, -1].double())

    blocks = PartialModel(model).blocks
    handle = blocks[layer].register_forward_hook(hook)
    with torch.no_grad():
        for ids in rows:
            model(torch.tensor([ids]))
    handle.remove()
    return torch.stack(found)


def cloud(seed, n=30, d=6, shift=0.0, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=random, dtype=torch.float64) * scale + shift


def test_states_are_those_of_the_whole_model(tiny_model, family, tokenizer, rows):
    """In the order of the texts, whatever runs together, at every layer asked for."""
    model = tiny_model(family)
    whole, padded = EditableModel(model, tokenizer), EditableModel(model, tokenizer)
    padded.pad_id = 7
    told = []
    states = read_states(whole, rows, [3, 0, 2, 2], progress=lambda *at: told.append(at))
    assert list(states.by_layer) == [0, 2, 3]
    assert told[-1] == (len(rows), len(rows))
    rel = 1e-5 if family == "gptj" else 1e-10  # GPT-J's attention is in float32
    for layer, found in states.by_layer.items():
        plain = plain_states(model, rows, layer)
        torch.testing.assert_close(found, plain, rtol=rel, atol=rel)
        for positions, asked in ((1, whole), (30, padded)):
            other = read_states(asked, rows, [layer], positions=positions)
            torch.testing.assert_close(other.by_layer[layer], plain, rtol=rel, atol=rel)
            assert other.texts == states.texts


def test_figures_are_their_definitions():
    base, moved = cloud(0), cloud(0) + cloud(1, scale=0.3)
    (found,) = drift(States({2: base}, "x"), States({2: moved}, "x")).layers
    distances = [float((m - b).norm() / b.norm()) for b, m in zip(base, moved, strict=True)]
    cosines = [float(m @ b / (m.norm() * b.norm())) for b, m in zip(base, moved, strict=True)]
    assert found.layer == 2
    assert found.distance.mean == pytest.approx(sum(distances) / 30)
    assert found.distance.n == 30
    spread = sum((d - found.distance.mean) ** 2 for d in distances) / 29
    assert found.distance.standard_error == pytest.approx(math.sqrt(spread / 30))
    assert found.cosine.mean == pytest.approx(sum(cosines) / 30)
    centred = base - base.mean(0)
    trace = float(torch.trace(centred.mT @ centred)) / 29
    shift = float((moved.mean(0) - base.mean(0)).norm())
    assert found.shift == pytest.approx(shift / math.sqrt(trace))


@pytest.mark.parametrize("n", [30, 300])  # in one part and in two
def test_the_energy_coefficient_is_its_definition(n):
    a, b = cloud(0, n=n), cloud(1, n=n // 2, shift=0.5)

    def mean_distance(x, y):
        return float(torch.stack([(one - y).norm(dim=1).mean() for one in x]).mean())

    across = 2 * mean_distance(a, b)
    expected = (across - mean_distance(a, a) - mean_distance(b, b)) / across
    assert energy_coefficient(a, b) == pytest.approx(expected)
    assert energy_coefficient(b, a) == pytest.approx(expected)
    assert energy_coefficient(5 * a + 1, 5 * b + 1) == pytest.approx(expected)  # free of scale


def test_the_energy_coefficient_tells_distributions_apart():
    """Nothing for the same cloud in any order, near 1 for clouds far apart, more for more."""
    a = cloud(0)
    assert energy_coefficient(a, a) == 0
    assert energy_coefficient(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    steps = [energy_coefficient(a, a + shift) for shift in (0.1, 0.5, 2, 100)]
    assert steps == sorted(steps)
    assert steps[-1] > 0.95
    assert energy_coefficient(a, 3 * a) > 0.01  # the mean is almost where it was
    assert energy_coefficient(a[:1], a[:1]) == 0


def test_the_axes_of_the_picture_are_the_main_ones_of_the_base():
    """Variances along them are the two largest eigenvalues of the base's covariance."""
    scales = torch.tensor([5.0, 3, 1, 0.5, 0.5, 0.5], dtype=torch.float64)
    base, moved = cloud(0, n=200) * scales + 4, cloud(1, n=200) * scales + 6
    found = picture(1, base, moved)
    points = torch.tensor(found.base, dtype=torch.float64)
    variances = torch.linalg.eigvalsh(base.mT.cov()).flip(0)
    torch.testing.assert_close(points.mT.cov(), torch.diag(variances[:2]), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(points.mean(0), torch.zeros(2, dtype=torch.float64))
    assert found.explained == pytest.approx((variances[:2] / variances.sum()).tolist())
    other = picture(1, base.flip(0), moved.flip(0))  # same axes, same signs
    torch.testing.assert_close(torch.tensor(other.edited).flip(0), torch.tensor(found.edited))
    mean = torch.tensor(found.edited).mean(0)
    assert float(mean.norm()) == pytest.approx(2 * math.sqrt(2), rel=0.4)  # moved by 2 along both


def test_a_model_without_edits_has_not_drifted(editor, rows):
    found = drift_report(editor, rows)
    for layer in found.layers:
        assert (layer.distance.mean, layer.shift, layer.energy) == (0, 0, 0)
        assert layer.cosine.mean == pytest.approx(1)
    assert all(p.base == p.edited for p in found.pictures)


def test_edits_drift_from_the_first_edited_block_on(edited, rows):
    """The base side is the model without its edits, which are all there afterwards."""
    after = {layer: plain_states(edited.model, rows, layer) for layer in range(4)}
    found = drift_report(edited, rows, layers=range(4))
    torch.testing.assert_close(plain_states(edited.model, rows, 3), after[3])
    with edited.base_weights():
        before = {layer: plain_states(edited.model, rows, layer) for layer in range(4)}
    assert [layer.layer for layer in found.layers] == [0, 1, 2, 3]
    assert found.layers[0].distance.mean == 0  # block 1 is the first that was edited
    for layer in range(1, 4):
        moved = (after[layer] - before[layer]).norm(dim=1) / before[layer].norm(dim=1)
        assert found.layers[layer].distance.mean == pytest.approx(float(moved.mean()), rel=1e-6)
        assert found.layers[layer].distance.mean > 0
        assert found.layers[layer].energy > 0


def test_many_checkpoints_share_one_pass_of_the_base(editor, facts, rows):
    base = read_states(editor.editable, rows, [1, 3])
    for fact in facts[:2]:
        editor.edit([fact])
        shared, own = (
            drift_report(editor, rows, base=base),
            drift_report(editor, rows, layers=[1, 3]),
        )
        for a, b in zip(shared.layers, own.layers, strict=True):
            assert a.distance.mean == pytest.approx(b.distance.mean)
            assert a.energy == pytest.approx(b.energy)
    with pytest.raises(ValueError, match="are of other texts"):
        drift_report(editor, rows[1:], base=base)
    with pytest.raises(ValueError, match=r"lack layers \[2\]"):
        drift_report(editor, rows, layers=[2, 3], base=base)


def test_the_default_layers_are_the_last_edited_the_middle_and_the_final_one(
    editor, rows, tiny_model, tokenizer, recipe
):
    assert default_layers(editor) == [2, 3]  # of four blocks, the last edited is the middle one
    assert [layer.layer for layer in drift_report(editor, rows).layers] == [2, 3]
    deep = Editor(tiny_model("llama", layers=8), tokenizer, recipe=recipe)
    assert default_layers(deep) == [2, 4, 7]


def test_rows_and_figures_are_plain_data(edited, rows):
    found = drift_report(edited, rows)
    table = list(found.rows())
    assert len(table) == len(found.layers) * 2 * len(rows)
    assert set(table[0]) == {"layer", "side", "text", "x", "y"}
    point = next(r for r in table if (r["layer"], r["side"], r["text"]) == (3, "edited", 2))
    assert (point["x"], point["y"]) == found.pictures[-1].edited[2]
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["layers"][-1]["distance"]["n"] == len(rows)
    assert sum(plain["explained"]["3"]) <= 1


def test_what_few_texts_cannot_say_is_absent(edited, rows):
    one, two = drift_report(edited, rows[:1]), drift_report(edited, rows[:2])
    assert one.pictures == two.pictures == ()
    assert [(layer.shift, layer.energy) for layer in one.layers] == [(None, None)] * 2
    assert one.to_dict()["layers"][0]["distance"]["standard_error"] is None
    assert all(layer.energy is not None for layer in two.layers)


def test_a_broken_model_is_not_a_crash_and_not_a_number():
    base, broken = cloud(0), cloud(0)
    broken[3] = math.inf
    plain = drift(States({0: base}, ""), States({0: broken}, "")).to_dict()
    (layer,) = json.loads(json.dumps(plain, allow_nan=False))["layers"]
    assert layer["distance"] == {"mean": None, "standard_error": None, "n": 30}
    assert (layer["shift"], layer["energy"], layer["cosine"]["mean"]) == (None, None, None)
    assert drift(States({0: broken}, ""), States({0: base}, "")).pictures == ()


def test_bad_layers_and_texts_are_named(editor, rows):
    for layers in ([4], [-1], []):
        with pytest.raises(ConfigError, match="expected some of 0 to 3"):
            read_states(editor.editable, rows, layers)
    for texts in ([], [(1, 2), ()]):
        with pytest.raises(FactError, match="need one or more texts"):
            read_states(editor.editable, texts, [0])


def test_the_norm_at_the_edited_token_is_that_of_the_whole_model(edited, facts):
    norms = []
    for fact in facts:
        before = fact.prompt.partition("{}")[0] + fact.subject
        ids = edited.tokenizer(before)["input_ids"]
        norms.append(float(plain_states(edited.model, [ids], 2).norm()))
    found = edited_token_norm(edited, facts)
    assert found.mean == pytest.approx(sum(norms) / len(norms))
    assert found.n == len(facts)
    with edited.base_weights():
        assert edited_token_norm(edited, facts[:1]).mean != pytest.approx(norms[0])


def test_texts_are_prompts_without_the_edited_subjects_or_windows(tmp_path, encoder):
    file = tmp_path / "known.json"
    file.write_text(json.dumps([{"prompt": text, "subject": "s"} for text in TEXTS]))
    assert read_texts(file, encoder) == [encoder.encode(text).ids for text in TEXTS]
    kept = [text for text in TEXTS if "river" not in text]
    assert read_texts(file, encoder, without=["RIVER"], limit=2) == [
        encoder.encode(text).ids for text in kept[:2]
    ]
    with pytest.raises(FactError, match="no prompt is left"):
        read_texts(file, encoder, without=["O", "a"])
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS * 4))
    windows = read_texts(text, encoder, limit=3, window=16)
    assert [len(ids) for ids in windows] == [16] * 3
    for bad, message in (
        ('{"prompt": "a"}', "JSON list"),
        ('[{"text": "a"}]', "record 0"),
        ("[", "delimiter|value"),
    ):
        file.write_text(bad)
        with pytest.raises(FactError, match=message):
            read_texts(file, encoder)
    with pytest.raises(FactError, match=r"none\.json"):
        read_texts(tmp_path / "none.json", encoder)
    with pytest.raises(ConfigError, match="limit is 0"):
        read_texts(text, encoder, limit=0)
