"""The term of one step: what is added to the task loss, and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DensityTerm:
    """The added term of one step, and what it was made of.

    Attributes:
        loss: Scalar to add to the task loss (in units of the distance, times strength). Without a
            graph, and 0, if nothing was run or read.
        distortion: Σ easy·distance / Σ easy (nats for KL), detached. This and the next two are NaN
            if nothing was run, as between the steps that ``every`` leaves.
        soft_size: Easy tokens' mean size (share of |E|) of the traces at the drawn thresholds,
            before the depth cut, detached.
        easy_share: Σ easy / number of counted tokens, detached.
        strength: Weight of the distortion at this step.
        skipped: Why nothing was run although the strength is positive; None otherwise.
        exit_distance: Mean KL(full ‖ exit) of the exits that were read (nats), detached; None if
            none was: without ``exits``, or where no forward was watched.
    """

    loss: Tensor
    distortion: Tensor
    soft_size: Tensor
    easy_share: Tensor
    strength: float
    skipped: str | None = None
    exit_distance: Tensor | None = None

    @classmethod
    def of_no_run(
        cls, device: torch.device, strength: float = 0.0, skipped: str | None = None
    ) -> DensityTerm:
        """The term of a step at which nothing was run: 0, and the rest unknown.

        Args:
            device: of the batch.
            strength: that the step would have had.
            skipped: why nothing was run although that is positive.
        """
        zero = torch.zeros((), dtype=torch.float32, device=device)
        unknown = torch.full_like(zero, torch.nan)
        return cls(zero, unknown, unknown, unknown, strength, skipped)
