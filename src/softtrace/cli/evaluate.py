"""``softtrace evaluate``: one model on one body of text, to ``density.json``, plots and a page."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from softtrace.checks import check_counts
from softtrace.data.blocks import stream_evenly
from softtrace.data.split_record import unseen
from softtrace.data.text_source import TextSource
from softtrace.evaluation.density_file import (
    DENSITY_VERSION,
    check_comparable,
    describe,
    load_density,
    run_labels,
)
from softtrace.evaluation.identity import settings_of, text_identity
from softtrace.evaluation.intervals import intervals_of
from softtrace.evaluation.measure import Progress, first_explained, masked_runs, measure
from softtrace.evaluation.parts import Part, Parts, check_parts_output, plan
from softtrace.evaluation.per_token import NAME as TOKENS
from softtrace.evaluation.per_token import write_tokens
from softtrace.evaluation.processes import Processes
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import DEFAULT_RUN, RunOptions
from softtrace.evaluation.samples import MOST_BLOCKS, SAMPLE_RUNS, text_samples
from softtrace.evaluation.summary import summarise
from softtrace.files import claimed, prepare_output, write_json
from softtrace.model.devices import check_device_map
from softtrace.model.loading import (
    check_model_directory,
    dtype_name,
    load_tokenizer,
    placed_model,
    saved_dtype,
)
from softtrace.report.html_page import write_report
from softtrace.report.plots import write_plots
from softtrace.report.tables import density_table
from softtrace.tracing.masking import AttentionKind, check_attention


@dataclass(frozen=True)
class _Measuring:
    """How a model is measured: everything but the text that its numbers depend on."""

    model: str
    dtype: str
    batch_size: int
    extra_blocks: int
    attention: AttentionKind
    min_context: int
    device_map: str | None
    max_memory: dict[str, str] | None

    @property
    def name(self) -> str:
        """Name of the model, as progress and plots show it."""
        return Path(self.model).name


@dataclass(frozen=True)
class _Task:
    """What is to be measured, and what of it is there already; the same on every process.

    Attributes:
        blocks: ``[N, T]`` ids.
        text: what density.json says of them.
        parts: where measurements go.
        planned: all parts of the blocks.
        finished: those of them that an earlier run left.
    """

    blocks: Tensor
    text: dict[str, Any]
    parts: Parts
    planned: list[Part]
    finished: list[Part]


def evaluate(
    model: str,
    source: TextSource,
    out: str,
    block_size: int = 64,
    blocks: int = 64,
    batch_size: int = 16,
    extra_blocks: int = 16,
    attention: AttentionKind = "recomputed",
    run: RunOptions = DEFAULT_RUN,
    resume: bool = False,
    per_token: bool = False,
    positions: int | None = None,
    base: str | None = None,
    device_map: str | None = None,
    max_memory: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure how much of its graph a model needs, and write density.json and report.html to OUT.

    What is measured goes to files in OUT/evaluate-parts batch by batch, which are deleted in the
    end: a run that was killed resumes from them (resume), and several processes (accelerate launch,
    torchrun) divide them. Neither changes the numbers, since batches stay the same (MKL alone
    rounds by where memory lies, unless MKL_CBWR=COMPATIBLE); another batch_size does by rounding.
    Memory holds the model, what one batch needs, four million characters of text or its longest
    document (a plain text file is one, of 1 GiB at most), the chosen blocks, and a few numbers for
    each explained token. The intervals are those of
    :func:`~softtrace.evaluation.intervals.intervals_of`.

    Args:
        model: Model directory (safetensors) or hub name.
        source: The text that is measured.
        out: Folder that results are written to. It must be new or empty.
        block_size: Tokens per sequence. Sizes depend on it: compare at equal block_size only.
            The first half of each block is context, the second half is explained.
        blocks: Number of sequences that are measured, evenly spaced over the text.
        batch_size: Number of sequences that are measured at a time; it is halved where memory runs
            out. Processes divide batches: more of them than batches have nothing to do.
        extra_blocks: Number of the sequences that also get baselines and nucleus recovery, which
            are slow.
        attention: Where masked runs take their attention probabilities from: recomputed from the
            masked states, as a masked model really computes them; recorded in the full run, which
            is faster and exact for every token at once; or kept, recomputed with no attention edge
            masked.
        run: How the model is run.
        resume: Resume with the parts that a run with the same settings left in OUT.
        per_token: Also write tokens.jsonl, a line for every explained token: entropy, loss, size at
            TV 0.2, area, exit layer.
        positions: Number of tokens of each block that are explained, the last ones; None for the
            second half. Long blocks with few of them cost about their masked runs.
        base: The density.json (or its folder) of the model before training, measured on the same
            text. The report then shows what changed.
        device_map: Give "auto" for models larger than one device: layers go to all accelerators,
            and weights that do not fit stay in main memory or on disk until they are used. This
            takes one process, and is slower.
        max_memory: With device_map, how much a device may hold, such as {"0": "10GiB", "cpu":
            "60GiB"}; the rest goes to disk.

    Returns:
        What density.json holds, on every process.

    Raises:
        ModelDirectoryError, UnsupportedModelError: the model.
        DataError, InvalidInputError: the text (also where the model was trained on what is to be
            held out), a number, or a base measured on other tokens; memory that not even one block
            fits.
        OutputExistsError: OUT is not empty, or another run writes to it.
        CheckpointError: parts of other settings, of another model or text, or damaged ones.
    """
    began = time.perf_counter()
    check_counts(4, block_size=block_size)
    check_counts(1, blocks=blocks, batch_size=batch_size)
    check_counts(0, extra_blocks=extra_blocks)
    first = first_explained(block_size, positions)
    check_attention(attention)
    processes = Processes(run.device)
    check_device_map(device_map, max_memory, processes.count)
    check_model_directory(model)
    measuring = _Measuring(
        model=model, dtype=run.dtype, batch_size=batch_size, extra_blocks=extra_blocks,
        attention=attention, min_context=first,
        device_map=device_map, max_memory=max_memory,
    )  # fmt: skip

    with ExitStack() as ours:  # OUT, on the main process

        def claim() -> None:
            ours.enter_context(claimed(out))
            check_parts_output(out, run.overwrite, resume)

        processes.from_main(claim)
        choose = partial(_chosen, measuring, source, block_size, blocks, base)
        chosen, text = processes.from_main(choose)
        planned = plan(len(chosen), batch_size)
        begin = partial(
            _parts_and_finished, measuring, chosen, planned, out, processes.device, resume
        )
        parts, finished = processes.from_main(begin)
        task = _Task(chosen, text, parts, planned, finished)
        described = processes.together(partial(_measure_share, measuring, task, processes))
        density = processes.from_main(partial(_density, task, described, processes, began))
        processes.from_main(partial(_finish, out, density, measuring, task, base, per_token))
    return density


def _chosen(
    measuring: _Measuring, source: TextSource, block_size: int, blocks: int, base: str | None
) -> tuple[Tensor, dict[str, Any]]:
    """The blocks of the text that are measured, and what density.json says of them.

    Raises:
        InvalidInputError: a base that was measured on other tokens.
    """
    tokenizer = load_tokenizer(measuring.model)
    texts = unseen(source.stream(), [measuring.model], source.held_out_share)
    chosen, documents = stream_evenly(texts, tokenizer, block_size, blocks)
    text = {
        "data": text_identity(source, chosen, documents),
        "attention": measuring.attention,
        "dtype": saved_dtype(measuring.model) if measuring.dtype == "auto" else measuring.dtype,
        "min_context": measuring.min_context,
        "tokens": len(chosen) * (block_size - 1 - measuring.min_context),
    }
    if base:
        check_comparable([base, "this run"], [load_density(base), text])
    return chosen, text


def _parts_and_finished(
    measuring: _Measuring,
    blocks: Tensor,
    planned: list[Part],
    out: str,
    device: torch.device,
    resume: bool,
) -> tuple[Parts, list[Part]]:
    """Where measurements go, and which are there: of an earlier run, where it is resumed."""
    parts = Parts(out, settings_of(blocks=blocks, device=device, **vars(measuring)))
    if not resume:
        parts.remove()
    return parts, parts.finished(planned)


def _measure_share(measuring: _Measuring, task: _Task, processes: Processes) -> dict[str, Any]:
    """Measure this process's share of the parts; the main one describes the model and samples."""
    missing = [part for part in task.planned if part not in task.finished]
    own = missing[processes.index :: processes.count]
    total = sum(_runs(measuring, part) for part in own)
    if processes.main:
        total += min(MOST_BLOCKS, len(task.blocks)) * SAMPLE_RUNS
    bar = tqdm(
        total=total,
        desc=f"measuring {measuring.name}",
        unit="run",
        disable=not processes.main,
    )
    placed = placed_model(
        measuring.model,
        measuring.dtype,
        processes.device,
        measuring.device_map,
        measuring.max_memory,
    )
    with bar, placed as network:
        size = _measure_parts(network, measuring, task, own, bar.update)
        if not processes.main:
            return {}
        return {
            "model": describe(network, measuring.model),
            "dtype": dtype_name(network.dtype),
            "samples": text_samples(
                network, load_tokenizer(measuring.model), task.blocks,
                min_context=measuring.min_context, batch_size=size,
                attention=measuring.attention, progress=bar.update,
            ),
        }  # fmt: skip


def _runs(measuring: _Measuring, part: Part) -> int:
    """Masked runs that the blocks of a part take together."""
    extra = min(part.end, max(part.first, measuring.extra_blocks)) - part.first
    others = part.end - part.first - extra
    return extra * masked_runs(True) + others * masked_runs(False)


def _measure_parts(
    network: PreTrainedModel,
    measuring: _Measuring,
    task: _Task,
    own: list[Part],
    progress: Progress,
) -> int:
    """Measure some parts, each written when it is done; the batch size that fitted in the end."""
    finished, size = task.finished, measuring.batch_size
    if finished:  # where memory ran out for those, it will for these
        size = task.parts.batch_size(finished)
    for part in own:
        found = measure(
            network,
            task.blocks[part.first : part.end],
            min_context=measuring.min_context,
            batch_size=size,
            extra_blocks=max(0, measuring.extra_blocks - part.first),
            progress=progress,
            attention=measuring.attention,
            first=part.first,
        )
        size = found.batch_size
        task.parts.write(part, found)
    return size


def _density(
    task: _Task, described: dict[str, Any], processes: Processes, began: float
) -> dict[str, Any]:
    """What density.json holds, from the files of all parts."""
    found = task.parts.read(task.planned)
    return {
        "version": DENSITY_VERSION,
        "model": described["model"],
        **task.text,
        "dtype": described["dtype"],
        "batch_size": found.batch_size,
        "processes": processes.count,
        **summarise(found),
        "intervals": intervals_of(found, len(task.blocks)),
        "samples": described["samples"],
        **provenance(processes.device),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _finish(
    out: str,
    density: dict[str, Any],
    measuring: _Measuring,
    task: _Task,
    base: str | None,
    per_token: bool,
) -> None:
    """Write density.json, plots, the page and, if wanted, tokens.jsonl; then parts may go."""
    folder = prepare_output(out, overwrite=True)  # it was checked before the parts came
    if per_token:
        tokenizer, context = load_tokenizer(measuring.model), measuring.min_context
        write_tokens(folder, task.parts, task.planned, task.blocks, context, tokenizer)
    else:
        (folder / TOKENS).unlink(missing_ok=True)  # of an evaluation that is overwritten
    write_json(folder / "density.json", density)
    write_plots([(measuring.name, density)], folder)
    _write_report(folder, base)
    task.parts.remove()
    print(density_table(density))
    print(f"\nwritten to {folder}/: density.json, plots and report.html")


def _write_report(folder: Path, base: str | None) -> None:
    """The page of the very numbers that the file holds, beside those of the base."""
    paths = [*([Path(base)] if base else []), folder]
    found = [load_density(path) for path in paths]
    write_report(list(zip(run_labels(paths, found), found, strict=True)), folder)
