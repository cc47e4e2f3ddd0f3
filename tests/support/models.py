"""Tiny random models of real architectures, and statistics of their keys."""

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from nulledit.config import Recipe, StatisticsSettings
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, write_weight
from nulledit.models.load import model_hash
from nulledit.models.partial import PartialModel
from nulledit.statistics.collect import key_moments
from nulledit.statistics.manifest import Manifest
from nulledit.statistics.spectra import Statistics

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


EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Those of `ARCHITECTURES` whose MLPs can't be given neurons."""


KINDS = (*FAMILIES, "granite", "gemma2", "mixtral")
"""One of each kind: parallel and plain MLPs, scaled and normed outputs, experts."""


WIDE = (
    *("deepseek_v2", "deepseek_v3", "falcon_h1", "gemma", "glm4", "glm4_moe", "glm4_moe_lite"),
    *("gpt_oss", "lfm2", "llama4_text", "minimax", "minimax_m2", "ministral", "ministral3"),
    *("olmo3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "smollm3"),
)
"""Those that `tools/architecture_trial.py` tries, in tests/test_architectures.py."""


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


def small_tokenizer():
    """Byte-level pieces of a few lines, at most 400."""
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


RECIPE = Recipe.from_dict(
    {
        "layers": [1, 2],
        "values": {"steps": 8, "learning_rate": 0.3, "weight_decay": 0.05},
        "contexts": {"texts": ["{}", "Then, he said. {}", "The river. {}"]},
        "null_space": {"rule": "leakage", "value": 0.2},
        "method": {"l2": 0.1},
    }
)


def statistics_of(model, tokenizer, layers=(0, 1, 2), lines=tuple(LINES * 2), inputs=False):
    """Statistics of a tiny model's keys, or MLP inputs, on a few lines, in memory."""
    rows = [tokenizer(line)["input_ids"] for line in lines]
    moments = key_moments(EditableModel(model, tokenizer), rows, layers, inputs=inputs)
    manifest = Manifest(
        model="tiny",
        model_hash=model_hash(model),
        layers=tuple(layers),
        corpus="lines",
        corpus_hash="0",
        settings=StatisticsSettings(packing="lines"),
        dtype="float64",
        tokens=sum(map(len, rows)),
        inputs=inputs,
    )
    return Statistics(manifest, {i: m.spectrum() for i, m in moments.items()})


SIZES = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def untabled(kind, **more):
    """A model of a family that the table does not name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **more})
    return AutoModelForCausalLM.from_config(config).eval()


def changed(model, layers=(1, 2), scale=0.03):
    """A copy of `model` with other matrices W in `layers`."""
    edited = copy.deepcopy(model)
    partial = PartialModel(edited)
    for layer in layers:
        W = as_out_in(partial.mlp_out(layer)).double()
        noise = torch.randn(W.shape, generator=torch.manual_seed(layer), dtype=torch.float64)
        write_weight(partial.mlp_out(layer), W + scale * noise)
    return edited
