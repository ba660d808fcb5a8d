"""What a study asks of every model, and the answers as its result files hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from softtrace.evaluation.bootstrap import Difference, Interval, Statistic, intervals

Unit = Literal["nats", "share", "tv", "correlation", "edges"]
R = TypeVar("R")


@dataclass(frozen=True)
class Answer(Generic[R]):
    """One number, or array of numbers, that a study gives for every model.

    Attributes:
        key: its name in the result file.
        name: what tables call it.
        unit: of its numbers.
        axes: what its dimensions run over, as named in the file's ``axes``.
        of: makes the statistic from a model's readings.
    """

    key: str
    name: str
    unit: Unit
    axes: tuple[str, ...]
    of: Callable[[R], Statistic]


def results_of(
    answers: Sequence[Answer[R]], found: Sequence[R], resamples: int, seed: int
) -> dict[str, Any]:
    """Every answer for every model with its interval, and for two the second less the first.

    Args:
        answers: that are asked.
        found: readings of models on the same sequences.
        resamples, seed: of the bootstrap over sequences.
    """
    statistics = [{answer.key: answer.of(readings) for answer in answers} for readings in found]
    of_models = [intervals(each, resamples, seed) for each in statistics]
    changes: Mapping[str, Interval] = {}
    if len(found) == 2:
        before, after = statistics
        paired = {key: Difference(after[key], before[key]) for key in before}
        changes = intervals(paired, resamples, seed)
    return {
        answer.key: {
            "name": answer.name,
            "unit": answer.unit,
            "axes": list(answer.axes),
            "models": [each[answer.key].as_json() for each in of_models],
            "difference": changes[answer.key].as_json() if changes else None,
        }
        for answer in answers
    }
