"""``softtrace study --paper true``: the figures of arXiv 2605.27033, by its own definitions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from softtrace.cli.study_models import check_vocabulary, described
from softtrace.data.documents import Document
from softtrace.density.components import component_names
from softtrace.evaluation.bootstrap import CONFIDENCE
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import RunOptions
from softtrace.evaluation.study.paper import PaperReadings, read_paper
from softtrace.evaluation.study.paper_answers import (
    AXES,
    PAPER_ANSWERS,
    component_results,
    density_correlations,
)
from softtrace.evaluation.study.results import results_of
from softtrace.evaluation.study.unigrams import Unigrams, count_unigrams
from softtrace.files import prepare_output, write_json, write_text
from softtrace.model.devices import device_of
from softtrace.model.loading import load_model
from softtrace.report.paper_plots import write_paper_plot
from softtrace.report.paper_table import paper_table
from softtrace.tracing.attach import attach
from softtrace.tracing.masking import AttentionKind

PAPER_VERSION = 1


def paper(
    models: Mapping[str, str],
    blocks: Tensor,
    training: Sequence[Document],
    tokenizer: Any,
    data: dict[str, Any],
    out: str,
    *,
    attention: AttentionKind,
    resamples: int,
    seed: int,
    run: RunOptions,
) -> dict[str, Any]:
    """Measure each model, and write paper.json, paper.txt and paper.png to OUT.

    Args:
        models: label to path, checked to read the text alike.
        blocks: ``[N, T]`` ids of held-out text; the last token of each is predicted.
        training: documents of which unigrams are counted.
        tokenizer: the models'.
        data: what result files say of the blocks.
        out, attention, resamples, seed, run: see ``softtrace study``.
    """
    began = time.perf_counter()
    where = device_of(run.device)
    found: list[PaperReadings] = []
    found_models: list[dict[str, Any]] = []
    components: list[dict[str, Any]] = []
    unigrams: Unigrams | None = None
    for label, path in models.items():
        network = load_model(path, dtype=run.dtype)
        network.to(where).eval()  # type: ignore[arg-type]
        found_models.append({"label": label, **described(network, path)})
        check_vocabulary(found_models)
        if unigrams is None:
            unigrams = count_unigrams(training, tokenizer, found_models[0]["vocabulary"])
        with tqdm(total=len(blocks), desc=f"measuring {label}", unit="input") as bar:
            found.append(
                read_paper(
                    network,
                    blocks,
                    unigrams.counts,
                    attention=attention,
                    seed=seed,
                    progress=bar.update,
                )
            )
        layers = len(attach(network).anatomy.layers)
        heads = found[-1].entries.shape[1] // layers - 1
        components.append(component_results(found[-1], component_names(layers, heads)))
        del network  # the next one is loaded into the room that it had
    assert unigrams is not None
    densities = [each.auc[:, None] for each in found]
    result = {
        "version": PAPER_VERSION,
        "models": found_models,
        "data": data,
        "inputs": len(blocks),
        "context": blocks.shape[1] - 1,
        "unigrams": {"tokens": int(unigrams.counts.sum())},
        "settings": {
            "attention": attention,
            "resamples": resamples,
            "seed": seed,
            "confidence": CONFIDENCE,
            "dtype": run.dtype,
        },
        "axes": AXES,
        "results": results_of(PAPER_ANSWERS, found, resamples, seed),
        "components": components,
        "pairs": density_correlations(densities, resamples, seed),
        **provenance(where),
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder = prepare_output(out, run.overwrite)
    table = paper_table(result)
    write_json(folder / "paper.json", result)
    write_text(folder / "paper.txt", table)
    write_paper_plot(result, folder)
    print(table)
    print(f"\nwritten to {folder}/: paper.json, paper.txt and paper.png")
    return result
