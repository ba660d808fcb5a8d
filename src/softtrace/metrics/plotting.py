"""The plots of metrics whose result is a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from softtrace.errors import InvalidInputError

_PALEST = 0.2  # the oldest of many results is hardly less opaque


def results_of(val: Any) -> list[Any]:
    """What ``Metric.plot`` was given, as a list: one result, or several, first to last.

    Raises:
        InvalidInputError: an empty list.
    """
    results = list(val) if isinstance(val, Sequence) else [val]
    if not results:
        raise InvalidInputError(
            "val: found no result, allowed is one of compute() or forward(), or a list of them"
        )
    return results


def draw_lines(
    across: Sequence[float],
    results: Sequence[Mapping[str, Tensor]],
    xlabel: str,
    ylabel: str,
    axes: Any,
) -> tuple[Any, Any]:
    """Lines over sizes (log scale) or layers, told apart by marker too.

    Args:
        across: ``N`` places on the x axis; a log scale if they are no integers.
        results: one or several, first to last: label to ``[N]``. Those before the last are paler
            the older they are, and have no markers.
        xlabel, ylabel: of the axes.
        axes: of matplotlib, to draw into; None makes a figure.

    Returns:
        The figure and its axes.
    """
    from matplotlib.figure import Figure

    if axes is None:
        axes = Figure(figsize=(7, 4.2), layout="constrained").add_subplot()
    for place, lines in enumerate(results, start=1):
        age = len(results) - place
        for index, (label, values) in enumerate(lines.items()):
            axes.plot(
                across,
                values.detach().cpu().numpy(),
                color=f"C{index}",
                alpha=1 - (1 - _PALEST) * age / len(results),
                marker="" if age else "os^Dvx*+"[index % 8],
                ms=4,
                label=None if age else label,
            )
    if not all(float(place).is_integer() for place in across):
        axes.set_xscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.02))
    axes.grid(alpha=0.25)
    axes.legend()
    return axes.figure, axes
