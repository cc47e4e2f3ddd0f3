"""Local fine-tuning: one W, its update beside it, trained on targets and their end."""

import dataclasses

import pytest
import torch

from nulledit.baselines import LocalBaseline, LocalSettings, local_finetune
from nulledit.config import ContextSettings
from nulledit.errors import ModelError
from nulledit.evaluation import evaluate
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in
from nulledit.models.load import model_hash

TEXTS = ("{}", "Then, he said. {}")
SETTINGS = LocalSettings(
    layer=1, epochs=2, learning_rate=0.01, batch_size=4, contexts=ContextSettings(texts=TEXTS)
)


@pytest.fixture
def model(tiny_model, family):
    return tiny_model(family)


def plain_loss(model, tokenizer, prompt, answer):
    """Mean loss of the answer and the end token, one text alone, all logits."""
    start = len(tokenizer(prompt)["input_ids"])
    whole = [*tokenizer(f"{prompt} {answer}")["input_ids"], tokenizer.eos_token_id]
    logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return -torch.stack([logs[i - 1, whole[i]] for i in range(start, len(whole))]).mean()


def test_the_first_step_is_adams_on_the_plain_gradient_of_w(model, tokenizer, facts, family):
    editable = EditableModel(model, tokenizer)
    rel = 1e-4 if family == "gptj" else 1e-8
    parameter = dict(model.named_parameters())[editable.parameter_name(1)]
    loss = sum(
        plain_loss(model, tokenizer, text.format(f.render(f.prompt)), f.target)
        for f in facts
        for text in TEXTS
    ) / (len(facts) * len(TEXTS))
    (gradient,) = torch.autograd.grad(loss, [parameter])
    g = gradient.T if family == "gpt2" else gradient  # Conv1D keeps [d_in, d_out]
    with LocalBaseline(editable, dataclasses.replace(SETTINGS, epochs=1)) as baseline:
        report = baseline.train(facts)
        assert sum(report.losses.values()) / 4 == pytest.approx(loss.item(), rel=rel)
        expected = -SETTINGS.learning_rate * g / (g.abs() + 1e-8)
        assert torch.allclose(baseline.parameters[0], expected, rtol=100 * rel, atol=100 * rel)


def test_what_runs_is_w_plus_the_update(model, tokenizer, facts):
    editable = EditableModel(model, tokenizer)
    before = model_hash(model)
    with local_finetune(editable, facts, SETTINGS) as baseline:
        found = evaluate(editable, facts, generate=False)
        update = baseline.parameters[0].detach().clone()
    assert model_hash(model) == before
    assert not any(module._forward_hooks for module in model.modules())
    weight = as_out_in(editable.matrix(1))
    weight += update
    by_hand = evaluate(editable, facts, generate=False)
    assert update.any()
    for name, rate in found.rates.items():
        assert rate.mean == pytest.approx(by_hand.rates[name].mean, abs=1e-6), name
    for one, other in zip(found.scores, by_hand.scores, strict=True):
        assert one.answer_nll == pytest.approx(other.answer_nll, rel=1e-4)


@pytest.mark.few("llama", of="family")
def test_training_teaches_the_facts(family, tiny_model, tokenizer, facts):
    editable = EditableModel(tiny_model(family, hidden=48), tokenizer)
    settings = dataclasses.replace(SETTINGS, layer=3, epochs=200, stop_loss=0.1)
    with local_finetune(editable, facts, settings) as baseline:
        assert baseline.reports[0].epochs < 200
        assert evaluate(editable, facts, generate=False).rates["efficacy_strict"].mean == 1


def test_a_half_precision_model_is_trained_in_float32(tiny_model, tokenizer, facts):
    model = tiny_model("llama").bfloat16()
    with local_finetune(EditableModel(model, tokenizer), facts, SETTINGS) as baseline:
        assert baseline.parameters[0].dtype == torch.float32
        assert all(loss < float("inf") for loss in baseline.reports[0].losses.values())


def test_blocks_that_it_cannot_train_are_refused(tiny_model, tokenizer, facts):
    editable = EditableModel(tiny_model("llama"), tokenizer)
    with pytest.raises(ModelError, match=r"layer 9 is out of range.*0 to 3"):
        LocalBaseline(editable, dataclasses.replace(SETTINGS, layer=9))
    editable = EditableModel(tiny_model("mixtral"), tokenizer)
    with pytest.raises(ModelError, match="mixture of experts"):
        LocalBaseline(editable, SETTINGS)
