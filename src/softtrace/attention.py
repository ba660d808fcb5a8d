"""The attention function that our own runs put in place of the user's, and its registration.

transformers looks attention up by name, process-wide; a mask function has to be registered under
the same name or the mask becomes None and attention silently turns non-causal. Outside
:func:`softtrace_attention_active` no model ever has this name in its config.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask

from softtrace.importance import working_dtype

IMPLEMENTATION = "softtrace"


class AttentionListener(Protocol):
    """What a run does with the attention probabilities of a layer."""

    def attention_probabilities(self, module: nn.Module) -> Tensor | None:
        """Probabilities to use instead of the softmax, ``[B, H, T, S]``; None computes them."""

    def on_attention(
        self, module: nn.Module, probabilities: Tensor, value: Tensor, visible: Tensor
    ) -> Tensor:
        """Return the probabilities to use. Shapes: [B,H,T,S], [B,H_kv,S,d_head], [B,T,S]."""


_LISTENER: ContextVar[AttentionListener] = ContextVar("softtrace_listener")


def _visible_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A ``[B, 1, T, S]`` bool mask, True where attention may look; never skipped as causal."""
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, **kwargs)


def _probabilities(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``[B, H, T, S]`` in float32 or float64, 0 where there is no edge."""
    batch, heads, length, head_dim = query.shape
    kv_heads, sources = key.shape[1:3]
    # Query heads of a group share a key head: fold the group into the target axis, repeat nothing.
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ key.transpose(2, 3)).reshape(batch, heads, length, sources)
    scores = scores.to(working_dtype(scores.dtype)) * scale
    hidden = ~visible[:, None]
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    # A row that sees nothing (left padding) is uniform after the softmax; it has no edges.
    return scores.softmax(-1).masked_fill(hidden, 0.0)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with probabilities in the open: ``[B, H, T, d]`` in, ``[B, T, H, d]`` out.

    Dropout is ignored: a recording and a masked run must be the same function.
    """
    if attention_mask is None:
        raise RuntimeError("no attention mask reached softtrace: attention would not be causal")
    batch, heads, length, head_dim = query.shape
    kv_heads, sources = key.shape[1:3]
    scale = head_dim**-0.5 if scaling is None else scaling
    visible = attention_mask[:, 0, :length, :sources].expand(batch, -1, -1)
    probabilities = _LISTENER.get().attention_probabilities(module)
    if probabilities is None:
        probabilities = _probabilities(query, key, visible, scale)
    probabilities = _LISTENER.get().on_attention(module, probabilities, value, visible)
    mixed = probabilities.to(value.dtype).reshape(batch, kv_heads, -1, sources) @ value
    return mixed.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _visible_mask)


@contextmanager
def softtrace_attention_active(
    configs: Sequence[PretrainedConfig], listener: AttentionListener
) -> Iterator[None]:
    """Send the attention of the models with these configs to ``listener``; put all back at exit."""
    before = [config._attn_implementation_internal for config in configs]
    token = _LISTENER.set(listener)
    try:
        for config in configs:
            config._attn_implementation_internal = IMPLEMENTATION
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        _LISTENER.reset(token)
