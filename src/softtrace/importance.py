"""Identity 1: importances from norms, ‖A·V·W_O‖₁ = A·‖V·W_O‖₁, without a vector per edge.

Source: Kervadec et al., arXiv 2605.27033, section 3: an edge's importance is the L1 norm of what it
carries over the sum of those norms at its node.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Elements of the [B, H, chunk, d_model] product that exist at one time: 16 MiB in float32 stay in a
# CPU's caches; on a GPU 128 MiB, where a launch costs more than the memory.
CHUNK_ELEMENTS = 1 << 22
_MORE_ON_CUDA = 8


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: norms, logs and softmax never run in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_value_norms(value: Tensor, weight: Tensor) -> Tensor:
    """‖V[h, s] · W_O[h]‖₁ for every query head and source.

    Args:
        value: ``[B, H_kv, S, d_head]``, values as the attention uses them.
        weight: ``[H, d_head, d_model]``; H is a multiple of H_kv, and query head h reads value head
            ``h // (H / H_kv)`` (grouped-query attention).

    Returns:
        ``[B, H, S]`` in float32 (float64 for float64). The product ``[B, H, chunk, d_model]`` is
        taken in chunks over S; with gradients it is recomputed in the backward pass.
    """
    batch, kv_heads, length, head_dim = value.shape
    heads, _, width = weight.shape
    dtype = working_dtype(value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        value = value.to(dtype)
        grouped = weight.to(dtype).view(kv_heads, heads // kv_heads, head_dim, width)
        elements = CHUNK_ELEMENTS * (_MORE_ON_CUDA if value.is_cuda else 1)
        step = max(1, elements // max(1, batch * heads * width))
        pieces = []
        for start in range(0, length, step):
            piece = value[:, :, start : start + step]
            if torch.is_grad_enabled() and (piece.requires_grad or grouped.requires_grad):
                norms = checkpoint(
                    _chunk_norms, piece, grouped, use_reentrant=False, preserve_rng_state=False
                )
            else:
                norms = _chunk_norms(piece, grouped)
            pieces.append(norms)
        return torch.cat(pieces, dim=-1)


def _chunk_norms(value: Tensor, weight: Tensor) -> Tensor:
    """``[B, K, S, e] x [K, G, e, d] -> [B, K·G, S]``."""
    product = torch.einsum("bkse,kged->bkgsd", value, weight)
    return l1_norm(product).flatten(1, 2)


def l1_norm(vectors: Tensor) -> Tensor:
    """L1 norm over the last dimension, in the working dtype."""
    # One kernel where abs and sum are two, and the cast a third.
    dtype = working_dtype(vectors.dtype)
    norms: Tensor = torch.linalg.vector_norm(vectors, ord=1, dim=-1, dtype=dtype)
    return norms


def share_of_node(residual: Tensor, sublayer: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of a node with two edges, from their norms ``[B, T]``; 0 where the node is zero."""
    total = (residual + sublayer).clamp_min(torch.finfo(residual.dtype).tiny)
    return residual / total, sublayer / total


def attention_shares(
    probabilities: Tensor,
    norms: Tensor,
    residual: Tensor,
    scale: Tensor | None = None,
    mlp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of an after-attention node, or of the one node of a parallel layer.

    Args:
        probabilities: ``[B, H, T, S]`` after the softmax, 0 where there is no edge.
        norms: ``[B, H, S]`` from :func:`head_value_norms`.
        residual: ``[B, T]``, L1 norm of the residual stream that enters the layer.
        scale: ``[B, T]`` >= 0, what every attention edge of a target is multiplied with (a norm
            after the projection, a residual multiplier); None for 1.
        mlp: ``[B, T]``, L1 norm of what the MLP adds into the same node; None where it adds into
            another.

    Returns:
        ``[B, H, T, S]`` for the attention edges, ``[B, T]`` for the residual edge, ``[B, T]`` for
        the MLP's (0 without one).
    """
    carried = probabilities.to(norms.dtype) * norms[:, :, None, :]
    if scale is not None:
        carried = carried * scale.to(norms.dtype)[:, None, :, None]
    mlp = torch.zeros_like(residual) if mlp is None else mlp
    total = (residual + mlp + carried.sum((1, 3))).clamp_min(torch.finfo(norms.dtype).tiny)
    return carried / total[:, None, :, None], residual / total, mlp / total
