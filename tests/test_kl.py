"""KL per token from the base: what two whole models say of it, token by token."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from support.models import build_model, changed

from nulledit import Editor, Fact
from nulledit.evaluation import evaluate, perplexity, read
from nulledit.evaluation.reading import divergence, divergences
from nulledit.models.editable_model import EditableModel
from nulledit.models.partial import PartialModel
from nulledit.runs.tables import rates_tables

FACT = Fact(id="ada", subject="Ada Byron", prompt="{} lives in", target="Velm", old_answer="London")


def draw(*lengths, seed=0):
    ids = torch.randint(1, 400, (sum(lengths),), generator=torch.manual_seed(seed)).tolist()
    return [[ids.pop() for _ in range(length)] for length in lengths]


WINDOWS = draw(24, 7, 24, 2, 13)


def whole(base, edited, window):
    """KL(base ‖ edited) of each next token of one window, by the models' own forward passes."""
    with torch.no_grad():
        p, q = (
            m(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
            for m in (base, edited)
        )
    return (p.exp() * (p - q)).sum(-1).numpy()


def compared(model, edited, tokenizer, windows=WINDOWS):
    base = read(EditableModel(model, tokenizer), windows, keep=True)
    return read(EditableModel(edited, tokenizer), windows, base=base)


@pytest.mark.few
def test_it_is_that_of_two_whole_models_on_every_architecture(tiny_model, tokenizer, architecture):
    model = tiny_model(architecture, seed=1)
    edited = changed(model)
    found = compared(model, edited, tokenizer)
    slow = [whole(model, edited, window) for window in WINDOWS]
    rel = 1e-5  # some families compute parts in float32 whatever their weights are
    for mine, theirs in zip(found.apart, slow, strict=True):
        assert mine == pytest.approx(theirs, rel=rel, abs=1e-8)
    tokens = np.concatenate(slow)
    assert found.kl.value == pytest.approx(1000 * tokens.mean(), rel=rel)
    assert found.kl.value > 0.1  # there was something to measure
    assert found.kl.tokens == len(tokens) == 23 + 6 + 23 + 1 + 12
    sums, n = np.array([part.sum() for part in slow]), np.array([len(part) for part in slow])
    off = sums - tokens.mean() * n
    error = math.sqrt(5 / 4 * (off**2).sum()) / n.sum()
    assert found.kl.standard_error == pytest.approx(1000 * error, rel=rel)
    assert found.perplexity.value == pytest.approx(
        perplexity(EditableModel(edited, tokenizer), WINDOWS).value, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_edits_it_is_exactly_nothing(tiny_model, tokenizer, recipe, make_statistics, dtype):
    model = tiny_model("llama", dtype=dtype)
    editor = Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))
    with editor.base_weights():
        before = evaluate(editor.editable, [], windows=WINDOWS)
    found = evaluate(editor.editable, [], windows=WINDOWS, base=before).kl
    assert (found.value, found.standard_error, found.worst_share) == (0, 0, 0)


def test_how_windows_run_together_does_not_matter(tiny_model, tokenizer, monkeypatch):
    model = tiny_model("llama", seed=1)
    edited = changed(model)
    found = compared(model, edited, tokenizer)
    backwards = compared(model, edited, tokenizer, WINDOWS[::-1])
    assert np.concatenate(backwards.apart[::-1]) == pytest.approx(np.concatenate(found.apart))
    assert vars(backwards.kl) == pytest.approx(vars(found.kl))
    monkeypatch.setitem(read.__globals__, "POSITIONS", 1)
    monkeypatch.setitem(read.__globals__, "LOGITS", 3 * 400)
    held = []
    split = PartialModel.logits

    def logits(self, normed):
        held.append(len(normed))
        return split(self, normed)

    base = read(EditableModel(model, tokenizer), WINDOWS, keep=True)
    monkeypatch.setattr(PartialModel, "logits", logits)
    apart = read(EditableModel(edited, tokenizer), WINDOWS, base=base)
    assert vars(apart.kl) == pytest.approx(vars(found.kl))
    assert max(held) == 3  # positions whose logits are there at once


def test_it_is_never_negative_and_does_not_drown_in_rounding():
    random = torch.manual_seed(0)
    logits = 3 * torch.randn(64, 3000, generator=random)
    for scale in (0.0, 1e-6, 1e-3, 0.1, 3.0, 300.0):
        moved = logits + scale * torch.randn(64, 3000, generator=random)
        found = divergences(logits.log_softmax(-1), moved.log_softmax(-1))
        p, q = (x.double().log_softmax(-1) for x in (logits, moved))
        assert (found >= 0).all()
        torch.testing.assert_close(
            found.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-7
        )


def test_tokens_that_a_model_never_gives_and_broken_numbers():
    never = torch.tensor([[0.0, 1.0, -math.inf]]).log_softmax(-1)
    other = torch.tensor([[1.0, 1.0, -math.inf]]).log_softmax(-1)
    p, q = never[:, :2].double(), other[:, :2].double()
    assert float(divergences(never, other)) == pytest.approx(float((p.exp() * (p - q)).sum()))
    assert divergences(never, torch.full((1, 3), math.nan)).isnan().all()
    found = divergence([np.array([0.1, math.nan]), np.array([0.1])])
    assert math.isnan(found.value)
    assert math.isnan(found.worst_share)


def test_the_worst_hundredth_of_tokens():
    apart = [np.full(100, 0.001), np.full(100, 0.001)]
    apart[0][3], apart[1][50], apart[1][51] = 0.5, 0.2, 0.1
    total = 0.8 + 197 * 0.001
    found = divergence(apart)  # two of two hundred
    assert found.value == pytest.approx(1000 * total / 200)
    assert found.worst_share == pytest.approx(0.7 / total)
    assert divergence([np.array([0.3, 0.1])]).worst_share == pytest.approx(0.75)  # one at least
    assert divergence([np.full(101, 2.0)]).worst_share == pytest.approx(2 / 101)


def test_a_base_of_other_windows_is_refused(tiny_model, tokenizer):
    model = EditableModel(tiny_model("gpt2"), tokenizer)
    base = read(model, WINDOWS, keep=True)
    with pytest.raises(ValueError, match="same windows"):
        read(model, WINDOWS[1:], base=base)
    with pytest.raises(ValueError, match="kept its states"):
        read(model, WINDOWS, base=read(model, WINDOWS))


def test_an_evaluation_tells_it_beside_perplexity(tokenizer, recipe, make_statistics):
    model = build_model("llama")
    plain = copy.deepcopy(model)
    editor = Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))
    editor.edit([FACT])
    with editor.base_weights():
        before = evaluate(editor.editable, [FACT], windows=WINDOWS, generate=False)
    after = evaluate(editor.editable, [FACT], windows=WINDOWS, base=before, generate=False)
    assert before.kl is None
    tokens = np.concatenate([whole(plain, model, window) for window in WINDOWS])
    assert after.kl.value == pytest.approx(1000 * tokens.mean(), rel=1e-6)
    sides = {name: e.summary() for name, e in (("before", before), ("after", after))}
    sides = json.loads(json.dumps(sides, allow_nan=False))
    assert sides["before"]["kl"] is None
    assert set(sides["after"]["kl"]) == {"value", "standard_error", "worst_share", "tokens"}
    (text,) = [table for table in rates_tables(sides) if table.name.startswith("text")]
    cells = {str(row["measure"]): row for row in text.rows}
    value, share = after.kl.value, 100 * after.kl.worst_share
    assert cells["KL per token (mnat)"]["before"].mean == 0
    assert cells["KL per token (mnat)"]["after"].mean == value
    assert cells["KL, share of the worst 1 % (%)"]["before"] is None
    assert cells["KL, share of the worst 1 % (%)"]["after"] == share
