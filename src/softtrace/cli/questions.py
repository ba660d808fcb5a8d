"""``softtrace study``: the paper's questions, by this project's measure."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from softtrace.cli.study_task import Found, StudyTask
from softtrace.data.encoding import beginning
from softtrace.density.curve import SIZE_BOUND
from softtrace.density.distortion import NUCLEUS_SHARES
from softtrace.evaluation.measure import Progress
from softtrace.evaluation.study.answers import ANSWERS
from softtrace.evaluation.study.paper_answers import density_correlations
from softtrace.evaluation.study.readings import STUDY_SIZES, Readings, read_model
from softtrace.evaluation.study.results import results_of
from softtrace.evaluation.study.unigrams import Unigrams, count_unigrams
from softtrace.graph.edges import EDGE_KINDS
from softtrace.report.study_plots import draw_study
from softtrace.report.study_tables import study_table

STUDY_VERSION = 1


def questions(task: StudyTask, lengths: tuple[int, ...], ends: Tensor, smoothing: float) -> Found:
    """Measure each model, and write study.json, study.txt and study.png.

    Args:
        task: models of one tokenizer, and their text.
        lengths: of windows, rising.
        ends: ``[P]``, where windows end, see
            :func:`~softtrace.evaluation.study.readings.window_ends`.
        smoothing: see ``softtrace study``.
    """
    blocks, tokenizer = task.blocks, task.tokenizers[0]
    first, begun = task.first, beginning(tokenizer)

    @cache  # the models predict the same tokens
    def unigrams_over(vocabulary: int) -> Unigrams:
        return count_unigrams(task.training, tokenizer, vocabulary, smoothing)

    def read(network: Any, model: Found, progress: Progress) -> Readings:
        return read_model(
            network,
            blocks,
            unigrams_over(model["vocabulary"]),
            first=first,
            ends=ends,
            lengths=lengths,
            batch_size=task.batch_size,
            progress=progress,
            beginning=begun,
            attention=task.attention,
        )

    models, found = task.measure(read, total=len(blocks) * (1 + len(ends) * len(lengths)))
    unigrams = unigrams_over(models[0]["vocabulary"])
    result = {
        "version": STUDY_VERSION,
        "models": models,
        "data": task.data,
        "unigrams": {"documents": len(task.training), **_summary(unigrams)},
        "settings": {
            **task.settings(),
            "min_context": first,
            "total_variation": SIZE_BOUND,
            "targets": len(ends),
            "interval": "percentile bootstrap over sequences",
        },
        "tokens": found[0].whole.size.numel(),
        "axes": {
            "sizes": list(STUDY_SIZES),
            "depth_quartiles": [1, 2, 3, 4],
            "kinds": list(EDGE_KINDS),
            "nucleus_p": list(NUCLEUS_SHARES),
            "lengths": list(lengths),
            "positions": ends.tolist(),
            "contexts": [*lengths, "all before"],
        },
        "results": results_of(ANSWERS, found, task.resamples, task.seed),
        "pairs": density_correlations(
            [each.whole.area for each in found], task.resamples, task.seed
        ),
    }
    return task.write("study", result, study_table, draw_study)


def _summary(unigrams: Unigrams) -> dict[str, Any]:
    return {
        "tokens": int(unigrams.counts.sum()),
        "seen": int((unigrams.counts > 0).sum()),
        "smoothing": f"{unigrams.smoothing:g} added to every count",
        "entropy_nats": unigrams.entropy,
        "uniform_kl_nats": unigrams.uniform_divergence,
    }
