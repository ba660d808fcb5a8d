"""What the layers of a model compute, by its own modules: the oracle's view of each family.

As slow and literal as :mod:`tests.support.oracle`, which is written on top of it, and derived from
nothing of the fast implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Module = Any  # a model or sub-module of transformers: nn.Module hides its attributes from a checker

LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")


@dataclass(frozen=True)
class Block:
    """The sub-modules of one layer under common names, and what its attention needs to know."""

    attention_norm: Module
    attention: Module
    output_projection: Module
    output_weight: Tensor  # [H, head_dim, d]: W_O of each head, so that a head adds z @ W_O[h]
    mlp_norm: Module
    mlp: Module
    window: int | None  # number of visible sources, the target included; None: all of the past
    rotary: bool


def is_gpt2(model: Module) -> bool:
    """True for GPT-2, False for the Llama-like families, an error for anything else."""
    name = type(model).__name__
    if name != "GPT2LMHeadModel" and name.removesuffix("ForCausalLM") not in LLAMA_LIKE:
        raise NotImplementedError(f"the oracle does not know {name}")
    return name == "GPT2LMHeadModel"


def blocks(model: Module) -> list[Block]:
    """All layers of the model, first to last."""
    if is_gpt2(model):
        return [gpt2_block(layer) for layer in model.transformer.h]
    return [llama_block(model.config, *indexed) for indexed in enumerate(model.model.layers)]


def gpt2_block(layer: Module) -> Block:
    """A GPT-2 layer; ``Conv1D`` stores its weight as [in, out]."""
    attention, projection = layer.attn, layer.attn.c_proj
    weight = projection.weight.reshape(attention.num_heads, attention.head_dim, -1)
    return Block(layer.ln_1, attention, projection, weight, layer.ln_2, layer.mlp, None, False)


def llama_block(config: Any, index: int, layer: Module) -> Block:
    """A Llama-like layer; ``Linear`` stores its weight as [out, in].

    The window: by ``layer_types`` where the config has them, in every layer where it has only
    ``sliding_window`` (Mistral). Rotary embeddings: everywhere but in SmolLM3's NoPE layers.
    """
    attention, projection = layer.self_attn, layer.self_attn.o_proj
    weight = projection.weight.T.reshape(config.num_attention_heads, attention.head_dim, -1)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        window = None
    no_rope_layers = getattr(config, "no_rope_layers", None)  # per layer 1: rotary, 0: none
    norms = layer.input_layernorm, layer.post_attention_layernorm
    rotary = no_rope_layers is None or bool(no_rope_layers[index])
    return Block(norms[0], attention, projection, weight, norms[1], layer.mlp, window, rotary)


def embed(model: Module, input_ids: Tensor) -> Tensor:
    """[T, d]: the embedding nodes (GPT-2: token plus position)."""
    if is_gpt2(model):
        positions = torch.arange(len(input_ids), device=input_ids.device)
        return model.transformer.wte(input_ids) + model.transformer.wpe(positions)
    return model.model.embed_tokens(input_ids)


def final_norm(model: Module) -> Module:
    """The norm before the unembedding."""
    return model.transformer.ln_f if is_gpt2(model) else model.model.norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [heads, T, head_dim] by [T, head_dim] tables."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def queries_keys_values(model: Module, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of normed nodes ``x`` [T, d], each [H, T, head_dim] (key-value heads repeated)."""
    attention, length = block.attention, len(x)
    if is_gpt2(model):
        parts = attention.c_attn(x[None])[0].chunk(3, dim=-1)
        q, k, v = (part.view(length, -1, attention.head_dim).transpose(0, 1) for part in parts)
        return q, k, v
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (project(x).view(length, -1, attention.head_dim) for project in projections)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if block.rotary:
        cos, sin = model.model.rotary_emb(x, torch.arange(length, device=x.device)[None])
        q, k = rotate(q, cos[0], sin[0]), rotate(k, cos[0], sin[0])
    groups = q.shape[0] // k.shape[0]
    return q, k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)


def is_visible(target: int, source: int, window: int | None) -> bool:
    """Whether an attention edge exists: neither in the future nor out of the window."""
    return source <= target and (window is None or source > target - window)


def probabilities_values(model: Module, block: Block, node: Tensor) -> tuple[Tensor, Tensor]:
    """``A [H, T, S]`` and ``V [H, S, head_dim]`` of one layer, read from its nodes [T, d]."""
    q, k, v = queries_keys_values(model, block, block.attention_norm(node))
    length = len(node)
    rows = [[is_visible(t, s, block.window) for s in range(length)] for t in range(length)]
    visible = torch.tensor(rows, device=node.device)
    scores = q @ k.transpose(-1, -2) * block.attention.scaling
    return scores.masked_fill(~visible, -math.inf).softmax(dim=-1), v
