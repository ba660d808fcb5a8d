"""Importances of all edges of a batch, in one call."""

from __future__ import annotations

from torch import Tensor, nn

from softtrace.graph import EdgeImportance
from softtrace.instrument import attach


def edge_importance(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> EdgeImportance:
    """Importance of every edge of a batch (identity 1).

    Differentiable in the model's weights; wrap in ``torch.no_grad()`` to only measure.

    Args:
        model: a causal language model; attached on the fly.
        input_ids: ``[B, T]`` integers.
        attention_mask: ``[B, T]`` of 0 and 1, padding on either side; None for no padding.
        position_ids: ``[B, T]`` of packed rows, starting anew with every document: no edge crosses
            from one document into another. None for one document a row.

    Returns:
        Importances in [0, 1], shares of their node: ``layers[l].attention`` [B,H,T,S],
        ``.attention_residual`` [B,T], ``.mlp`` [B,T], ``.mlp_residual`` [B,T].

    Raises:
        UnsupportedModelError: see :func:`attach`.
        InvalidInputError: ids outside the vocabulary, wrong shapes.
        NonFiniteError: the model's logits are not finite.
    """
    recording = attach(model).record(
        input_ids, attention_mask, keep_attention=False, position_ids=position_ids
    )
    return recording.importance
