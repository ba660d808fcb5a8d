"""Tiny random models of every family, for tests: a few seconds of CPU must hold dozens of them.

Their weights are drawn wider than at a usual initialisation, so that attention is far from uniform,
and every bias and norm weight differs from its neutral value, so that forgetting one shows.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

VOCABULARY = 67
SPECIAL = 3  # ids 0, 1, 2 are padding, begin and end; prompts use the others
#: whether transformers checkpoints a layer without its hooks, as it does since 5.23
FORWARD_ALONE = LlamaDecoderLayer.__call__ is nn.Module.__call__

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 48}

#: family -> (stem of the class names, what its config adds)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),  # heads together wider than the residual
    "smollm3": ("SmolLM3", {**GROUPED, "no_rope_layer_interval": 2}),  # layers 1, 3, ...: NoPE
    "gpt2": ("GPT2", {"n_inner": 48}),
}
FAMILIES: tuple[str, ...] = tuple(CONFIGS)


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A model of ``family`` in eval mode, a pure function of its arguments.

    Args:
        family: one of :data:`FAMILIES`.
        seed: of the weights. They are drawn in float64 and then rounded, so models of one seed are
            the same model in every dtype. The global random state is left alone.
        dtype: of the parameters.
        overrides: fields of the config, e.g. ``num_hidden_layers=5`` or ``attention_bias=True``.
    """
    stem, extra = CONFIGS[family]
    config = getattr(transformers, f"{stem}Config")(**{**COMMON, **extra, **overrides})
    name = "GPT2LMHeadModel" if family == "gpt2" else f"{stem}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, name)(config)
    randomise(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew: embeddings, projections, biases and norm weights."""
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:  # tied
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                value = 0.3 * noise if name == "bias" else 1 + 0.3 * noise
            elif isinstance(module, nn.Embedding):
                value = 0.5 * noise
            else:
                fan_in = parameter.shape[1 if isinstance(module, nn.Linear) else 0]
                value = 1.5 * noise / fan_in**0.5
            # .to(float64) afterwards must give back the drawn values, not their float32 rounding
            parameter.data = value


def tiny_prompt(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    """``[batch, length]`` random ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL, VOCABULARY, (batch, length), generator=generator)


def training_without_dropout(model: Any) -> Any:
    """The model, in train mode, with dropout that leaves everything."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def wrapped_to_checkpoint(model: Any) -> Any:
    """Layers that torch's wrapper runs again in the backward pass."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return model


def checkpointed(model: Any, **kwargs: Any) -> Any:
    """The model with activation checkpointing, not reentrant unless told otherwise."""
    # the name since transformers 5.23, else the older one
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(kwargs or None)
    return model
