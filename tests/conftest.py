"""Tiny models of real architectures and a byte-level tokenizer: no network, no downloads."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from nulledit import Fact, Probe
from nulledit.config import Recipe, StatisticsSettings
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import model_hash
from nulledit.statistics.collect import key_moments
from nulledit.statistics.manifest import Manifest
from nulledit.statistics.spectra import Statistics

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")

FAMILIES = ("llama", "gpt2", "gptj")
"""Those that every test with a family runs on."""
PLAIN = (
    *FAMILIES,
    "cohere",
    "falcon",
    "gpt_neo",
    "gpt_neox",
    "mistral",
    "mixtral",
    "opt",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "stablelm",
)
SCALED = ("granite",)
NORMED = ("gemma2", "gemma3_text", "olmo2")
ARCHITECTURES = (*PLAIN, *SCALED, *NORMED)
"""Those that the matrix of checks runs on: tests with an `architecture`."""
ONE_GROUP = {"num_key_value_heads": 1}
WINDOW = {"sliding_window": 8}  # shorter than the prompts
MORE = {  # what makes each architecture's own parts matter
    "llama": ONE_GROUP,
    "gptj": {"rotary_dim": 4, "tie_word_embeddings": False},
    "cohere": {**ONE_GROUP, "logit_scale": 0.25},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.25},
    "mistral": {**ONE_GROUP, **WINDOW},
    "mixtral": {**ONE_GROUP, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {**ONE_GROUP, **WINDOW},
    "qwen2": {  # its tokenizer gets a padding token when loaded
        **ONE_GROUP,
        "vocab_size": 408,
        **WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
    "qwen2_moe": {
        **ONE_GROUP,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {
        **ONE_GROUP,
        "head_dim": 16,
        **WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
    "qwen3_moe": {
        **ONE_GROUP,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "stablelm": ONE_GROUP,
    "granite": {
        **ONE_GROUP,
        "residual_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "gemma2": {  # where padding is as long as the window, it is nan in float64
        **ONE_GROUP,
        "head_dim": 8,
        "sliding_window": 16,
    },
    "gemma3_text": {**ONE_GROUP, "head_dim": 8, **WINDOW},
    "olmo2": ONE_GROUP,
}
OWN_WIDTH = ("gpt2", "gptj", "falcon", "opt")  # families without `intermediate_size`
LINES = [
    "The mother tongue of Ada Byron is English, and she lives in London.",
    "Émile Zola! was born in Paris. Then, he said that the river flows to the sea.",
    "Because the harbour of Velm lies on the coast, people there speak Velmish.",
    "I know that Karo Dun works as a baker in the town of Ostrel. You know it too.",
    "Therefore the number of people in the valley is small, and the winters are long.",
]


def pytest_addoption(parser):
    parser.addoption("--world-seed", type=int, default=0, help="seed of the trained worlds")
    parser.addoption("--threads", type=int, default=1, help="of torch, in the tests' own process")
    parser.addoption("--write-contract", action="store_true", help="write tests/contract.json")


@pytest.fixture(scope="session", autouse=True)
def one_thread(pytestconfig):
    """Matrices this small are many times slower with threads that wait for a busy core."""
    torch.set_num_threads(pytestconfig.getoption("--threads"))


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


def config_of(family, *, layers=4, hidden=16, context=128):
    """The configuration of a tiny model; weights large enough that every block matters."""
    sizes = {
        "vocab_size": 400,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **MORE.get(family, {}),
    }
    if family not in OWN_WIDTH:
        sizes["intermediate_size"] = 3 * hidden
    return AutoConfig.for_model(family, **sizes)


def build_model(family, *, dtype=torch.float64, seed=0, layers=4, hidden=16, context=128):
    """A random model of `family`."""
    torch.manual_seed(seed)
    config = config_of(family, layers=layers, hidden=hidden, context=context)
    # Experts: the grouped kernel, which is transformers' own choice, has no float64.
    kernel = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, **kernel)
    if family not in FAMILIES:
        for parameter in model.parameters():  # norms of one and biases of nought would hide much
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


@pytest.fixture
def tiny_model():
    """Builds a tiny random model: `tiny_model("gpt2")`."""
    return build_model


@pytest.fixture(scope="session")
def worlds(pytestconfig):
    """A tokenizer, and a trained model per family, made when first asked for: `worlds("llama")`.

    What rests on them must hold with any `--world-seed`: a path of training hangs on rounding too.
    """
    import world

    words, made, seed = world.tokenizer(), {}, pytestconfig.getoption("--world-seed")

    def get(family):
        if family not in made:
            made[family] = world.trained(family, words, seed=seed)
        return made[family], words

    return get


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
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
    rows = [tokenizer(line)["input_ids"] for line in lines]
    moments = key_moments(EditableModel(model, tokenizer), rows, layers)
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
    return Statistics(manifest, {i: m.spectrum() for i, m in moments.items()})


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
