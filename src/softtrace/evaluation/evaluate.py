"""``softtrace evaluate``: one model on one body of text, to ``density.json``, plots and a page."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from softtrace.attach import attach
from softtrace.batch import check_least
from softtrace.data import (
    DEFAULT_EXCLUDE,
    DEFAULT_SUFFIXES,
    Document,
    stream_documents,
    stream_held_out,
)
from softtrace.errors import DataError
from softtrace.evaluation.compare import (
    DENSITY_VERSION,
    check_comparable,
    load_density,
    run_labels,
)
from softtrace.evaluation.density_intervals import intervals_of
from softtrace.evaluation.files import prepare_output, write_json
from softtrace.evaluation.identity import blocks_identity, settings_of
from softtrace.evaluation.measure import measure, summarise
from softtrace.evaluation.parts import Part, Parts, check_parts_output, plan
from softtrace.evaluation.per_token import NAME as TOKENS
from softtrace.evaluation.per_token import write_tokens
from softtrace.evaluation.plots import write_plots
from softtrace.evaluation.processes import Processes, device_of
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.report import write_report
from softtrace.evaluation.samples import text_samples
from softtrace.evaluation.table import density_table
from softtrace.load import check_model_directory, load_model, load_tokenizer
from softtrace.offloading import check_device_map, device_map_options
from softtrace.streaming import stream_evenly

__all__ = ["device_of", "documents_of_side", "evaluate"]


def evaluate(
    model: str,
    data: str,
    out: str,
    held_out_share: float = 0.0,
    salt: str = "",
    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES,
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE,
    block_size: int = 64,
    blocks: int = 64,
    batch_size: int = 16,
    extra_blocks: int = 16,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    resume: bool = False,
    per_token: bool = False,
    base: str | None = None,
    device_map: str | None = None,
    max_memory: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure how much of its graph a model needs, and write density.json and report.html to OUT.

    What is measured goes to files in OUT/evaluate-parts batch by batch, which are deleted in the
    end: a run that was killed goes on from them (resume), and several processes (accelerate launch,
    torchrun) divide them. Neither changes the numbers, since batches stay the same (MKL alone
    rounds by where memory lies, unless MKL_CBWR=COMPATIBLE); another batch_size does by rounding.
    Memory holds the model, what one batch needs, four million characters of text or its longest
    document (a plain text file is one, of 1 GiB at most), the chosen blocks, and a few numbers for
    each explained token. The intervals are those of
    :func:`~softtrace.evaluation.density_intervals.intervals_of`.

    Args:
        model: model directory (safetensors) or hub name.
        data: text file, .jsonl file or folder.
        out: folder to write to; must be new or empty.
        held_out_share: evaluate only the files that a split with this share and salt holds out;
            0 takes all files.
        salt: of the split; has to be that of the training run.
        suffixes: files of a folder to read.
        exclude: globs of files or folders to leave out.
        block_size: tokens per sequence. Sizes depend on it: compare at equal block_size only.
            The first half of each block is context, the second half is explained.
        blocks: sequences to measure, evenly spaced over the text.
        batch_size: sequences at a time; halved where memory runs out. Processes divide batches:
            more of them than batches have nothing to do.
        extra_blocks: of them, how many also get baselines and nucleus recovery (slow).
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights.
        overwrite: replace what OUT holds.
        resume: go on with the parts that a run with the same settings left in OUT.
        per_token: also write tokens.jsonl, a line for every explained token: entropy, loss, size at
            TV 0.2, area, exit layer.
        base: density.json (or its folder) of the model before training, measured on the same text:
            the report then shows what changed.
        device_map: "auto" for models larger than one device: weights that do not fit stay in main
            memory or on disk until they are used. One process; slower.
        max_memory: with device_map, how much a device may hold, such as {"0": "10GiB", "cpu":
            "60GiB"}; the rest goes to disk.

    Returns:
        What density.json holds, on every process.

    Raises:
        ModelDirectoryError, UnsupportedModelError: the model.
        DataError, InvalidInputError: the text, a number, or a base measured on other tokens; memory
            that not even one block fits.
        OutputExistsError: OUT is not empty.
        CheckpointError: parts of other settings, of another model or text, or damaged ones.
    """
    began = time.perf_counter()
    for name, value, least in (
        ("block_size", block_size, 4),
        ("blocks", blocks, 1),
        ("batch_size", batch_size, 1),
        ("extra_blocks", extra_blocks, 0),
    ):
        check_least(name, value, least)
    processes = Processes(device)
    check_device_map(device_map, max_memory, processes.count)
    min_context = block_size // 2
    check_model_directory(model)

    def prepare() -> tuple[Tensor, dict[str, Any], Parts, list[Part]]:
        check_parts_output(out, overwrite, resume)
        documents = stream_of_side(data, suffixes, exclude, held_out_share, salt)
        chosen, count = stream_evenly(documents, load_tokenizer(model), block_size, blocks)
        text = {
            "data": {
                "path": data,
                "documents": count,
                "sha256": blocks_identity(chosen),
                "split": f"held out, share {held_out_share:g}" if held_out_share else "all",
                "salt": salt,
                "block_size": block_size,
                "blocks": len(chosen),
            },
            "min_context": min_context,
            "tokens": len(chosen) * (block_size - 1 - min_context),
        }
        if base:
            check_comparable([base, "this run"], [load_density(base), text])
        settings = settings_of(
            model, chosen, processes.device, dtype=dtype, batch_size=batch_size,
            extra_blocks=extra_blocks, min_context=min_context, device_map=device_map,
            max_memory=max_memory,
        )  # fmt: skip
        parts = Parts(out, settings)
        if not resume:
            parts.remove()
        return chosen, text, parts, parts.finished(plan(len(chosen), batch_size))

    chosen, text, parts, finished = processes.from_main(prepare)
    planned = plan(len(chosen), batch_size)
    missing = [part for part in planned if part not in finished]
    name = Path(model).name

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as offload_folder:
            options = device_map_options(device_map, max_memory, processes.device, offload_folder)
            network = load_model(model, dtype=dtype, **options)
            network.eval()  # type: ignore[no-untyped-call]
            if device_map is None:
                network.to(processes.device)  # type: ignore[arg-type]
            size = parts.batch_size(finished) if finished else batch_size
            own = missing[processes.index :: processes.count]
            size = _measure_parts(network, chosen, parts, own, size, min_context, extra_blocks,
                                  name, quiet=not processes.main)  # fmt: skip
            if not processes.main:
                return {}
            return {
                "model": describe(network, model),
                "samples": text_samples(
                    network, load_tokenizer(model), chosen, min_context=min_context, batch_size=size
                ),
            }

    described = processes.together(measured)

    def finish() -> dict[str, Any]:
        found = parts.read(planned)
        density = {
            "version": DENSITY_VERSION,
            "model": described["model"],
            **text,
            "batch_size": found.batch_size,
            "processes": processes.count,
            **summarise(found),
            "intervals": intervals_of(found, len(chosen)),
            "samples": described["samples"],
            **provenance(processes.device),
            "seconds": round(time.perf_counter() - began, 1),
        }
        folder = prepare_output(out, overwrite=True)  # it was checked before the parts came
        if per_token:
            write_tokens(folder, parts, planned, chosen, min_context, load_tokenizer(model))
        else:
            (folder / TOKENS).unlink(missing_ok=True)  # of an evaluation that is overwritten
        write_json(folder / "density.json", density)
        write_plots([(name, density)], folder)
        _write_report(folder, base)
        del found  # it maps the files
        parts.remove()
        print(density_table(density))
        print(f"\nwritten to {folder}/: density.json, plots and report.html")
        return density

    return processes.from_main(finish)


def _write_report(folder: Path, base: str | None) -> None:
    """The page of the very numbers that the file holds, beside those of the base."""
    paths = [*([Path(base)] if base else []), folder]
    found = [load_density(path) for path in paths]
    write_report(list(zip(run_labels(paths, found), found, strict=True)), folder)


def _measure_parts(
    network: PreTrainedModel,
    blocks: Tensor,
    parts: Parts,
    own: list[Part],
    batch_size: int,
    min_context: int,
    extra_blocks: int,
    name: str,
    *,
    quiet: bool,
) -> int:
    """Measure a process's share of the parts, write each when it is done; the last batch size."""
    total = sum(part.end - part.first for part in own)
    with tqdm(total=total, desc=f"measuring {name}", unit="block", disable=quiet) as bar:
        for part in own:
            found = measure(
                network,
                blocks[part.first : part.end],
                min_context=min_context,
                batch_size=batch_size,
                extra_blocks=max(0, extra_blocks - part.first),
                progress=bar.update,
                first=part.first,
            )
            batch_size = found.batch_size
            parts.write(part, found)
    return batch_size


def describe(network: PreTrainedModel, path: str) -> dict[str, Any]:
    """The "model" of density.json."""
    config, anatomy = network.config, attach(network).anatomy
    return {
        "path": path,
        "type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "layers": len(anatomy.layers),
        "heads": anatomy.heads,
        "pattern": anatomy.pattern,
    }


def stream_of_side(
    data: str,
    suffixes: tuple[str, ...],
    exclude: tuple[str, ...],
    held_out_share: float,
    salt: str,
) -> Iterator[Document]:
    """:func:`documents_of_side` one at a time, see :func:`softtrace.data.stream_documents`."""
    documents = stream_documents(data, suffixes, exclude)
    if not held_out_share:
        yield from documents
        return
    found = False
    for document in stream_held_out(documents, held_out_share, salt):
        found = True
        yield document
    if not found:
        raise DataError(
            f"{data}: no file is held out at a share of {held_out_share:g}; give more files, "
            "another share or salt, or held_out_share=0 to take all of them"
        )


def documents_of_side(
    data: str,
    suffixes: tuple[str, ...],
    exclude: tuple[str, ...],
    held_out_share: float,
    salt: str,
) -> list[Document]:
    """The documents that a split holds out, or all at a share of 0.

    Raises:
        DataError: text that cannot be read, or none is held out.
    """
    return list(stream_of_side(data, suffixes, exclude, held_out_share, salt))
