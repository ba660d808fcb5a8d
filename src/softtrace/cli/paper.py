"""``softtrace study --paper true``: the figures of arXiv 2605.27033, by its own definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from softtrace.cli.study_task import Found, StudyTask
from softtrace.density.components import component_names
from softtrace.errors import DataError
from softtrace.evaluation.measure import Progress
from softtrace.evaluation.study.paper import PaperReadings, read_paper
from softtrace.evaluation.study.paper_answers import (
    AXES,
    PAPER_ANSWERS,
    component_results,
    density_correlations,
)
from softtrace.evaluation.study.results import results_of
from softtrace.evaluation.study.same_text import SameTexts, same_texts
from softtrace.evaluation.study.unigrams import count_unigrams
from softtrace.report.paper_plots import draw_paper
from softtrace.report.paper_table import paper_table
from softtrace.tracing.attach import attach

PAPER_VERSION = 1


def paper(task: StudyTask) -> Found:
    """Measure each model, and write paper.json, paper.txt and paper.png.

    Args:
        task: models and their text; the last token of each block is predicted. Models of other
            tokenizers than the first one's are given the same texts.

    Raises:
        DataError: fewer than 2 texts that all tokenizers have.
    """
    texts = _texts(task)
    inputs = iter(zip(task.tokenizers, texts.inputs, strict=True))  # a model each
    counts: dict[tuple[int, int], Tensor] = {}  # models of one tokenizer count once
    tokens: list[int] = []
    components: list[Found] = []

    def read(network: Any, model: Found, progress: Progress) -> PaperReadings:
        tokenizer, own = next(inputs)
        key = id(tokenizer), model["vocabulary"]
        if key not in counts:
            counts[key] = count_unigrams(task.training, tokenizer, key[1]).counts
        tokens.append(int(counts[key].sum()))
        found = read_paper(
            network,
            own,
            counts[key],
            attention=task.attention,
            seed=task.seed,
            progress=progress,
        )
        layers = len(attach(network).anatomy.layers)
        heads = found.entries.shape[1] // layers - 1
        components.append(component_results(found, component_names(layers, heads)))
        return found

    models, found = task.measure(read, total=len(texts.inputs[0]), unit="input")
    densities = [each.auc[:, None] for each in found]
    result = {
        "version": PAPER_VERSION,
        "models": models,
        "data": task.data,
        "inputs": len(texts.inputs[0]),
        "context": task.blocks.shape[1] - 1,
        "unigrams": {"tokens": tokens[0]},
        "own_tokens": None if task.one_tokenizer else _own_tokens(texts, tokens),
        "settings": task.settings(),
        "axes": AXES,
        "results": results_of(PAPER_ANSWERS, found, task.resamples, task.seed),
        "components": components,
        "pairs": density_correlations(densities, task.resamples, task.seed),
    }
    return task.write("paper", result, paper_table, draw_paper)


def _texts(task: StudyTask) -> SameTexts:
    if task.one_tokenizer:
        return SameTexts([list(task.blocks)] * len(task.tokenizers), {})
    texts = same_texts(task.blocks, task.tokenizers)
    if len(texts.inputs[0]) < 2:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in texts.left_out.items())
        raise DataError(
            f"models: of {len(task.blocks)} texts, found {len(texts.inputs[0])} that all of their "
            f"tokenizers have, a bootstrap over inputs needs at least 2. Left out: {reasons}. Give "
            "more blocks, a larger block_size or models of one tokenizer"
        )
    return texts


def _own_tokens(texts: SameTexts, unigrams: Sequence[int]) -> Found:
    """What result files say where tokenizers differ, a number a model in every list."""
    lengths = [[len(ids) - 1 for ids in inputs] for inputs in texts.inputs]
    return {
        "note": "same texts, encoded by each model's own tokenizer: losses, entropies, ranks and "
        "frequencies are per token of its own",
        "left_out": texts.left_out,
        "context_mean": [sum(each) / len(each) for each in lengths],
        "context_range": [[min(each), max(each)] for each in lengths],
        "unigram_tokens": list(unigrams),
    }
