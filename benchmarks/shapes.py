"""Randomly initialised models of the shapes that the papers edit, and a tokenizer for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

SHAPES = {
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "gpt-j-6b": GPTJConfig(tie_word_embeddings=False),
    "llama3-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
    ),
    "qwen3-8b": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
    ),
}
"""Models of published recipes, and Qwen3-8B."""
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 112,
    "num_hidden_layers": 10,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 8000,
}
"""What a Llama's or a Qwen's shape has in a test."""
VOCABULARY = 8000  # of the tokenizer: about a token a word, as the models' own


def random_model(name, *, dtype, device, blocks=None, changes=None):
    """A model of that shape with random weights: of `blocks` blocks, with `changes`, if given."""
    told = (
        SHAPES[name].to_dict() | (changes or {}) | ({"num_hidden_layers": blocks} if blocks else {})
    )
    told.pop("layer_types", None)  # which would be of another depth
    config = type(SHAPES[name])(**told)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def tokenizer_of(texts):
    """A byte-level tokenizer trained on `texts`."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        special_tokens=["<s>"],
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<s>", eos_token="<s>")
