"""Metrics that are sums over tokens at each size: float64 sums, int64 counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from softtrace.density.curve import DEPTH_QUARTILES, SIZES, DensityCurve
from softtrace.density.distortion import NUCLEUS_SHARES
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import EDGE_KINDS
from softtrace.metrics.functional import nucleus_recovery, trace_composition
from softtrace.metrics.plotting import draw_lines, results_of
from softtrace.metrics.readings import counted


class _OverSizes(Metric):
    """Sums what curves hold of every threshold, read at :data:`softtrace.density.curve.SIZES`.

    Args:
        name: of the state that holds the sums.
        shape: of what is summed at each size.
        **kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, name: str, shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros((len(SIZES), *shape), dtype=torch.float64)
        self.add_state(name, zeros, dist_reduce_fx="sum")

    @staticmethod
    def _summed(curve: DensityCurve, values: Tensor, rows: Tensor) -> Tensor:
        """``[26, ...]`` float64 without a graph, over the chosen tokens."""
        return curve.at_sizes(values=values)[:, rows].detach().double().sum(1)


class NucleusRecovery(_OverSizes):
    """Share of the tokens whose ordered top-p list a trace of each size recovers.

    Source: arXiv 2605.27033, section 4. Functional twin:
    :func:`softtrace.metrics.functional.nucleus_recovery`.

    Args:
        **kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from softtrace import DensityCurve
        >>> from softtrace.metrics import NucleusRecovery
        >>> nucleus = torch.zeros(2, 1, 1, 8, dtype=torch.bool)
        >>> nucleus[0, ..., :2] = True  # the first two lists by the trace of 1 % already
        >>> nucleus[1] = True  # all by the full graph
        >>> curve = DensityCurve(
        ...     thresholds=torch.tensor([0.3]),
        ...     size=torch.tensor([[[0.01]]]),
        ...     total_variation=torch.tensor([[[0.1]]]),
        ...     edges=torch.tensor([[10_000]]),
        ...     entropy=torch.tensor([[0.1]]),
        ...     nucleus=nucleus,
        ... )
        >>> recovery = NucleusRecovery()
        >>> recovery.update(curve)
        >>> recovery.compute()[0].tolist()
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """

    higher_is_better = True
    if TYPE_CHECKING:  # torch.jit.script would read them, as strings
        recovered: Tensor
        tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("recovered", (len(NUCLEUS_SHARES),), **kwargs)
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, curve: DensityCurve, positions: Tensor | None = None) -> None:
        """Take the positions of a batch.

        Args:
            curve: Curve of the batch, made with ``nucleus=True``.
            positions: ``[B, T]`` bool, those that count; None for all but padding.

        Raises:
            InvalidInputError: The curve has no nuclei.
        """
        if curve.nucleus is None:
            raise InvalidInputError("curve: found no nuclei, make it with nucleus=True")
        rows = counted(curve, positions)
        # Not in place: float64 and int64 also where a module was moved to another dtype.
        self.recovered = self.recovered + self._summed(curve, curve.nucleus, rows)
        self.tokens = self.tokens.long() + rows.sum()

    @override
    def compute(self) -> Tensor:
        """``[26, 8]`` for :data:`softtrace.density.curve.SIZES` and the p of the paper; NaN if no
        token."""
        return nucleus_recovery(self.recovered, self.tokens)

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Recovery over size, a line for each p; needs matplotlib.

        Args:
            val: One result of ``compute`` or ``forward``, or a list of them, of which the last is
                drawn darkest; None for what ``compute`` returns now.
            ax: Axes of matplotlib to draw into; None makes a figure.

        Returns:
            The figure and its axes.
        """
        results = [
            {f"p = {p:g}": found[:, at] for at, p in enumerate(NUCLEUS_SHARES)}
            for found in results_of(self.compute() if val is None else val)
        ]
        return draw_lines(SIZES, results, "share of all edges", "top-p lists recovered", ax)


class TraceComposition(_OverSizes):
    """What traces of each size are made of: shares of edges by depth quartile and kind.

    Source: arXiv 2605.27033, section 4. Functional twin:
    :func:`softtrace.metrics.functional.trace_composition`.

    Args:
        **kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from softtrace import DensityCurve
        >>> from softtrace.metrics import TraceComposition
        >>> edges = torch.zeros(2, 1, 1, 4, 4, dtype=torch.int64)
        >>> edges[:, ..., 0, 0] = 3  # attention of the first quarter of the layers
        >>> edges[:, ..., 3, 2] = 1  # MLPs of the last one
        >>> curve = DensityCurve(
        ...     thresholds=torch.tensor([0.3]),
        ...     size=torch.tensor([[[0.01]]]),
        ...     total_variation=torch.tensor([[[0.1]]]),
        ...     edges=torch.tensor([[400]]),
        ...     entropy=torch.tensor([[0.1]]),
        ...     composition=edges,
        ... )
        >>> composition = TraceComposition()
        >>> composition.update(curve)
        >>> composition.compute()[0].sum(1).tolist()
        [0.75, 0.0, 0.0, 0.25]
    """

    higher_is_better = None
    if TYPE_CHECKING:  # torch.jit.script would read it, as a string
        edges: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("edges", (DEPTH_QUARTILES, len(EDGE_KINDS)), **kwargs)

    @override
    def update(self, curve: DensityCurve, positions: Tensor | None = None) -> None:
        """Take the positions of a batch.

        Args:
            curve: Curve of the batch, made with ``composition=True``.
            positions: ``[B, T]`` bool, those that count; None for all but padding.

        Raises:
            InvalidInputError: The curve has no composition.
        """
        if curve.composition is None:
            raise InvalidInputError("curve: found no composition, make it with composition=True")
        added = self._summed(curve, curve.composition, counted(curve, positions))
        self.edges = self.edges + added  # not in place: see NucleusRecovery

    @override
    def compute(self) -> Tensor:
        """``[26, 4, 4]`` shares: sizes, depth quartiles, kinds in the order of ``EDGE_KINDS``."""
        return trace_composition(self.edges)

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Shares of the kinds over size, all depths together; needs matplotlib.

        Args:
            val, ax: See :meth:`NucleusRecovery.plot`.

        Returns:
            The figure and its axes.
        """
        results = [
            {kind.replace("_", " "): found.sum(1)[:, at] for at, kind in enumerate(EDGE_KINDS)}
            for found in results_of(self.compute() if val is None else val)
        ]
        return draw_lines(SIZES, results, "share of all edges", "share of the trace", ax)
