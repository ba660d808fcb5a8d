"""Importance by information flow routes: how much nearer to its node an edge brings the rest.

Source: Ferrando and Voita, *Information Flow Routes* (arXiv 2403.00824), section 2.2: of a node z
that is the sum of what its edges carry, an edge that carries f has the proximity
max(0, ‖z‖₁ − ‖z − f‖₁), over the sum of all at the node. Unlike a norm it does not factorise into a
probability and a norm of the value, so every attention edge's vector is made, in chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtrace.graph.attention_maps import chunk_elements
from softtrace.graph.importance import norm_of, working_dtype


def proximity(part: Tensor, node: Tensor) -> Tensor:
    """max(0, ‖z‖₁ − ‖z − f‖₁) of parts f of nodes z, both ``[..., d]``: ``[...]`` float32 or 64."""
    part, node = (each.to(working_dtype(each.dtype)) for each in (part, node))
    return (norm_of(node) - norm_of(node - part)).clamp_min(0)


def attention_proximity(
    probabilities: Tensor, value: Tensor, weight: Tensor, scale: Tensor | None, node: Tensor
) -> Tensor:
    """Proximity of every attention edge, ``[B, H, T, S]``; 0 where its probability is 0.

    Args:
        probabilities: ``[B, H, T, S]``, 0 where there is no edge.
        value: ``[B, H_kv, S, d_head]``.
        weight: ``[H, d_head, d_model]``, see :func:`softtrace.graph.importance.head_value_norms`.
        scale: ``[B, T]``, what every attention edge of a target is multiplied with; None for 1.
        node: ``[B, T, d_model]`` that the edges add into.
    """
    dtype = working_dtype(value.dtype)
    batch, kv_heads, _, width = value.shape
    grouped = weight.to(dtype).view(kv_heads, -1, width, weight.shape[-1])
    carried = torch.einsum("bkse,kged->bkgsd", value.to(dtype), grouped).flatten(1, 2)
    edges = probabilities.to(dtype)
    if scale is not None:
        edges = edges * scale.to(dtype)[:, None, :, None]
    node = node.to(dtype)
    whole = norm_of(node)[:, None, :, None]
    step = max(1, chunk_elements(value.device) // max(1, batch * carried[0].numel()))
    found = []
    for start in range(0, edges.shape[2], step):
        part = slice(start, start + step)
        left = node[:, None, part, None] - edges[:, :, part, :, None] * carried[:, :, None]
        found.append((whole[:, :, part] - norm_of(left)).clamp_min(0))
    return torch.where(probabilities > 0, torch.cat(found, dim=2), 0.0)
