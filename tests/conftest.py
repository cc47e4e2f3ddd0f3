"""Tiny models of real architectures and a byte-level tokenizer: no network, no downloads."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nulledit import Fact, Probe
from nulledit.config import Recipe, StatisticsSettings
from nulledit.editing.statistics import Manifest, Statistics, key_moments
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.load import model_hash
from nulledit.models.partial import PartialModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

FAMILIES = ("llama", "gpt2", "gptj")
LINES = [
    "The mother tongue of Ada Byron is English, and she lives in London.",
    "Émile Zola! was born in Paris. Then, he said that the river flows to the sea.",
    "Because the harbour of Velm lies on the coast, people there speak Velmish.",
    "I know that Karo Dun works as a baker in the town of Ostrel. You know it too.",
    "Therefore the number of people in the valley is small, and the winters are long.",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices this small are many times slower with threads that wait for a busy core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("NULLEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def plain_logging():
    """The command line sets its logger's level for its process; tests run in one."""
    logger = logging.getLogger("nulledit")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(scope="session")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    core.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def build_model(family, *, dtype=torch.float64, seed=0, layers=4, hidden=16, context=128):
    """A random model of `family`; weights large enough that every block matters."""
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=400,
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=context,
                initializer_range=0.25,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=400,
                n_embd=hidden,
                n_layer=layers,
                n_head=2,
                n_positions=context,
                initializer_range=0.25,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    else:
        model = GPTJForCausalLM(
            GPTJConfig(
                vocab_size=400,
                n_embd=hidden,
                n_layer=layers,
                n_head=2,
                rotary_dim=4,
                n_positions=context,
                initializer_range=0.25,
                bos_token_id=0,
                eos_token_id=0,
                tie_word_embeddings=False,
            )
        )
    return model.to(dtype).eval()


@pytest.fixture
def tiny_model():
    """Builds a tiny random model: `tiny_model("gpt2")`."""
    return build_model


@pytest.fixture(scope="session")
def worlds():
    """A tokenizer, and a trained model per family, made when first asked for: `worlds("llama")`."""
    import world

    words, made = world.tokenizer(), {}

    def get(family):
        if family not in made:
            made[family] = world.trained(family, words)
        return made[family], words

    return get


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


RECIPE = Recipe.from_dict(
    {
        "layers": [1, 2],
        "values": {"steps": 8, "learning_rate": 0.3, "weight_decay": 0.05},
        "contexts": {"texts": ["{}", "Then, he said. {}", "The river. {}"]},
        "null_space": {"rule": "leakage", "value": 0.2},
        "method": {"l2": 0.1},
    }
)


@pytest.fixture
def recipe():
    return RECIPE


def statistics_of(model, tokenizer, layers=(0, 1, 2), lines=tuple(LINES * 2)):
    """Statistics of a tiny model's keys on a few lines, in memory."""
    partial = PartialModel(model)
    rows = [tokenizer(line)["input_ids"] for line in lines]
    moments = key_moments(partial, tokenizer, rows, layers)
    manifest = Manifest(
        model="tiny",
        model_hash=model_hash(model),
        layers=tuple(layers),
        corpus="lines",
        corpus_hash="0",
        settings=StatisticsSettings(packing="lines"),
        dtype="float64",
        tokens=sum(map(len, rows)),
    )
    return Statistics(manifest, {i: Spectrum.of(m.value) for i, m in moments.items()})


@pytest.fixture
def make_statistics(tokenizer):
    return lambda model, layers=(0, 1, 2): statistics_of(model, tokenizer, layers)


@pytest.fixture
def facts():
    return [
        Fact(
            id="ada",
            subject="Ada Byron",
            prompt="The mother tongue of {} is",
            target="Velmish",
            old_answer="English",
            paraphrases=("{} speaks the language",),
            neighbours=(Probe("The mother tongue of Karo Dun is", "English"),),
        ),
        Fact(id="zola", subject="Émile Zola", prompt="{} was born in", target="Ostrel"),
        Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river"),
        Fact(id="karo", subject="Karo Dun", prompt="{} works as a", target="sailor in London"),
    ]
