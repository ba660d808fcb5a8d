"""Metrics that need every token at once: easy and hard are quantiles, correlations are of ranks.

Their states are the readings themselves, so that a merge is exact whatever the processes hold:
8 bytes a token and state. A process without a single token takes part like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override

from softtrace.checks import check_range
from softtrace.density.curve import SIZE_BOUND, DensityCurve
from softtrace.errors import InvalidInputError
from softtrace.metrics.functional import (
    EASY_SHARE,
    computation_density,
    density_uncertainty_correlation,
    early_exit_agreement,
)
from softtrace.metrics.plotting import draw_lines, results_of
from softtrace.metrics.readings import counted


class PerToken(Metric):
    """Keeps float64 readings of tokens, a list of tensors for each name in ``readings``.

    Args:
        **kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False
    readings: tuple[str, ...] = ("entropy",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.readings:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        """An empty reading of the right type: what a process has that saw nothing."""
        for name in self.readings:
            getattr(self, name).append(torch.empty(0, dtype=torch.float64, device=self.device))

    @override
    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._begin()

    def _keep(self, **values: Tensor) -> None:
        for name, value in values.items():
            getattr(self, name).append(value.detach().double().flatten())

    def _all(self, name: str) -> Tensor:
        found: Tensor = dim_zero_cat(getattr(self, name))
        return found

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of ``compute`` (default) or a list of them; needs matplotlib."""
        return self._plot(val, ax)


class _AreaAndSize(PerToken):
    """Keeps the entropy, the area and the size at a bound of TV of every token.

    Args:
        total_variation: bound of the size, in (0, 1).
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        InvalidInputError: a bound outside its range.
    """

    readings = ("entropy", "area", "size")

    def __init__(self, total_variation: float = SIZE_BOUND, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.total_variation = check_range(
            "total_variation", total_variation, 0.0, 1.0, open_low=True, open_high=True
        )

    @override
    def update(self, curve: DensityCurve, positions: Tensor | None = None) -> None:
        """Take the positions of a batch.

        Args:
            curve: of the batch.
            positions: ``[B, T]`` bool, those that count; None for all but padding.
        """
        rows = counted(curve, positions)
        self._keep(
            entropy=curve.entropy[rows],
            area=curve.area()[rows],
            size=curve.size_at(self.total_variation)[rows],
        )


class ComputationDensity(_AreaAndSize):
    """Mean area and median size at a bound of TV, of all, easy and hard tokens.

    Source: arXiv 2605.27033, section 4. Functional twin:
    :func:`softtrace.metrics.functional.computation_density`.

    Args:
        total_variation: Bound of the size, in (0, 1).
        easy_share: Share of the tokens that are easy, in (0, 1].
        **kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        InvalidInputError: An argument is outside its range.

    Example:
        >>> import torch
        >>> from softtrace import DensityCurve
        >>> from softtrace.metrics import ComputationDensity
        >>> curve = DensityCurve(
        ...     thresholds=torch.tensor([0.3, 0.1]),
        ...     size=torch.tensor([[[0.001, 0.002]], [[0.01, 0.02]]]),
        ...     total_variation=torch.tensor([[[0.3, 0.6]], [[0.1, 0.3]]]),
        ...     edges=torch.tensor([[10_000, 10_000]]),
        ...     entropy=torch.tensor([[0.1, 2.0]]),
        ... )
        >>> density = ComputationDensity()
        >>> density.update(curve)
        >>> found = density.compute()
        >>> round(float(found["area_easy"]), 3), round(float(found["area_hard"]), 3)
        (0.15, 0.371)
    """

    higher_is_better = False

    def __init__(
        self, total_variation: float = SIZE_BOUND, easy_share: float = EASY_SHARE, **kwargs: Any
    ) -> None:
        super().__init__(total_variation, **kwargs)
        self.easy_share = check_range("easy_share", easy_share, 0.0, 1.0, open_low=True)

    @override
    def compute(self) -> dict[str, Tensor]:
        """``area_all``, ``area_easy``, ..., ``size_hard``; NaN if there was no token."""
        entropy, area, size = map(self._all, self.readings)
        return computation_density(entropy, area, size, self.easy_share)


class DensityUncertaintyCorrelation(_AreaAndSize):
    """Spearman's correlation of area and of size with the entropy of the full prediction.

    Exact over processes, since ranks are taken of all tokens at once. Source: arXiv 2605.27033,
    section 5. Functional twin:
    :func:`softtrace.metrics.functional.density_uncertainty_correlation`.

    Args:
        total_variation: Bound of the size, in (0, 1).
        **kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from softtrace import DensityCurve
        >>> from softtrace.metrics import DensityUncertaintyCorrelation
        >>> curve = DensityCurve(
        ...     thresholds=torch.tensor([0.3]),
        ...     size=torch.tensor([[[0.001, 0.001, 0.001]]]),
        ...     total_variation=torch.tensor([[[0.1, 0.4, 0.3]]]),
        ...     edges=torch.tensor([[10_000, 10_000, 10_000]]),
        ...     entropy=torch.tensor([[0.1, 2.0, 1.0]]),
        ... )
        >>> correlation = DensityUncertaintyCorrelation()
        >>> correlation.update(curve)
        >>> round(float(correlation.compute()["area"]), 4)
        1.0
    """

    higher_is_better = None

    @override
    def compute(self) -> dict[str, Tensor]:
        """``area`` and ``size``; NaN for fewer than two tokens."""
        entropy, area, size = map(self._all, self.readings)
        return density_uncertainty_correlation(entropy, area, size)


class EarlyExitAgreement(PerToken):
    """Share of the tokens on which the exit after each layer says what the full model says.

    Functional twin: :func:`softtrace.metrics.functional.early_exit_agreement`.

    Args:
        easy_share: Share of the tokens that are easy, in (0, 1].
        **kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        InvalidInputError: A share is outside its range.

    Example:
        >>> import torch
        >>> from softtrace import DensityCurve
        >>> from softtrace.metrics import EarlyExitAgreement
        >>> curve = DensityCurve(
        ...     thresholds=torch.tensor([0.3]),
        ...     size=torch.tensor([[[0.001, 0.001]]]),
        ...     total_variation=torch.tensor([[[0.1, 0.4]]]),
        ...     edges=torch.tensor([[10_000, 10_000]]),
        ...     entropy=torch.tensor([[0.1, 2.0]]),
        ... )
        >>> agreement = EarlyExitAgreement()
        >>> agreement.update(curve, exits=torch.tensor([[[True, False]], [[True, True]]]))
        >>> agreement.compute()["all"].tolist()
        [0.5, 1.0]
    """

    higher_is_better = True
    readings = ("entropy", "agreed")
    if TYPE_CHECKING:  # torch.jit.script would read it, as a string
        layers: Tensor

    def __init__(self, easy_share: float = EASY_SHARE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.easy_share = check_range("easy_share", easy_share, 0.0, 1.0, open_low=True)
        # Tokens by layers, flat: a process that saw nothing does not know how many layers.
        self.add_state("layers", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    @override
    def update(self, curve: DensityCurve, exits: Tensor, positions: Tensor | None = None) -> None:
        """Take the positions of a batch.

        Args:
            curve: Curve of the batch.
            exits: ``[L, B, T]`` bool; the last layer is the full model.
            positions: ``[B, T]`` bool, those that count; None for all but padding.

        Raises:
            InvalidInputError: Exits have another shape, or another number of layers than before.
        """
        rows = counted(curve, positions)
        known = int(self.layers)
        if exits.dim() != 3 or exits.shape[1:] != rows.shape or known not in (0, len(exits)):
            wanted = (known or "L", *rows.shape)
            raise InvalidInputError(f"exits: found shape {tuple(exits.shape)}, allowed is {wanted}")
        self.layers = torch.full_like(self.layers, len(exits))
        self._keep(entropy=curve.entropy[rows], agreed=exits.movedim(0, -1)[rows])

    @override
    def compute(self) -> dict[str, Tensor]:
        """``all``, ``easy`` and ``hard``: ``[L]``, NaN if there was no token."""
        agreed = self._all("agreed").reshape(-1, max(1, int(self.layers)))
        return early_exit_agreement(self._all("entropy"), agreed, self.easy_share)

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Agreement over layers, a line a group; needs matplotlib.

        Args:
            val: One result of ``compute`` or ``forward``, or a list of them, of which the last is
                drawn darkest; None for what ``compute`` returns now.
            ax: Axes of matplotlib to draw into; None makes a figure.

        Returns:
            The figure and its axes.
        """
        # torchmetrics makes a scalar of a single number: of one layer, or where no token was seen.
        results = [
            {group: shares.reshape(-1) for group, shares in found.items()}
            for found in results_of(self.compute() if val is None else val)
        ]
        layers = range(1, len(results[0]["all"]) + 1)
        return draw_lines(layers, results, "exit after layer", "share that agrees", ax)
