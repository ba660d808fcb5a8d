"""How far two computations of the same thing may lie apart."""

from __future__ import annotations

import torch
from torch import Tensor

from softtrace.graph.importance import working_dtype

#: machine epsilons by which a sum of two or three terms may be off, of the terms' magnitude
ROUNDINGS = 8


def mismatch(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found - expected).abs().max()) / scale


def typical_mismatch(found: Tensor, expected: Tensor) -> float:
    """Mismatch of logits ``[N, V]``: of the worst token, in half precision of the median one.

    There rounding sends a token to another expert now and then, and its logits anywhere.
    """
    if not expected.numel():
        return 0.0
    errors = (found - expected).abs().amax(-1) / expected.abs().max().clamp_min(1e-30)
    return float(errors.median() if expected.dtype.itemsize < 4 else errors.max())


def rounding(found: Tensor, expected: Tensor, magnitude: Tensor | None = None) -> float:
    """Largest difference in machine epsilons of each element's own magnitude.

    A few activations of a trained model are a thousand times larger than all others; a bound
    relative to the largest would let anything pass elsewhere.

    Args:
        found, expected: of one shape.
        magnitude: of what was summed, elementwise; None for that of ``expected``.
    """
    if not expected.numel():
        return 0.0
    size = expected.abs() if magnitude is None else magnitude
    return float(((found - expected).abs() / unit(expected, size)).max())


def unit(like: Tensor, magnitude: Tensor) -> Tensor:
    """What one rounding of numbers of this magnitude is, elementwise."""
    limits = torch.finfo(like.dtype)
    return (limits.eps * magnitude.to(working_dtype(like.dtype))).clamp_min(limits.tiny)


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative mismatch accepted for a model of this dtype."""
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}.get(dtype, 5e-2)


def cache_tolerance(dtype: torch.dtype) -> float:
    """The same of logits of one model with and without a cache, where products are cut otherwise.

    A few activations of a trained model are a thousand times larger than all others, and so is
    their rounding: 1.7e-4 was seen of SmolLM2-135M in float32, after fine-tuning. A token too many
    or a wrong place is off by far more.
    """
    return 1e-3 if dtype == torch.float32 else tolerance(dtype)
