"""``softtrace study --generation true``: densities along what models write themselves."""

from __future__ import annotations

from typing import Any

from softtrace.checks import check_least
from softtrace.cli.study_task import Found, StudyTask
from softtrace.evaluation.measure import Progress
from softtrace.evaluation.study.generation import (
    BINS,
    WRITERS,
    GenerationReadings,
    bins_of,
    read_generation,
)
from softtrace.evaluation.study.generation_answers import GENERATION_ANSWERS, OTHERS
from softtrace.evaluation.study.results import results_of
from softtrace.report.generation_plots import draw_generation
from softtrace.report.generation_table import generation_table

GENERATION_VERSION = 1


def generation(task: StudyTask) -> Found:
    """Measure each model, and write generation.json, generation.txt and generation.png.

    Args:
        task: models of one tokenizer, and their text; the first half of each block is a prompt.

    Raises:
        InvalidInputError: blocks too small for a new token in each of the parts.
    """
    blocks = task.blocks
    check_least("block_size", blocks.shape[1], 2 * BINS)
    new = blocks.shape[1] - blocks.shape[1] // 2

    def read(network: Any, _: Found, progress: Progress) -> GenerationReadings:
        return read_generation(
            network,
            blocks,
            batch_size=task.batch_size,
            seed=task.seed,
            attention=task.attention,
            progress=progress,
        )

    models, found = task.measure(read, total=len(blocks) * len(WRITERS))
    result = {
        "version": GENERATION_VERSION,
        "models": models,
        "data": task.data,
        "sequences": len(blocks),
        "prompt": blocks.shape[1] - new,
        "new": new,
        "settings": {**task.settings(), "temperature": 1.0},
        "axes": {
            "writers": list(WRITERS),
            "others": list(OTHERS),
            "bins": [list(each) for each in bins_of(new)],
        },
        "results": results_of(GENERATION_ANSWERS, found, task.resamples, task.seed),
    }
    return task.write("generation", result, generation_table, draw_generation)
