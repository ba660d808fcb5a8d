"""``softtrace study``: the paper's questions of models, as of one before and after training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softtrace.checks import check_counts, check_least, check_range
from softtrace.cli.generation import generation as measure_generation
from softtrace.cli.paper import paper as measure_paper
from softtrace.cli.questions import questions
from softtrace.cli.sensitivity import sensitivity as measure_sensitivity
from softtrace.cli.study_models import check_same_tokens, labels, tokenizers_of
from softtrace.cli.study_task import StudyTask
from softtrace.data.blocks import evenly, pack
from softtrace.data.documents import Document, split_by_file
from softtrace.data.encoding import beginning
from softtrace.data.split_record import unseen
from softtrace.data.text_source import TextSource
from softtrace.errors import DataError, InvalidInputError
from softtrace.evaluation.identity import text_identity
from softtrace.evaluation.measure import first_explained
from softtrace.evaluation.processes import check_one_process
from softtrace.evaluation.run_options import DEFAULT_RUN, RunOptions
from softtrace.evaluation.study.readings import window_ends
from softtrace.files import check_output, claims_out
from softtrace.model.devices import check_device_map, device_of
from softtrace.model.loading import check_model_directory, load_tokenizer
from softtrace.tracing.masking import AttentionKind, check_attention


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
    positions: int | None = None,
    resamples: int = 2000,
    smoothing: float = 1.0,
    seed: int = 0,
    attention: AttentionKind = "recomputed",
    sensitivity: bool = False,
    paper: bool = False,
    generation: bool = False,
    run: RunOptions = DEFAULT_RUN,
    device_map: str | None = None,
    max_memory: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Answer the paper's questions of models, with intervals; write them to OUT.

    Args:
        models: Model directories (safetensors) or hub names of one tokenizer, with paper of any.
            Two are taken for before and after training, and every change gets an interval; between
            each two the rank correlation of their densities is given.
        source: The text, whose held-out side is measured.
        out: Folder that study.json, study.txt and study.png are written to. It must be new or
            empty.
        block_size: Tokens per sequence. The first half of each is context, the second half is
            explained.
        blocks: Number of sequences that are measured, evenly spaced over the held-out text.
        batch_size: Number of sequences that are measured at a time; it is halved where memory runs
            out.
        lengths: Lengths in tokens of the windows in which the same tokens are explained again. The
            token that the tokenizer puts in front of a text is one of them.
        targets: Number of tokens of each sequence that windows explain.
        positions: Number of tokens of each sequence that are explained, the last ones; None for the
            second half. Not with paper or generation, which explain others.
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
            of 41); time and memory grow with the square of it. Models of different tokenizers are
            given the same texts.
        generation: Instead, let each model continue after the first half of every block,
            greedily and sampled, and measure what it writes beside the text: generation.json,
            generation.txt and generation.png.
        run: How the models are run.
        device_map: Give "auto" for models larger than one device: layers go to all accelerators,
            and weights that do not fit stay in main memory or on disk until they are used.
        max_memory: With device_map, how much a device may hold, such as {"0": "10GiB", "cpu":
            "60GiB"}; the rest goes to disk.

    Raises:
        ModelDirectoryError, UnsupportedModelError: a model.
        DataError, InvalidInputError: the text (also where a model was trained on what is to be held
            out), a number, fewer than 2 sequences, no training side, or two models that do not read
            the text alike.
        OutputExistsError: OUT is not empty, or another run writes to it.
    """
    began = time.perf_counter()
    check_attention(attention)
    _check_mode(models, sensitivity=sensitivity, paper=paper, generation=generation)
    lengths = _check(lengths, source.held_out_share, smoothing)
    check_counts(4, block_size=block_size)
    check_counts(2, blocks=blocks)
    check_counts(1, batch_size=batch_size, targets=targets, resamples=resamples)
    first = first_explained(block_size, positions)
    if positions is not None and (paper or generation):
        raise InvalidInputError(
            "positions: found with paper or generation, which explain tokens of their own; leave "
            "it out"
        )
    windowed = not (paper or sensitivity or generation)
    longest = lengths[-1] if windowed else 1
    ends = window_ends(block_size, first, longest, targets)
    check_one_process("softtrace study")
    device_of(run.device)
    check_device_map(device_map, max_memory, processes=1)
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
    tokenizers = tokenizers_of(models, tokenizer, held_out, block_size, chosen)
    task = StudyTask(
        models=dict(zip(labels(models), models, strict=True)),
        blocks=chosen,
        first=first,
        training=training,
        tokenizers=tokenizers,
        data=text_identity(source, chosen, len(held_out)),
        out=out,
        batch_size=batch_size,
        resamples=resamples,
        seed=seed,
        attention=attention,
        run=run,
        device_map=device_map,
        max_memory=max_memory,
        began=began,
    )
    if paper:
        return measure_paper(task)
    check_same_tokens(models, tokenizers)
    if sensitivity:
        return measure_sensitivity(task)
    if generation:
        return measure_generation(task)
    return questions(task, lengths, ends, smoothing)


def _check_mode(models: Sequence[str], **modes: bool) -> None:
    if not models:
        raise InvalidInputError("models: found none, expected at least one")
    chosen = [name for name, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise InvalidInputError(
            f"{', '.join(chosen)}: found more than one, allowed is one of them; run study once for "
            "each"
        )
    if modes["sensitivity"] and len(models) > 2:
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
