"""``softtrace study``: the paper's questions of models, as of one before and after training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from softtrace.checks import check_counts, check_least, check_range
from softtrace.cli.paper import paper as measure_paper
from softtrace.cli.sensitivity import sensitivity as measure_sensitivity
from softtrace.cli.study_models import check_same_tokens, check_vocabulary, described, labels
from softtrace.data.blocks import evenly, pack
from softtrace.data.documents import Document, split_by_file
from softtrace.data.encoding import beginning
from softtrace.data.split_record import unseen
from softtrace.data.text_source import TextSource
from softtrace.density.curve import SIZE_BOUND
from softtrace.density.distortion import NUCLEUS_SHARES
from softtrace.errors import DataError, InvalidInputError
from softtrace.evaluation.bootstrap import (
    CONFIDENCE,
)
from softtrace.evaluation.identity import text_identity
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import DEFAULT_RUN, RunOptions
from softtrace.evaluation.study.answers import ANSWERS
from softtrace.evaluation.study.paper_answers import density_correlations
from softtrace.evaluation.study.readings import STUDY_SIZES, Readings, read_model, window_ends
from softtrace.evaluation.study.results import results_of
from softtrace.evaluation.study.unigrams import Unigrams, count_unigrams
from softtrace.files import check_output, claims_out, prepare_output, write_json, write_text
from softtrace.graph.edges import EDGE_KINDS
from softtrace.model.devices import device_of
from softtrace.model.loading import check_model_directory, load_model, load_tokenizer
from softtrace.report.study_plots import write_study_plot
from softtrace.report.study_tables import study_table
from softtrace.tracing.masking import AttentionKind, check_attention

STUDY_VERSION = 1


@dataclass(frozen=True)
class StudySource(TextSource):
    """A text of which both sides of the split are used.

    Attributes:
        held_out_share: Share of the files that is held out. Those are measured, and unigrams are
            counted on the others.
    """

    held_out_share: float = 0.05

    def sides(self) -> tuple[list[Document], list[Document]]:
        """Training and held-out documents.

        Raises:
            DataError: text that cannot be read, or nothing on one of the sides.
        """
        documents = list(self.stream_all())
        sides = split_by_file(documents, self.held_out_share, self.salt)
        for side, what in zip(sides, ("the training", "the held-out"), strict=True):
            if not side:
                raise DataError(
                    f"{self.data}: found no file on {what} side at a held_out_share of "
                    f"{self.held_out_share:g}; held-out text is measured and the unigrams are "
                    "those of the training side. Give more files, another share or another salt"
                )
        return sides


@claims_out
def study(
    models: Sequence[str],
    source: StudySource,
    out: str,
    block_size: int = 128,
    blocks: int = 64,
    batch_size: int = 8,
    lengths: tuple[int, ...] = (16, 32, 64),
    targets: int = 4,
    resamples: int = 2000,
    smoothing: float = 1.0,
    seed: int = 0,
    attention: AttentionKind = "recomputed",
    sensitivity: bool = False,
    paper: bool = False,
    run: RunOptions = DEFAULT_RUN,
) -> dict[str, Any]:
    """Answer the paper's questions of models, with intervals; write them to OUT.

    Args:
        models: Model directories (safetensors) or hub names of one tokenizer. Two are taken for
            before and after training, and every change gets an interval; between each two the rank
            correlation of their densities is given.
        source: The text, whose held-out side is measured.
        out: Folder that study.json, study.txt and study.png are written to. It must be new or
            empty.
        block_size: Tokens per sequence. The first half of each is context, the second half is
            explained.
        blocks: Number of sequences that are measured, evenly spaced over the held-out text.
        batch_size: Number of sequences that are measured at a time.
        lengths: Lengths in tokens of the windows in which the same tokens are explained again. The
            token that the tokenizer puts in front of a text is one of them.
        targets: Number of tokens of each sequence that windows explain.
        resamples: Number of resamples of the bootstrap.
        smoothing: Number that is added to the count of every token of the vocabulary.
        seed: Seed of the bootstrap.
        attention: Where masked runs take their attention probabilities from: recomputed, recorded
            or kept, see softtrace evaluate.
        sensitivity: Instead of answering the questions, measure by every kind of attention, norm of
            edges, stand-in for absent edges and grid of thresholds, and tell which conclusions
            survive: sensitivity.json and sensitivity.txt.
        paper: Instead, give the figures of the paper by the paper's own definitions: the last token
            of every block is predicted, with a run of its own for every size, and the numbers are
            in paper.json, paper.txt and paper.png. The paper's texts have 40 tokens (a block_size
            of 41); time and memory grow with the square of it.
        run: How the models are run.

    Raises:
        ModelDirectoryError, UnsupportedModelError: a model.
        DataError, InvalidInputError: the text (also where a model was trained on what is to be held
            out), a number, fewer than 2 sequences, no training side, or two models that do not read
            the text alike.
        OutputExistsError: OUT is not empty, or another run writes to it.
    """
    began = time.perf_counter()
    check_attention(attention)
    _check_mode(models, sensitivity, paper)
    lengths = _check(lengths, source.held_out_share, smoothing)
    check_counts(4, block_size=block_size)
    check_counts(2, blocks=blocks)
    check_counts(1, batch_size=batch_size, targets=targets, resamples=resamples)
    first = block_size // 2
    windowed = not (paper or sensitivity)
    longest = lengths[-1] if windowed else 1
    ends = window_ends(block_size, first, longest, targets)
    where = device_of(run.device)
    check_output(out, run.overwrite)
    for model in models:
        check_model_directory(model)
    training, held_out = source.sides()
    held_out = list(unseen(held_out, models, source.held_out_share))
    tokenizer = load_tokenizer(models[0])
    begun = beginning(tokenizer)
    if windowed:
        check_least("lengths", lengths[0], len(begun) + 1)
    chosen = evenly(pack(held_out, tokenizer, block_size), blocks)
    if len(chosen) < 2:
        raise DataError(
            f"{source.data}: found {len(chosen)} block of {block_size} tokens on the held-out "
            "side, a bootstrap over sequences needs at least 2; give more text, a smaller "
            "block_size or a larger held_out_share"
        )
    for model in models[1:]:
        check_same_tokens(models[0], tokenizer, model, held_out, block_size, chosen)
    data = text_identity(source, chosen, len(held_out))
    if sensitivity:
        return measure_sensitivity(
            models,
            chosen,
            data,
            out,
            batch_size=batch_size,
            resamples=resamples,
            seed=seed,
            run=run,
        )
    if paper:
        return measure_paper(
            dict(zip(labels(models), models, strict=True)),
            chosen,
            training,
            tokenizer,
            data,
            out,
            attention=attention,
            resamples=resamples,
            seed=seed,
            run=run,
        )
    found_models: list[dict[str, Any]] = []
    found: list[Readings] = []
    unigrams: Unigrams | None = None
    for label, model in zip(labels(models), models, strict=True):
        network = load_model(model, dtype=run.dtype)
        network.to(where).eval()  # type: ignore[arg-type]
        found_models.append({"label": label, **described(network, model)})
        vocabulary = found_models[-1]["vocabulary"]
        if unigrams is None:
            unigrams = count_unigrams(training, tokenizer, vocabulary, smoothing)
        check_vocabulary(found_models)
        total = len(chosen) * (1 + len(ends) * len(lengths))
        with tqdm(total=total, desc=f"measuring {label}", unit="sequence") as bar:
            found.append(
                read_model(
                    network,
                    chosen,
                    unigrams,
                    first=first,
                    ends=ends,
                    lengths=lengths,
                    batch_size=batch_size,
                    progress=bar.update,
                    beginning=begun,
                    attention=attention,
                )
            )
        del network  # the next one is loaded into the room that it had
    assert unigrams is not None
    result = {
        "version": STUDY_VERSION,
        "models": found_models,
        "data": data,
        "unigrams": {"documents": len(training), **_summary(unigrams)},
        "settings": {
            "attention": attention,
            "min_context": first,
            "total_variation": SIZE_BOUND,
            "targets": len(ends),
            "resamples": resamples,
            "seed": seed,
            "confidence": CONFIDENCE,
            "interval": "percentile bootstrap over sequences",
            "dtype": run.dtype,
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
        "results": results_of(ANSWERS, found, resamples, seed),
        "pairs": density_correlations([each.whole.area for each in found], resamples, seed),
        **provenance(where),
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder = prepare_output(out, run.overwrite)
    table = study_table(result)
    write_json(folder / "study.json", result)
    write_text(folder / "study.txt", table)
    write_study_plot(result, folder)
    print(table)
    print(f"\nwritten to {folder}/: study.json, study.txt and study.png")
    return result


def _summary(unigrams: Unigrams) -> dict[str, Any]:
    return {
        "tokens": int(unigrams.counts.sum()),
        "seen": int((unigrams.counts > 0).sum()),
        "smoothing": f"{unigrams.smoothing:g} added to every count",
        "entropy_nats": unigrams.entropy,
        "uniform_kl_nats": unigrams.uniform_divergence,
    }


def _check_mode(models: Sequence[str], sensitivity: bool, paper: bool) -> None:
    if not models:
        raise InvalidInputError("models: found none, expected at least one")
    if sensitivity and paper:
        raise InvalidInputError(
            "sensitivity, paper: found both, allowed is one of them; run study twice"
        )
    if sensitivity and len(models) > 2:
        raise InvalidInputError(
            f"models: found {len(models)}, allowed with sensitivity are 1, or 2: before and after "
            "training"
        )


def _check(lengths: Sequence[int], held_out_share: float, smoothing: float) -> tuple[int, ...]:
    """The lengths, rising, once the numbers are in range."""
    check_range("held_out_share", held_out_share, 0.0, 1.0, open_low=True, open_high=True)
    check_range("smoothing", smoothing, 0.0, float("inf"), open_low=True, open_high=True)
    for length in lengths:
        check_least("lengths", length, 2)
    if not lengths or len(set(lengths)) < len(lengths):
        raise InvalidInputError(
            f"lengths: found {list(lengths)}, expected at least one, each of them once"
        )
    return tuple(sorted(lengths))
