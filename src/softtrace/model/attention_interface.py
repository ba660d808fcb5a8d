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
from typing_extensions import override

from softtrace.graph.attention_maps import AttentionMap, Rows, chunk_elements, each_block
from softtrace.graph.importance import working_dtype

IMPLEMENTATION = "softtrace"
_NOWHERE = torch.finfo(torch.float32).min / 2
"""Added to a score that is not there: sums are finite, and equal in a row that sees nothing."""


class AttentionListener(Protocol):
    """What a run does with the attention probabilities of a layer.

    Attributes:
        reads_visible: whether it reads where attention may look, or has probabilities already.
    """

    reads_visible: bool

    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        """Return the probabilities to use, ``[B, H, T, S]``, of which none need exist yet.

        Args:
            module: the attention.
            probabilities: its own.
            value: ``[B, H_kv, S, d_head]``.
            visible: ``[B, T, S]`` bool, where the attention may look.
        """


_LISTENER: ContextVar[AttentionListener] = ContextVar("softtrace_listener")


def _visible_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A ``[B, 1, T, S]`` bool mask, True where attention may look; never skipped as causal.

    Of long sequences it is made in blocks of targets: what transformers combines it from are
    several tensors of its size. Where nobody reads it, one element stands for all.
    """
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    rows, length = kwargs.get("batch_size", 0), kwargs.get("q_length", 0)
    columns, offset = kwargs.get("kv_length", 0), kwargs.get("q_offset")
    device = torch.device(kwargs.get("device", "cpu"))
    if rows and length and columns and not _LISTENER.get().reads_visible:
        return torch.ones((), dtype=torch.bool, device=device).expand(rows, 1, length, columns)
    step = max(1, chunk_elements(device) // max(1, rows * columns))
    if step >= length or not isinstance(offset, int):
        return sdpa_mask(*args, **kwargs)
    mask = torch.empty(rows, 1, length, columns, dtype=torch.bool, device=device)
    for start in range(0, length, step):
        own = {"q_length": min(step, length - start), "q_offset": offset + start}
        made = sdpa_mask(*args, **{**kwargs, **own})
        assert made is not None
        mask[:, :, start : start + step] = made
    return mask


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax of the scores, ``[B, H, T, S]`` in float32 or float64, 0 where there is no edge.

    Args:
        query: ``[B, H, T, d]``.
        key: ``[B, H_kv, S, d]``.
        visible: ``[B, T, S]`` bool.
        scale: of the scores.
        softcap: scores become ``softcap · tanh(score / softcap)`` (Gemma 2).
        sinks: ``[H]``, a score a head that takes its share of the softmax and carries nothing
            (GPT-OSS).
        bias: added to the scores, broadcastable to ``[B, H, T, S]``.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, sources = key.shape[1:3]
    if query.dtype == torch.float16:  # scores of large keys overflow it before they are scaled
        query, key = query.float(), key.float()
    # Query heads of a group share a key head: fold the group into the target axis, repeat nothing.
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ key.transpose(2, 3)).reshape(batch, heads, length, sources)
    scores = scores.to(working_dtype(scores.dtype)).mul_(scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    seen = visible[:, None]
    if bias is not None:  # it may be infinite where there is no edge
        scores = torch.where(seen, scores + bias, 0.0)
    # Added in place, once for all heads: torch.where takes five times as long on a CPU.
    scores = scores.add_(~seen, alpha=_NOWHERE)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(batch, -1, length, 1)
        scores = torch.cat((scores, column), dim=-1)
    # A row that sees nothing (left padding) is uniform after the softmax; it has no edges.
    probabilities = scores.softmax(-1)[..., :sources]
    return probabilities * seen if probabilities.requires_grad else probabilities.mul_(seen)


class SoftmaxMap(AttentionMap):
    """Attention probabilities that are made from queries and keys when they are asked for.

    Args:
        query, key, visible, scale, others: see :func:`attention_probabilities`.
    """

    def __init__(
        self, query: Tensor, key: Tensor, visible: Tensor, scale: float, **others: Any
    ) -> None:
        self.query, self.key, self.visible, self.scale = query, key, visible, scale
        self.others = others
        self.shape = torch.Size((*query.shape[:3], key.shape[2]))
        self.device = query.device

    @override
    def rows(self, rows: Rows) -> Tensor:
        bias = self.others.get("bias")
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())]
            bias = rows.of(bias, 2) if bias.shape[2] > 1 else bias
            bias = bias[..., : rows.end] if bias.shape[3] > 1 else bias
        # Autocast may be off when sizes are counted and on in a masked run: edges would flip.
        with torch.autocast(self.device.type, enabled=False):
            return attention_probabilities(
                rows.of(self.query, 2),
                self.key[:, :, : rows.end],
                rows.edges_of(self.visible),
                self.scale,
                **{**self.others, "bias": bias},
            )


def mixed_values(probabilities: AttentionMap, value: Tensor) -> Tensor:
    """What the heads of an attention give, ``[B, H, T, d_head]``.

    Args:
        probabilities: ``[B, H, T, S]``.
        value: ``[B, H_kv, S, d_head]``.
    """
    batch, heads, length, _ = probabilities.shape
    kv_heads, width = value.shape[1], value.shape[3]

    def mixed(given: Tensor, rows: Rows) -> Tensor:
        # Query heads of a group share a value head: fold the group into the target axis.
        grouped = given.to(value.dtype).reshape(batch, kv_heads, -1, rows.end)
        return (grouped @ value[:, :, : rows.end]).reshape(batch, heads, -1, width)

    targets = probabilities.targets
    found = list(each_block(probabilities, mixed, targets))
    if targets is None:
        parts = [part for _, part in found]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    heads_of = value.new_zeros(batch, heads, length, width)
    for rows, part in found:  # which rows is known on the device, which need not be waited for
        heads_of[:, :, rows.at] = part
    return heads_of


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with probabilities in the open: ``[B, H, T, d]`` in, ``[B, T, H, d]`` out.

    Dropout is ignored: a recording and a masked run must be the same function.
    """
    if attention_mask is None:
        raise RuntimeError("no attention mask reached softtrace: attention would not be causal")
    batch, _, length, head_dim = query.shape
    visible = attention_mask[:, 0, :length, : key.shape[2]].expand(batch, -1, -1)
    # A weight, as it is now: rows are made later, with gradients where the run itself had none.
    sinks = None if s_aux is None else s_aux.clone()
    own = SoftmaxMap(
        query,
        key,
        visible,
        head_dim**-0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=sinks,
        bias=position_bias,
    )
    used = _LISTENER.get().on_attention(module, own, value, visible)
    return mixed_values(used, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _visible_mask)


@contextmanager
def configured(configs: Sequence[PretrainedConfig], implementation: str) -> Iterator[None]:
    """Name an attention implementation in these configs; put back at exit what they named."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = implementation
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


@contextmanager
def softtrace_attention_active(
    configs: Sequence[PretrainedConfig], listener: AttentionListener
) -> Iterator[None]:
    """Send the attention of the models with these configs to ``listener``; put all back at exit."""
    token = _LISTENER.set(listener)
    try:
        with configured(configs, IMPLEMENTATION):
            yield
    finally:
        _LISTENER.reset(token)
