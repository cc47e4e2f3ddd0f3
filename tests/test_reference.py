"""The transparent reference against the mathematics it claims to follow."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PATH = Path(__file__).parents[1] / "benchmarks" / "reference.py"
SPEC = importlib.util.spec_from_file_location("reference", PATH)
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)

LINES = ["The mother tongue of Ada Byron is English", "Émile Zola! lives in Rome. Then,"]
CONTEXTS = ["{}", "Then, he said. {}", "In Rome. {}"]
FACTS = [
    SimpleNamespace(subject="Ada Byron", prompt="The mother tongue of {} is", target="Rome then"),
    SimpleNamespace(subject="Émile Zola", prompt="{} lives in", target="English"),
]
# z at block 0: what the last block says of one token cannot reach the tokens after it
SETTINGS = {"layer": 0, "contexts": CONTEXTS, "lr": 0.5, "kl_weight": 0.0625, "decay": 0.01}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are 30 times slower with threads that wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def moments(model, tokenizer):
    return {layer: reference.second_moment(model, tokenizer, LINES, layer) for layer in (0, 1)}


def median(moment):
    return torch.linalg.eigvalsh(moment).median()


def test_second_moment_counts_every_token_once(model, tokenizer, moments):
    rows = []
    for line in LINES:
        ids, mask = reference.pad(tokenizer, [line], model.device)
        module = reference.mlp_out(model, 1)
        rows.append(reference.read(model, ids, mask, module, inputs=True)[0])
    K = torch.cat(rows)
    torch.testing.assert_close(moments[1], K.mT @ K / len(K), rtol=1e-5, atol=1e-7)


def test_subject_last_holds_the_last_character(tokenizer):
    for text, subject in (
        ("Then, Zola likes {}!", "Zola"),
        ("{} lives", "Émile Zola"),
        ("{}", "é"),
    ):
        at = reference.subject_last(tokenizer, text, subject)
        ids = tokenizer(reference.fill(text, subject))["input_ids"]
        before, upto = tokenizer.decode(ids[:at]), tokenizer.decode(ids[: at + 1])
        wanted = reference.fill(text[: text.index("{}") + 2], subject)
        assert upto.startswith(wanted)
        assert not before.startswith(wanted)


def test_z_makes_the_target_likelier_and_stays_in_the_ball(model, tokenizer):
    fact = SimpleNamespace(subject="Ada Byron", prompt="Rome is of {}", target="English")

    def compute_z(**settings):
        return reference.compute_z(model, tokenizer, fact, **SETTINGS, **settings)

    free = compute_z(steps=12, clamp=4.0, stop_loss=0.0)
    assert len(free.losses) == 12
    assert free.losses[-1] < free.losses[0] - 1
    small = compute_z(steps=4, clamp=0.05, stop_loss=0.0)
    torch.testing.assert_close(small.delta.norm(), 0.05 * small.initial.norm())
    torch.testing.assert_close(small.z, small.initial + small.delta)
    stopped = compute_z(steps=8, clamp=4.0, stop_loss=100.0)
    assert len(stopped.losses) == 1
    assert stopped.delta.norm() == 0


def test_first_loss_is_the_mean_over_contexts_of_the_targets_own(model, tokenizer):
    settings = {**SETTINGS, "steps": 1, "clamp": 4.0, "stop_loss": 0.0}
    value = reference.compute_z(model, tokenizer, FACTS[0], **settings)
    losses = []
    for context in CONTEXTS:
        text = reference.fill(reference.fill(context, FACTS[0].prompt), FACTS[0].subject)
        start = len(tokenizer(text)["input_ids"])
        ids = torch.tensor([tokenizer(f"{text} {FACTS[0].target}")["input_ids"]])
        assert ids.shape[1] - start > 1
        labels = torch.where(torch.arange(ids.shape[1]) >= start, ids, -100)
        losses.append(model(input_ids=ids, labels=labels).loss.item())
    assert value.losses[0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_solve_is_the_minimum_inside_the_null_space(moments):
    generator = torch.Generator().manual_seed(0)
    K, old = (torch.randn(32, n, generator=generator, dtype=torch.float64) for n in (3, 4))
    R = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    P = reference.projector(moments[0], 1.1 * median(moments[0]))
    assert 8 < P.trace() < 30
    torch.testing.assert_close(P @ P, P)
    update = reference.solve(K, R, P, old @ old.mT, 0.1).requires_grad_()
    torch.testing.assert_close(update @ P, update)
    loss = (update @ K - R).square().sum() + (update @ old).square().sum()
    (gradient,) = torch.autograd.grad(loss + 0.1 * update.square().sum(), update)
    assert (gradient @ P).norm() < 1e-10 * R.norm()
    assert gradient.norm() > 1e-3 * R.norm()  # without P it is no minimum


def test_batch_writes_its_updates_and_remembers_its_keys(model, tokenizer, moments):
    zs = reference.current_z(model, tokenizer, FACTS, 1)
    zs = zs + torch.linspace(-1, 1, zs.numel(), dtype=zs.dtype).view_as(zs)
    projectors = {layer: reference.projector(C, 1.1 * median(C)) for layer, C in moments.items()}
    history = {layer: torch.zeros_like(P) for layer, P in projectors.items()}
    before = {layer: reference.mlp_out(model, layer).weight.detach().clone() for layer in (0, 1)}
    first_keys = reference.compute_keys(model, tokenizer, FACTS, 0, CONTEXTS)
    missing = (zs - reference.current_z(model, tokenizer, FACTS, 1)).norm()

    done = reference.alphaedit_batch(
        model,
        tokenizer,
        FACTS,
        zs,
        layers=(0, 1),
        projectors=projectors,
        history=history,
        l2=1e-3,
        contexts=CONTEXTS,
        dtype=torch.float64,
    )
    torch.testing.assert_close(done[0].keys, first_keys.mT)
    for layer, (keys, _, update) in done.items():
        weight = reference.mlp_out(model, layer).weight.detach()
        torch.testing.assert_close(weight, before[layer] + update)
        torch.testing.assert_close(history[layer], keys @ keys.mT)
        reread = reference.compute_keys(model, tokenizer, FACTS, layer, CONTEXTS)
        torch.testing.assert_close(reread.mT, keys)  # a layer's edit leaves its own keys alone
    assert (zs - reference.current_z(model, tokenizer, FACTS, 1)).norm() < 0.7 * missing
