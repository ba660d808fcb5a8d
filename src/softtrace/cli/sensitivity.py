"""``softtrace study --sensitivity``: which conclusions survive another way to measure."""

from __future__ import annotations

from typing import Any

from softtrace.cli.study_task import Found, StudyTask
from softtrace.evaluation.measure import Progress
from softtrace.evaluation.study.sensitivity import (
    CONCLUSIONS,
    Definition,
    Reading,
    conclusions,
    read_definitions,
    ways,
)
from softtrace.report.sensitivity_table import sensitivity_table

SENSITIVITY_VERSION = 1


def sensitivity(task: StudyTask) -> Found:
    """Measure by every definition, and write sensitivity.json and sensitivity.txt.

    Args:
        task: one model or two, and their text; every kind of attention is measured.
    """
    blocks, first = task.blocks, task.first

    def read(network: Any, _: Found, progress: Progress) -> dict[Definition, Reading]:
        return read_definitions(
            network, blocks, first=first, batch_size=task.batch_size, progress=progress
        )

    models, readings = task.measure(read, total=len(blocks) * ways())
    found = {
        "version": SENSITIVITY_VERSION,
        "models": models,
        "data": task.data,
        "tokens": len(blocks) * (blocks.shape[1] - 1 - first),
        "min_context": first,
        "conclusions": dict(list(CONCLUSIONS.items())[: len(models) + 1]),
        "definitions": conclusions(readings, task.resamples, task.seed),
        "resamples": task.resamples,
        "seed": task.seed,
    }
    return task.write("sensitivity", found, sensitivity_table)
