"""Which tokens are easy: a smooth step below a quantile of the batch, detached.

A score is low where a token is easy. Source of the default: arXiv 2605.27033, section 5: the more
uncertain the model, the more of the graph it needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softtrace.density.distortion import entropy, log_probabilities
from softtrace.errors import InvalidInputError

_NEGLIGIBLE = 0.02

Easiness = Callable[[Tensor, Tensor], Tensor]
"""``(logits [B, T, V], targets [B, T] with -100 where there is none) -> scores [B, T]``."""


def entropy_score(logits: Tensor, targets: Tensor) -> Tensor:
    """Entropy of the full model's prediction, nats."""
    return entropy(logits)


def loss_score(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of the true next token, nats; where it is unknown what is expected, the entropy."""
    logs = log_probabilities(logits)
    loss = -logs.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(targets < 0, -(logs.exp() * logs).sum(-1), loss)


def margin_score(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus the gap between the two largest log-probabilities, nats."""
    top = log_probabilities(logits).topk(2, dim=-1).values
    return top[..., 1] - top[..., 0]


EASINESS: dict[str, Easiness] = {
    "entropy": entropy_score,
    "loss": loss_score,
    "margin": margin_score,
}


def easiness(name: str | Easiness) -> Easiness:
    """Look a score up by name; a callable is taken as it is.

    Raises:
        InvalidInputError: unknown name.
    """
    if callable(name):
        return name
    if name not in EASINESS:
        raise InvalidInputError(
            f"easiness: found {name!r}, allowed are {', '.join(map(repr, EASINESS))} or a callable "
            "(logits, targets) -> scores"
        )
    return EASINESS[name]


@torch.no_grad()
def easy_weights(scores: Tensor, counted: Tensor, quantile: float, width: float) -> Tensor:
    """Weights in [0, 1], near 1 below the quantile of the counted scores and near 0 above.

    Args:
        scores: ``[B, T]``, low where easy.
        counted: ``[B, T]`` bool, positions that take part; the others get 0.
        quantile: share of tokens that are easy, in (0, 1]; 1 weighs all alike.
        width: of the step, in standard deviations of the counted scores; 0 is a hard step.
    """
    if quantile >= 1.0:
        return counted.to(scores.dtype)
    # Nothing is read from the device, which may be at work, or capturing this.
    count = counted.sum()
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    rank = (quantile * count.to(exact)).round().long().clamp(min=1) - 1
    ordered = torch.where(counted, scores, torch.inf).flatten().sort().values
    bound = ordered.index_select(0, rank[None])
    inside = torch.where(counted, scores, 0.0)
    mean = inside.sum() / count
    spread = width * (torch.where(counted, inside - mean, 0.0).square().sum() / count).sqrt()
    weights = ((bound - scores) / spread).sigmoid()
    weights = torch.where(spread > 0, weights, (scores <= bound).to(scores.dtype))
    # Exactly 0 where next to nothing is left, so that nobody need look there.
    return torch.where(counted & (weights >= _NEGLIGIBLE), weights, 0.0)
