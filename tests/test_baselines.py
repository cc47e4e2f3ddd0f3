"""Baselines: facts in the prompt against hand-made prompts, LoRA against plain computations."""

import dataclasses
import random
import sys
from importlib.util import find_spec

import pytest
import torch

from nulledit import Editor, Fact, Probe
from nulledit.baselines import LoraBaseline, LoraSettings, in_context, lora_finetune
from nulledit.baselines.adapter import is_wanted, linear_modules
from nulledit.baselines.in_context import prefaces_of
from nulledit.baselines.training import target_losses
from nulledit.config import ContextSettings
from nulledit.editing.values import plan_rows
from nulledit.errors import ConfigError, FactError, ModelError
from nulledit.evaluation import contains, evaluate, generate_answers, rates
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import model_hash
from nulledit.models.partial import PartialModel

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="the extra `lora` is absent")
TEXTS = ("{}", "Then, he said. {}", "The river. {}")
SETTINGS = LoraSettings(
    rank=4,
    epochs=3,
    learning_rate=0.02,
    batch_size=2,
    stop_loss=0.0,
    contexts=ContextSettings(texts=TEXTS),
)


@pytest.fixture
def model(tiny_model, family):
    return tiny_model(family)


@pytest.fixture
def rel(family):
    """GPT-J computes its attention in float32 whatever its weights are."""
    return 1e-4 if family == "gptj" else 1e-8


def changed(**fields):
    return dataclasses.replace(SETTINGS, **fields)


def plain_loss(model, tokenizer, prompt, answer):
    """Mean loss of the answer's tokens, one text alone, all logits of the plain forward."""
    whole = tokenizer(f"{prompt} {answer}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return -torch.stack([logs[i - 1, whole[i]] for i in range(start, len(whole))]).mean()


@torch.no_grad()
def plain_nll(model, tokenizer, prompt, answer):
    return float(plain_loss(model, tokenizer, prompt, answer))


def adapter(model):
    """All trained numbers in one vector."""
    return torch.cat([p.detach().ravel() for p in model.parameters() if p.requires_grad])


# -- facts in the prompt -----------------------------------------------------------------------


def test_own_statement_stands_before_every_prompt_of_its_fact(model, tokenizer, facts, rel):
    result = in_context(EditableModel(model, tokenizer), facts, generate=False)
    told = "Imagine that The mother tongue of Ada Byron is Velmish. "
    prompts = ["The mother tongue of Ada Byron is", "Ada Byron speaks the language"]
    prompts += ["The mother tongue of Karo Dun is"]
    found = [s for s in result.scores if s.query.fact_id == "ada"]
    assert [s.query.prompt for s in found] == prompts  # the queries of `evaluate`, unchanged
    for item in found:
        expected = plain_nll(model, tokenizer, told + item.query.prompt, item.query.answer)
        assert item.answer_nll == pytest.approx(expected, rel=rel)
        other = plain_nll(model, tokenizer, told + item.query.prompt, item.query.other)
        assert item.other_nll == pytest.approx(other, rel=rel)
    assert result.rates == rates(result.scores)
    assert result.generation is None
    assert result.answers == {}
    assert result.perplexity is None


def test_an_empty_preface_but_the_statement_is_needed(tiny_model, tokenizer, facts):
    for preface in ("Imagine that. ", "{statement} {statement}", "{}"):
        with pytest.raises(ConfigError, match="exactly one"):
            in_context(EditableModel(tiny_model("llama"), tokenizer), facts, preface=preface)


def test_answers_are_those_after_the_same_text(tiny_model, tokenizer, facts):
    model = EditableModel(tiny_model("llama"), tokenizer)
    result = in_context(model, facts, preface="New: {statement}\n", crowd=1, seed=3)
    prefaces = prefaces_of(facts, preface="New: {statement}\n", crowd=1, seed=3)
    prompts = [prefaces[f.id] + f.render(f.prompt) for f in facts]
    said = generate_answers(model, prompts)
    assert list(result.answers.items()) == list(zip([f.id for f in facts], said, strict=True))
    assert result.generation.mean == sum(map(contains, said, [f.target for f in facts])) / 4


def test_crowd_has_each_statement_once_and_its_own_always(facts):
    for crowd in range(len(facts)):
        texts = prefaces_of(facts, preface="<{statement}>", crowd=crowd, seed=1)
        for fact in facts:
            parts = texts[fact.id].strip("<>").split("><")
            assert len(set(parts)) == len(parts) == crowd + 1
            assert f"{fact.render(fact.prompt)} {fact.target}" in parts
    assert len(set(texts.values())) == 1  # everybody reads all of them, in one order


def test_crowd_is_drawn_with_the_seed_not_by_place(facts):
    def draw(seed, order=facts):
        return prefaces_of(order, preface="{statement}. ", crowd=2, seed=seed)

    assert draw(0) == draw(0, random.Random(5).sample(facts, 4))
    assert len({tuple(draw(seed).values()) for seed in range(10)}) > 1
    before = random.getstate()
    draw(0)
    assert random.getstate() == before


def test_braces_in_texts_are_left_alone():
    fact = Fact(id="a", subject="set {x}", prompt="In {} there is", target="{statement}")
    text = prefaces_of([fact], preface="{statement}. ", crowd=0, seed=0)["a"]
    assert text == "In set {x} there is {statement}. "


def test_more_statements_than_there_are_is_refused(tiny_model, tokenizer, facts):
    for crowd in (-1, 4):
        with pytest.raises(ConfigError, match="expected 0 to 3"):
            in_context(EditableModel(tiny_model("llama"), tokenizer), facts, crowd=crowd)
    with pytest.raises(FactError, match="two facts have the id 'ada'"):
        in_context(EditableModel(tiny_model("llama"), tokenizer), [facts[0], facts[0]])


def test_too_long_for_the_context_is_refused_before_anything_runs(
    tiny_model, tokenizer, facts, monkeypatch
):
    model = EditableModel(tiny_model("llama", context=48), tokenizer)
    monkeypatch.setattr(model.model.base_model, "forward", None)
    with pytest.raises(FactError, match=r"4 statements in front.*context of 48: lower crowd"):
        in_context(model, facts, crowd=3)
    long = dataclasses.replace(facts[1], prompt="{} " + "was born and was born " * 9)
    with pytest.raises(FactError, match=r"'zola'.*1 statements in front.*shorten"):
        in_context(model, [long])


def test_room_for_the_generated_answer_counts(tiny_model, tokenizer, facts):
    fact = dataclasses.replace(facts[1], neighbours=())
    text = prefaces_of([fact], preface="{statement}. ", crowd=0, seed=0)["zola"]
    length = len(tokenizer(text + fact.render(fact.prompt))["input_ids"])
    tight = tiny_model("llama", context=length + 11)
    in_context(EditableModel(tight, tokenizer), [fact], preface="{statement}. ", generate=False)
    with pytest.raises(FactError, match="zola"):
        in_context(EditableModel(tight, tokenizer), [fact], preface="{statement}. ")
    roomy = tiny_model("llama", context=length + 12)
    in_context(EditableModel(roomy, tokenizer), [fact], preface="{statement}. ")


def test_an_editor_is_asked_without_its_edits(
    tiny_model, tokenizer, facts, recipe, make_statistics
):
    model = tiny_model("llama")
    expected = in_context(EditableModel(model, tokenizer), facts)
    statistics = make_statistics(model, recipe.layers)
    editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics)
    editor.edit(facts[:2])
    edited = model_hash(model)
    assert in_context(editor.editable, facts) != expected
    with editor.base_weights():
        assert in_context(editor.editable, facts) == expected
    assert model_hash(model) == edited


# -- LoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("mlp_out",), ("attention", "mlp_out"), ("mlp",)])
def test_linear_modules_are_found_in_the_model(tiny_model, family, targets):
    attention = {
        "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
        "gpt2": {"attn.c_attn", "attn.c_proj"},
        "gptj": {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"},
    }[family]
    mlp = {
        "llama": ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"],
        "gpt2": ["mlp.c_proj", "mlp.c_fc"],
        "gptj": ["mlp.fc_out", "mlp.fc_in"],
    }[family]
    names = linear_modules(PartialModel(tiny_model(family)), targets, (1, 3))
    root = "model.layers" if family == "llama" else "transformer.h"
    expected = attention if "attention" in targets else set()
    expected = expected | set(mlp if "mlp" in targets else mlp[:1])
    assert set(names) == {f"{root}.{i}.{name}" for i in (1, 3) for name in expected}
    assert len(names) == len(set(names))


def test_an_mlp_without_a_module_of_its_own_is_told_from_attention():
    """Some families keep fc1 and fc2 in the block itself."""
    names = ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")

    def wanted(*targets):
        return [name for name in names if is_wanted(name, "fc2", targets)]

    assert wanted("attention") == ["self_attn.q_proj", "self_attn.out_proj"]
    assert wanted("mlp") == ["fc1", "fc2"]
    assert wanted("mlp_out") == ["fc2"]


def test_target_losses_are_those_of_each_row_alone(model, tokenizer, facts, rel):
    editable = EditableModel(model, tokenizer)
    rows = [row for fact in facts for row in plan_rows(fact, editable.encoder, TEXTS)]
    texts = [
        (context.format(fact.render(fact.prompt)), fact.target)
        for fact in facts
        for context in TEXTS
    ]
    editable.pad_id = 7
    found = target_losses(editable, rows)
    expected = [plain_nll(model, tokenizer, prompt, target) for prompt, target in texts]
    assert found.tolist() == pytest.approx(expected, rel=rel)
    editable.pad_id = 8
    assert torch.equal(target_losses(editable, rows), found)


def hooks(module):
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


@needs_peft
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # newer name in 5.23
def test_the_model_is_bit_identical_afterwards(model, tokenizer, facts):
    model.train()  # as some would pass it
    model.config.pretraining_tp = 2
    config = model.config.to_dict()
    next(model.parameters()).requires_grad_(False)
    model.gradient_checkpointing_enable()
    modules = dict(model.named_modules())
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooked = {n: hooks(m) for n, m in model.named_modules()}
    attributes = set(vars(model))
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    with lora_finetune(EditableModel(model, tokenizer), facts, SETTINGS):
        assert dict(model.named_modules()).keys() != modules.keys()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(model.named_modules()) == modules
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parameters
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(m.training for m in model.modules())
    assert {n: hooks(m) for n, m in model.named_modules()} == hooked
    assert all(p.grad is None for p in model.parameters())
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == config


@needs_peft
def test_an_error_inside_takes_the_adapter_off(tiny_model, tokenizer, facts):
    model = tiny_model("gpt2")
    before = model_hash(model)
    with pytest.raises(KeyError), lora_finetune(EditableModel(model, tokenizer), facts, SETTINGS):
        raise KeyError
    long = dataclasses.replace(facts[0], prompt="{} " + "river " * 200)
    with (
        pytest.raises(FactError, match=r"fact 'ada'.*longer than"),
        lora_finetune(EditableModel(model, tokenizer), [long], SETTINGS),
    ):
        pass
    assert model_hash(model) == before


@pytest.mark.few("llama", of="family")
@needs_peft
def test_training_teaches_the_facts_until_the_loss_is_low(family, tiny_model, tokenizer, facts):
    model = tiny_model(family, hidden=48)
    editor = Editor(model, tokenizer)
    before = evaluate(editor.editable, facts, generate=False)
    assert before.rates["efficacy_strict"].mean < 1
    settings = changed(rank=8, epochs=100, stop_loss=0.1)
    told = []
    with lora_finetune(
        editor.editable, facts, settings, lambda *state: told.append(state)
    ) as baseline:
        after = evaluate(editor.editable, facts, generate=False)
        report = baseline.reports[0]
    assert report.epochs < 100
    assert told == [("lora", n + 1, 100) for n in range(report.epochs)]
    assert report.losses.keys() == {"ada", "zola", "velm", "karo"}
    assert sum(report.losses.values()) / 4 < 0.1
    assert after.rates["efficacy_strict"].mean == 1
    assert evaluate(editor.editable, facts, generate=False) == before


@needs_peft
def test_first_update_is_adams_on_the_plain_gradient(model, tokenizer, facts, rel):
    """B starts at 0: A has no gradient, and Adam's first step of B is lr · g/(|g| + eps)."""
    settings = changed(epochs=1, batch_size=4)
    with LoraBaseline(EditableModel(model, tokenizer), settings) as baseline:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        start = {n: p.detach().clone() for n, p in named.items()}
        loss = sum(
            plain_loss(model, tokenizer, text.format(f.render(f.prompt)), f.target)
            for f in facts
            for text in TEXTS
        ) / (len(facts) * len(TEXTS))
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        report = baseline.train(facts)
        assert sum(report.losses.values()) / 4 == pytest.approx(loss.item(), rel=rel)
        for name, parameter in named.items():
            step = parameter.detach() - start[name]
            g = gradients[name]
            if "lora_A" in name:
                assert not step.any()
            else:
                expected = -settings.learning_rate * g / (g.abs() + 1e-8)
                assert torch.allclose(step, expected, rtol=100 * rel, atol=100 * rel)


@needs_peft
def test_results_do_not_depend_on_what_runs_together(tiny_model, tokenizer, facts):
    """Padding and chunks: rows one by one, some, all."""
    trained = []
    for positions in (1, 60, 10000):
        model = tiny_model("llama")
        with lora_finetune(
            EditableModel(model, tokenizer), facts, changed(positions=positions)
        ) as baseline:
            trained.append(adapter(baseline.model.model))
    assert torch.allclose(trained[0], trained[1], rtol=1e-7, atol=1e-9)
    assert torch.allclose(trained[0], trained[2], rtol=1e-7, atol=1e-9)


@needs_peft
def test_seeds_repeat_and_differ(tiny_model, tokenizer, facts):
    def weights(seed):
        with lora_finetune(
            EditableModel(tiny_model("gpt2"), tokenizer), facts, changed(seed=seed, epochs=1)
        ) as baseline:
            return adapter(baseline.model.model)

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@needs_peft
def test_a_stream_goes_on_with_one_adapter(tiny_model, tokenizer, facts):
    model = tiny_model("llama")
    with LoraBaseline(EditableModel(model, tokenizer), changed(epochs=4)) as baseline:
        untrained = target_losses(baseline.model, baseline._rows(facts[0])).mean()
        first = baseline.train(facts[:2])
        after_first = target_losses(baseline.model, baseline._rows(facts[0])).mean()
        held = adapter(baseline.model.model)
        second = baseline.train(facts[2:])
        moved = adapter(baseline.model.model)
    assert after_first < untrained
    assert first.losses.keys() == {"ada", "zola"}
    assert second.losses.keys() == {"velm", "karo"}
    assert baseline.reports == [first, second]
    assert not torch.equal(held, moved)
    with pytest.raises(ValueError, match="closed"):
        baseline.train(facts)


@needs_peft
def test_layers_and_targets_bound_the_adapter(model, tokenizer):
    settings = changed(targets=("mlp_out",), layers=(2,))
    with LoraBaseline(EditableModel(model, tokenizer), settings) as baseline:
        d_in = 48 if model.config.model_type == "llama" else 64
        assert baseline.size == 4 * (d_in + 16)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(names) == 2
        assert all(".2.mlp." in name for name in names)


@needs_peft
def test_no_second_adapter_and_no_layer_that_is_not_there(tiny_model, tokenizer):
    editable = EditableModel(tiny_model("llama"), tokenizer)
    with LoraBaseline(editable, SETTINGS):
        modules = dict(editable.model.named_modules())
        with pytest.raises(ModelError, match="adapter already"):
            LoraBaseline(editable, changed(targets=("attention",)))
        assert dict(editable.model.named_modules()) == modules
    with pytest.raises(ModelError, match="layer 4 is out of range: the model has layers 0 to 3"):
        LoraBaseline(editable, changed(layers=(4,)))


@needs_peft
def test_a_loss_that_is_not_finite_is_named(tiny_model, tokenizer, facts):
    model = tiny_model("llama")
    with (
        pytest.raises(ModelError, match=r"not finite in pass \d+; use a smaller learning rate"),
        lora_finetune(EditableModel(model, tokenizer), facts, changed(learning_rate=1e200)),
    ):
        pass


@needs_peft
def test_contexts_are_sampled_from_the_unedited_model(tiny_model, tokenizer):
    settings = changed(contexts=ContextSettings(count=2, tokens=3), seed=4)
    with LoraBaseline(EditableModel(tiny_model("llama"), tokenizer), settings) as baseline:
        assert baseline.contexts[0] == "{}"
        assert len(baseline.contexts) == 3
        assert all(text.count("{}") == 1 for text in baseline.contexts)


@needs_peft
def test_half_precision_trains_in_float32(tiny_model, tokenizer, facts):
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = model_hash(model)
    with lora_finetune(EditableModel(model, tokenizer), facts, SETTINGS) as baseline:
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert sum(baseline.reports[0].losses.values()) < float("inf")
    assert model_hash(model) == before


def test_without_peft_the_error_says_what_to_install(tiny_model, tokenizer, facts, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(ConfigError, match=r"pip install nulledit\[lora\]"),
        lora_finetune(EditableModel(tiny_model("llama"), tokenizer), facts),
    ):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"stop_loss": -1}, "stop_loss is -1"),
        ({"rank": 1.5}, "expected a whole number"),
        ({"targets": ()}, "targets is"),
        ({"targets": ("heads",)}, "expected one of attention, mlp, mlp_out"),
        ({"layers": ()}, "expected some blocks"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**fields)


def test_neighbours_without_an_answer_are_left_out(tiny_model, tokenizer):
    fact = Fact(
        id="a",
        subject="Velm",
        prompt="The harbour of {} lies on the",
        target="river",
        neighbours=(Probe("The winters are"),),
    )
    found = in_context(EditableModel(tiny_model("llama"), tokenizer), [fact], generate=False)
    assert [s.query.kind for s in found.scores] == ["efficacy"]
    assert found.rates["specificity"] is None
