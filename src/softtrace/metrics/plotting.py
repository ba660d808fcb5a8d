"""The plots of metrics whose result is a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def draw_lines(
    across: Sequence[float], lines: Mapping[str, Tensor], xlabel: str, ylabel: str, axes: Any = None
) -> tuple[Any, Any]:
    """Lines over sizes (log scale) or layers, told apart by marker too.

    Args:
        across: ``N`` places on the x axis; a log scale if they are no integers.
        lines: label to ``[N]``.
        xlabel, ylabel: of the axes.
        axes: of matplotlib, to draw into; None makes a figure.

    Returns:
        The figure and its axes.
    """
    from matplotlib.figure import Figure

    if axes is None:
        axes = Figure(figsize=(7, 4.2), layout="constrained").add_subplot()
    for index, (label, values) in enumerate(lines.items()):
        axes.plot(across, values.cpu().numpy(), marker="os^Dvx*+"[index % 8], ms=4, label=label)
    if not all(float(place).is_integer() for place in across):
        axes.set_xscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.02))
    axes.grid(alpha=0.25)
    axes.legend()
    return axes.figure, axes
