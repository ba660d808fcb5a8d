"""Residual patterns, and the search for the one that a model follows."""

from torch import nn

from softtrace.errors import UnsupportedModelError
from softtrace.families.pattern import Anatomy, LayerModules, Pattern, learned_positions
from softtrace.families.sequential import SEQUENTIAL_PRE_NORM

PATTERNS: tuple[Pattern, ...] = (SEQUENTIAL_PRE_NORM,)


def take_apart(model: nn.Module) -> Anatomy:
    """Find the modules of ``model`` with the first pattern that fits its structure.

    Raises:
        UnsupportedModelError: no pattern fits; the message says what each one missed.
    """
    misses = []
    for pattern in PATTERNS:
        try:
            return pattern.find(model)
        except UnsupportedModelError as error:
            misses.append(f"{pattern.name}: {error}")
    raise UnsupportedModelError("; ".join(misses))


__all__ = ["PATTERNS", "Anatomy", "LayerModules", "Pattern", "learned_positions", "take_apart"]
