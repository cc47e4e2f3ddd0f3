"""A tiny random model of any architecture of transformers: its default configuration, shrunk."""

from __future__ import annotations

import copy
import re
import tempfile
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

LAYERS, HIDDEN, HEADS, HEAD = 4, 16, 2, 8
VOCABULARY, CONTEXT, WINDOW = 408, 256, 8

SIZES: tuple[tuple[str, int], ...] = (  # the first pattern that a whole field's name fits
    (r".*token_(id|index)|mask_index|unk_index|lang_id", 0),
    (r"(decoder_)?vocab_size(_per_layer_input)?|unpadded_vocab_size", VOCABULARY),
    (
        r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|model_max_length)",
        CONTEXT,
    ),
    (r"max_(source|target)_positions|original_max_position_embeddings", CONTEXT),
    (
        r"(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim)",
        HIDDEN,
    ),
    (
        r"(input|output)_embedding_size|hidden_(dim|size_global)|backbone_hidden_size|attention_hidden_size",
        HIDDEN,
    ),
    (r"lru_width|hidden_size_per_layer_input|ple_embed_dim|router_hidden_size", HIDDEN),
    (
        r"num_hidden_layers|(num|n|decoder|encoder)_layers?|num_(de|en)coder_layers|num_blocks",
        LAYERS,
    ),
    (r"(num_|n_|decoder_|encoder_|swa_num_|num_decoder_|num_encoder_)?(attention_)?heads?", HEADS),
    (r"(swa_)?num_(key_value|kv)_heads|num_query_groups|index_n_heads", 1),
    (r"linear_num_(key_)?heads", 2),
    (r"linear_num_value_heads", 4),
    (r"qk_head_dim", 2 * HEAD),
    (r".*head_(dim|size)|d_head|dim_head|kv_channels|qk_(rope|nope)_head_dim|rotary_dim", HEAD),
    (r"first_k_dense_replace|num_dense_layers|num_shared_experts|n_shared_experts", 1),
    (r"(q|kv|o)_lora_rank|laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank", HEAD),
    (r"(\w*_)?(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size)(_mlp)?", 3 * HIDDEN),
    (r"dff|dim_ff|d_inner|n_inner", 3 * HIDDEN),
    (r"(n_routed|num|num_local|moe_num)_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|topk_group", 2),
    (r"n_group|num_expert_group", 2),
    (r"sliding_window(_size)?|window_size|attention_window_size|attention_chunk_size", WINDOW),
    (r"mamba_(d_state|d_head|headdim|head_dim)|ssm_state_size|state_size", HEAD),
    (r"mamba_(n|num)_heads|n_mamba_heads", 4),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"n_groups|mamba_n_?groups", 1),
    (r"(mamba_)?chunk_size|block_size|index_block_size", 8),
)
"""Of integer fields of a configuration; others stay as they are."""

PATTERN = ["sliding_attention", "full_attention"] * 2
SHARED = {"num_kv_shared_layers": 0}
MORE: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4, "n_embd": 32, "rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": PATTERN,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in set(PATTERN)
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "diffllama": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
    },
    "dots3_note_text": {
        **{"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS},
        **{"swa_q_lora_rank": HEAD, "swa_kv_lora_rank": HEAD, "swa_head_dim": 2 * HEAD},
        **{"swa_qk_nope_head_dim": HEAD, "swa_v_head_dim": HEAD, "head_dim": 2 * HEAD},
    },
    "gemma3n": {"text_config": SHARED},
    "gemma3n_text": SHARED,
    "gemma4_unified_text": SHARED,
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "openai-gpt": {"n_positions": CONTEXT},
    "mamba2": {"num_heads": 4},
    "nemotron_h": {
        "layers_block_type": ["mlp", "attention", "mlp", "mamba"],
        "num_hidden_layers": LAYERS,
    },
    "nemotron": {"num_key_value_heads": 1},
    "qwen4_exp_text": {
        "ple_embed_dim": HIDDEN,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 1000,
    },
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "num_hidden_layers": 4},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
    },
}
"""What single architectures need besides, by model type."""


MORE["qwen4_exp"] = {"text_config": MORE["qwen4_exp_text"]}


def shrunk(kind: type[PreTrainedConfig], more: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The default configuration of `kind` with small sizes, its sub-configurations, too."""
    return kind(**_arguments(kind, more or {}))


def _arguments(kind: type[PreTrainedConfig], more: dict[str, Any]) -> dict[str, Any]:
    default = kind()
    found: dict[str, Any] = {}
    depth = max(
        (v for f, v in vars(default).items() if _size(f) == LAYERS and isinstance(v, int)),
        default=0,
    )
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = _arguments(type(value), more.get(name, {}))
        elif isinstance(value, bool) or name.startswith("_") or name in more:
            continue
        elif isinstance(value, int):
            size = _size(name)
            if size is not None and (value > size or "token_i" in name or "vocab_size" in name):
                found[name] = size
        elif isinstance(value, list) and name.endswith("token_id"):
            found[name] = 0
        elif isinstance(value, list) and depth and len(value) == depth > LAYERS:
            found[name] = _each_kind(value)
    for name, size in {"head_dim": HEAD, "pad_token_id": 0}.items():
        if vars(default).get(name, size) is None:
            found[name] = size
    if "kv_lora_rank" in vars(default):
        found["num_key_value_heads"] = HEADS
    if "is_decoder" in vars(default):
        found["is_decoder"] = True
    found |= {name: 0.25 for name in ("initializer_range", "init_std") if name in vars(default)}
    return {**found, **{k: v for k, v in more.items() if not isinstance(v, dict) or k not in found}}


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _each_kind(values: list[Any]) -> list[Any]:
    """As many as there are layers, in their order, every kind among them."""
    kinds = list(dict.fromkeys(map(str, values)))[:LAYERS]
    places = [next(i for i, v in enumerate(values) if str(v) == kind) for kind in kinds]
    for i in range(len(values)):
        if len(places) == LAYERS:
            break
        if i not in places:
            places.append(i)
    return [copy.deepcopy(values[i]) for i in sorted(places)]


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, no per-layer inputs": ("gemma4_text", {"hidden_size_per_layer_input": 0}),
    "gemma4_text, experts": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "gemma4_unified_text, shared keys": (
        "gemma4_unified_text",
        {
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}),
}
"""Other forms of an architecture: its model type, and what they have besides."""


WITHOUT_BFLOAT16 = ("xlstm",)
"""Their own code mixes it with float32."""
FLOAT32 = ("inkling2_text", "xglm")
"""Those that can't be run in float64."""


def build(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random model of architecture `name`, whose every block and norm matters."""
    torch.manual_seed(seed)
    others = WITHOUT_BFLOAT16 if dtype == torch.bfloat16 else FLOAT32
    dtype = torch.float32 if name in others else dtype
    kind, more = VARIANTS.get(name, (name, {}))
    config = shrunk(CONFIG_MAPPING[kind], {**MORE.get(kind, {}), **more})
    with torch.device("meta"):
        size = sum(p.numel() for p in _made(copy.deepcopy(config)).parameters())
    if size > MOST:
        raise MemoryError(f"{size:,} parameters")
    # The grouped kernel, which is transformers' own choice, has no float64.
    eager = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = _made(config, **eager)
    for parameter in model.parameters():  # norms of one and biases of nought would hide much
        if parameter.ndim == 1 and parameter.is_floating_point():
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.is_floating_point() and not parameter.any():  # nothing would go through it
            parameter.data.normal_(std=0.25)
    if dtype.itemsize > 2:
        return model.to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:  # some have parts that stay in float32
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype).eval()


def _made(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, **options)


MOST = 20_000_000
"""Parameters of a model that is small enough."""
