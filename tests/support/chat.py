"""Tokenizers with a chat template, and tiny models that read their special tokens."""

import copy

import torch
from tokenizers import processors

from support.models import build_model

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n"
    "{% endif %}{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatty(tokenizer, template):
    """A tokenizer that also puts a token in front of every text by itself."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>"]}
    )
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "<|im_end|>"})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.chat_template = template
    return made


def model_for(words, family="llama", **options):
    """A tiny model that has embeddings of the tokenizer's special tokens, and ends texts as it."""
    model = build_model(family, **options)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    for parameter in (model.get_input_embeddings(), model.get_output_embeddings()):
        parameter.weight.data[400:] = 0.25 * torch.randn_like(parameter.weight[400:])
    model.generation_config.eos_token_id = words.eos_token_id
    return model
