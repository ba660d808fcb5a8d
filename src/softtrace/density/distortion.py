"""How far a masked run's prediction is from the full model's: TV to measure, KL to train.

Source: Kervadec et al., arXiv 2605.27033, section 4 (total variation, nucleus recovery).
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtrace.graph.importance import working_dtype

NUCLEUS_SHARES = (0.01, 0.05, 0.10, 0.20, 0.40, 0.60, 0.80, 0.90)
"""Probability masses of the nuclei whose recovery is reported."""

_ROUNDING = 128  # machine epsilons by which two runs of the same function may differ


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the vocabulary in float32 or float64 (nats), ``[..., V]``."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.to(working_dtype(logits.dtype)).log_softmax(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the prediction in nats: ``[..., V]`` to ``[...]``."""
    logs = log_probabilities(logits)
    return -(logs.exp() * logs).sum(-1)


def total_variation(full: Tensor, masked: Tensor) -> Tensor:
    """TV = ½ Σ|p_full - p_masked| in [0, 1], from logits ``[..., V]`` to ``[...]``.

    Where the two predictions differ by no more than rounding the gradient is 0, a subgradient of
    the kink there; the sign of the rounding error is another, but it is noise.
    """
    return variation_from(full.to(working_dtype(full.dtype)).softmax(-1), masked)


def variation_from(full: Tensor, masked: Tensor) -> Tensor:
    """:func:`total_variation` with the full prediction given as probabilities, for reuse."""
    masked = masked.to(full.dtype).softmax(-1)
    if not (masked.requires_grad or full.requires_grad):
        return masked.sub_(full).abs_().sum(-1) / 2  # in place: no other copy of [..., V]
    difference = masked - full
    noise = difference.detach().abs() <= _ROUNDING * torch.finfo(full.dtype).eps * full
    return torch.where(noise, difference.detach(), difference).abs().sum(-1) / 2


def divergence(full: Tensor, masked: Tensor) -> Tensor:
    """KL(p_full ‖ p_masked) in nats, from logits ``[..., V]`` to ``[...]``."""
    full_logs = log_probabilities(full)
    return (full_logs.exp() * (full_logs - log_probabilities(masked))).sum(-1)


DISTANCES = {"kl": divergence, "tv": total_variation}


def nucleus_recovered(
    full: Tensor, masked: Tensor, shares: tuple[float, ...] = NUCLEUS_SHARES
) -> Tensor:
    """Whether the ordered top-p lists of two predictions are equal, for each share p.

    A top-p list is the shortest prefix of the tokens by falling probability whose mass reaches p.

    Args:
        full, masked: logits ``[..., V]``.
        shares: the values of p, in (0, 1).

    Returns:
        ``[..., P]`` bool.
    """
    dtype = working_dtype(full.dtype)
    mass, order = full.to(dtype).softmax(-1).sort(-1, descending=True)
    masked_mass, masked_order = masked.to(dtype).softmax(-1).sort(-1, descending=True)
    common = (order == masked_order).long().cumprod(-1).sum(-1)
    levels = torch.tensor(shares, dtype=dtype, device=full.device)

    def lengths(sorted_mass: Tensor) -> Tensor:
        queries = levels.expand(*sorted_mass.shape[:-1], -1).contiguous()
        return torch.searchsorted(sorted_mass.cumsum(-1), queries) + 1

    wanted = lengths(mass)
    return (wanted == lengths(masked_mass)) & (common[..., None] >= wanted)
