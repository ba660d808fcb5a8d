"""Tiny random models of the causal-LM types of transformers: what is verified, what is refused.

Each entry says how its config differs from the default, made small by :data:`SMALL`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 67

#: taken where a config has the field
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # sizes, in the names of many years
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    # mixtures of experts
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    # latent attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 4,
}
_LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
_FALCON: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None}
_DECODER: dict[str, Any] = {"is_decoder": True}

#: Gemma 4 says heads by layer, and has a second input to every layer unless it is switched off
_GEMMA4: dict[str, Any] = {
    **dict.fromkeys(("head_dim", "num_attention_heads", "num_key_value_heads")),
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}

#: case -> (type, what its config sets; None drops a field of SMALL). Every one is verified.
VERIFIED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (
        "apertus", "apertus1p5_text", "arcee", "aria_text", "bigbird_pegasus", "biogpt",
        "blenderbot", "bloom",
        "codegen", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "dots1", "ernie4_5",
        "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2",
        "gemma3_text", "glm", "glm4", "glm4_moe", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox",
        "gpt_oss", "gptj", "granitemoe", "granitemoe_swa", "granite_swa", "helium",
        "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "jais2", "kolibri1", "llama", "llama4_text",
        "mbart", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "ministral",
        "ministral3", "mistral", "mixtral", "moshi", "mpt", "nanochat", "nemotron", "olmo",
        "olmo2", "olmo3", "olmoe", "opt", "pegasus", "persimmon", "phi", "phi3", "phimoe",
        "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "sarvam_moe", "seed_oss", "smollm3",
        "solar_open", "stablelm", "starcoder2", "vaultgemma", "whisper", "xglm",
    )},
    "cohere, query norms": ("cohere", {"use_qk_norm": True}),
    "axk1": ("axk1", _LATENT),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "deepseek_v32": ("deepseek_v32", _LATENT),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "glm_moe_dsa": ("glm_moe_dsa", _LATENT),
    "minicpm3": ("minicpm3", _LATENT),
    "sarvam_mla": ("sarvam_mla", _LATENT),
    "youtu": ("youtu", _LATENT),
    "falcon, one key head": ("falcon", _FALCON),
    "falcon, new layout": (
        "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon, sequential, alibi": ("falcon", {**_FALCON, "parallel_attn": False, "alibi": True}),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 3},
    ),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granite": ("granite", {
        "residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    }),
    "granitemoeshared": (
        "granitemoeshared", {"residual_multiplier": 0.3, "shared_intermediate_size": 24}
    ),
    "hyperclovax": ("hyperclovax", {"residual_multiplier": 0.3}),
    "lfm2, attention alone": ("lfm2", {"layer_types": ["full_attention"] * 3}),
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "gemma4_text, experts": ("gemma4_text", {
        **_GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 24,
    }),
    "mistral, window": ("mistral", {"sliding_window": 3}),
    "gemma2, window": ("gemma2", {"sliding_window": 3}),
    "llama4_text, chunks": ("llama4_text", {"attention_chunk_size": 3}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}  # fmt: skip
#: those of the newest release, of which the table is
VERIFIED_NEWEST = set(VERIFIED)
# the oldest release that is supported lacks some
VERIFIED = {case: entry for case, entry in VERIFIED.items() if entry[0] in CONFIG_MAPPING}

#: of :data:`VERIFIED` one of each kind: of attention (windows, chunks, sinks, latent, sparse,
#: ALiBi, maps of its own code), of norms and residual streams, of experts
KINDS = (
    "bigbird_pegasus", "bloom", "codegen", "cohere", "ctrl", "deepseek_v3", "deepseek_v32",
    "falcon, new layout", "falcon, sequential, alibi", "gemma2, window", "gemma3_text",
    "gemma4_text, experts", "gpt2", "gpt_neo", "gpt_oss", "gptj", "granite", "kolibri1",
    "lfm2, attention alone", "llama", "llama4_text, chunks", "minimax_m3_vl_text",
    "mistral, window", "mixtral", "mpt", "olmo2", "phi", "stablelm, parallel", "whisper", "xglm",
)  # fmt: skip


def of_each_kind(some: Iterable[str] = KINDS) -> list[str]:
    """Cases of :data:`VERIFIED` that a test goes through: ``some``, or with ``EVERY_FAMILY=1`` all.

    For what one test of all families sees already but for the way it is asked here.
    """
    chosen = VERIFIED_NEWEST if os.environ.get("EVERY_FAMILY") else set(some)
    assert chosen <= VERIFIED_NEWEST, chosen - VERIFIED_NEWEST
    return sorted(chosen & set(VERIFIED))


NOT_SOFTMAX = "no softmax attention was seen"
NORM_OF_SUM = "what it gives is the output of a norm"
SECOND_STREAM = "reads no residual stream of shape"
NO_PROJECTION = "no output projection was found for the mixed heads"

#: case -> (type, what its config sets, the reason that is given)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    # state-space, convolutional, linear attention and hybrids
    "bailing_hybrid": ("bailing_hybrid", {}, NOT_SOFTMAX),
    "bamba": ("bamba", {"mamba_n_heads": 4}, NOT_SOFTMAX),
    "falcon_h1": ("falcon_h1", {
        "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32,
        "mamba_chunk_size": 8,
    }, "is not the sum of its edges"),
    "falcon_mamba": ("falcon_mamba", {}, NOT_SOFTMAX),
    "jamba": ("jamba", {}, NOT_SOFTMAX),
    "lfm2, with convolutions": (
        "lfm2", {"layer_types": ["full_attention", "conv", "full_attention"]}, NOT_SOFTMAX
    ),
    "lara_mini": ("lara_mini", {}, NOT_SOFTMAX),
    "lfm3": ("lfm3", {}, NOT_SOFTMAX),
    "mamba": ("mamba", {}, NOT_SOFTMAX),
    "olmo_hybrid": ("olmo_hybrid", {}, NOT_SOFTMAX),
    "qwen3_5_text": ("qwen3_5_text", {}, NOT_SOFTMAX),
    "qwen3_next": ("qwen3_next", {}, NOT_SOFTMAX),
    "recurrent_gemma": ("recurrent_gemma", {}, NOT_SOFTMAX),
    "rwkv": ("rwkv", {}, NOT_SOFTMAX),
    "minimax": ("minimax", {}, "is not the sum of its edges"),
    # norms of the residual stream itself
    **{name: (name, _DECODER, NORM_OF_SUM) for name in (
        "bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta",
    )},
    **{name: (name, {}, NORM_OF_SUM) for name in (
        "bart", "blenderbot-small", "marian", "openai-gpt", "plbart",
    )},
    "opt, norm of the sum": ("opt", {"do_layer_norm_before": False}, NORM_OF_SUM),
    # heads that are mixed, gated or normed before the projection
    "afmoe": ("afmoe", {}, NO_PROJECTION),
    "bitnet": ("bitnet", {}, NO_PROJECTION),
    "jetmoe": ("jetmoe", {}, NO_PROJECTION),
    "laguna": ("laguna", {}, NO_PROJECTION),
    # more than one stream, or more than one attention a layer
    "deepseek_v4": ("deepseek_v4", {}, SECOND_STREAM),
    "hy_v4": ("hy_v4", {}, SECOND_STREAM),
    "gemma4_text, second input": (
        "gemma4_text", {**_GEMMA4, "hidden_size_per_layer_input": 8}, "is not the sum of its edges"
    ),
    "diffllama": ("diffllama", {}, "attention was asked for 2 times"),
    "longcat_flash": ("longcat_flash", _LATENT, "attention was asked for 2 times"),
    "doge": ("doge", {}, "is not the sum of its edges"),
    "dory": ("dory", {}, "each has to run exactly once"),
    # not causal, not of tokens alone, not one node a token
    "bert, both ways": ("bert", {}, "a token sees later ones"),
    "cpmant": ("cpmant", {}, "the graph has one node a token"),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}, "is not the sum of its edges"),
    "hrm_text": ("hrm_text", {}, "each has to run exactly once"),
    "inkling_text": ("inkling_text", {}, "between attention's projection and the sum"),
    "modernbert-decoder": ("modernbert-decoder", {}, "what the language-model head reads is not"),
    "xlm": ("xlm", {}, "something between the layers changes"),
}  # fmt: skip
REFUSED_NEWEST = set(REFUSED)
REFUSED = {case: entry for case, entry in REFUSED.items() if entry[0] in CONFIG_MAPPING}


def tiny(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a type, in eval mode; a pure function of its arguments.

    Args:
        kind: key of transformers' causal-LM mapping.
        dtype: of the parameters, which are drawn in float64 and then rounded. Grouped expert
            kernels and eager masks of several types have no float64.
        **changes: fields of the config; None drops a field of :data:`SMALL`.
    """
    config_class = CONFIG_MAPPING[kind]
    default, renamed = config_class(), config_class.attribute_map
    dropped = {name for name, value in changes.items() if value is None and name in SMALL}
    fields = {
        name: value
        for name, value in SMALL.items()
        if name not in dropped
        and renamed.get(name) not in SMALL
        and (name in renamed or hasattr(default, name))
    }
    fields.update({name: value for name, value in changes.items() if name not in dropped})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(
            config_class(**fields)
        )
    redraw(model)
    return model.to(dtype).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Weights like a trained model's: attention far from uniform, no norm weight of 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            noise = 0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise
        else:
            noise = 1.2 * noise / parameter.shape[-1] ** 0.5
        parameter.data = noise
