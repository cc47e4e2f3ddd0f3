"""GGUF files of tiny models, by the maps that transformers reads GGUF with, inverted."""

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "phi3": "phi3",
    "qwen3_moe": "qwen3moe",
}
"""llama.cpp's names, by `config.model_type`."""
NORMS_LESS_ONE = ("gemma2", "gemma3")


def as_in_gguf(name, weight, arch, config):
    """A weight as llama.cpp's converter writes it: what transformers undoes on reading."""
    if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    if arch in NORMS_LESS_ONE and "norm.weight" in name:
        return weight + 1
    turned = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
    return weight.T if arch == "gpt2" and any(part in name for part in turned) else weight


def write_base(model, file, type_="F32", **fields):
    """`model` as a GGUF file whose matrices are of `type_`."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    out = gguf.GGUFWriter(file, arch)
    out.add_type("model")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(width_of(config))
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    out.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-6))
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_token_list([f"word {i}" for i in range(config.vocab_size)])
    for name, value in fields.items():
        out.add_uint32(name.replace("__", "."), value)
    for name, weight in named(model, arch):
        plain = as_in_gguf(name, weight, arch, config)
        kind = gguf.GGMLQuantizationType["F32" if plain.ndim == 1 else type_]
        out.add_tensor(
            name, gguf.quants.quantize(np.ascontiguousarray(plain), kind), raw_dtype=kind
        )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def named(model, arch):
    """GGUF's name and the values of each weight, float32."""
    state = model.state_dict()
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config={})
    names = get_gguf_hf_weights_map(model, processor)
    if model.config.tie_word_embeddings:
        names.pop("output.weight", None)
    fused = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, model.config.num_hidden_layers)
    for name in [n for n in state if ".experts." in n]:
        if name.endswith("down_proj"):
            yield f"{fused.get_name(name)}.weight", state[name].float().numpy()
    for name, own in names.items():
        if own in state and "_exps" not in name:
            yield name, state[own].float().numpy()


def width_of(config):
    """Units of an MLP."""
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def read_back(file, like):
    """The file's weights, by transformers' own reader, in a model of the configuration of `like`
    but with the file's width."""
    width = gguf.GGUFReader(file).fields
    arch = ARCHITECTURES[like.config.model_type]
    config = type(like.config).from_dict(like.config.to_dict())
    name = "n_inner" if arch == "gpt2" else "intermediate_size"
    setattr(config, name, int(width[f"{arch}.feed_forward_length"].contents()))
    model = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.to(torch.float64).eval()


def tensors_of(file):
    """Type and bytes of each tensor."""
    return {
        t.name: (t.tensor_type.name, tuple(t.shape), t.data.tobytes())
        for t in gguf.GGUFReader(file).tensors
    }
