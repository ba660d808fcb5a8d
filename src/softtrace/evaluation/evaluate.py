"""``softtrace evaluate``: one model on one body of text, to ``density.json``, plots and a page."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from softtrace.batch import check_least
from softtrace.data import (
    DEFAULT_EXCLUDE,
    DEFAULT_SUFFIXES,
    Document,
    evenly,
    pack,
    read_documents,
    split_by_file,
)
from softtrace.errors import DataError, InvalidInputError
from softtrace.evaluation.compare import (
    DENSITY_VERSION,
    check_comparable,
    load_density,
    run_labels,
)
from softtrace.evaluation.files import check_output, prepare_output, write_json
from softtrace.evaluation.measure import measure, summarise
from softtrace.evaluation.plots import write_plots
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.report import write_report
from softtrace.evaluation.samples import text_samples
from softtrace.evaluation.table import density_table
from softtrace.instrument import attach
from softtrace.load import check_model_directory, load_model, load_tokenizer


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
    base: str | None = None,
) -> dict[str, Any]:
    """Measure how much of its graph a model needs, and write density.json and report.html to OUT.

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
        batch_size: sequences at a time.
        extra_blocks: of them, how many also get baselines and nucleus recovery (slow).
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights.
        overwrite: replace what OUT holds.
        base: density.json (or its folder) of the model before training, measured on the same text:
            the report then shows what changed.

    Raises:
        ModelDirectoryError, UnsupportedModelError: the model.
        DataError, InvalidInputError: the text, a number, or a base measured on other tokens.
        OutputExistsError: OUT is not empty.
    """
    began = time.perf_counter()
    for name, value, least in (
        ("block_size", block_size, 4),
        ("blocks", blocks, 1),
        ("batch_size", batch_size, 1),
        ("extra_blocks", extra_blocks, 0),
    ):
        check_least(name, value, least)
    where = device_of(device)
    check_output(out, overwrite)
    before = load_density(base) if base else None
    check_model_directory(model)
    tokenizer = load_tokenizer(model)
    documents = documents_of_side(data, suffixes, exclude, held_out_share, salt)
    chosen = evenly(pack(documents, tokenizer, block_size), blocks)
    min_context = block_size // 2
    text = {
        "data": {
            "path": data,
            "documents": len(documents),
            "sha256": hashlib.sha256(chosen.numpy().tobytes()).hexdigest(),
            "split": f"held out, share {held_out_share:g}" if held_out_share else "all",
            "salt": salt,
            "block_size": block_size,
            "blocks": len(chosen),
        },
        "min_context": min_context,
        "tokens": len(chosen) * (block_size - 1 - min_context),
    }
    if base and before:
        check_comparable([base, "this run"], [before, text])
    network = load_model(model, dtype=dtype)
    network.to(where).eval()  # type: ignore[arg-type]
    with tqdm(total=len(chosen), desc=f"measuring {Path(model).name}", unit="block") as bar:
        found = measure(
            network,
            chosen,
            min_context=min_context,
            batch_size=batch_size,
            extra_blocks=extra_blocks,
            progress=bar.update,
        )
    config, anatomy = network.config, attach(network).anatomy
    density = {
        "version": DENSITY_VERSION,
        "model": {
            "path": model,
            "type": config.model_type,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "layers": len(anatomy.layers),
            "heads": anatomy.heads,
            "pattern": anatomy.pattern,
        },
        **text,
        **summarise(found),
        "samples": text_samples(
            network, tokenizer, chosen, min_context=min_context, batch_size=batch_size
        ),
        **provenance(where),
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder = prepare_output(out, overwrite)
    write_json(folder / "density.json", density)
    write_plots([(Path(model).name, density)], folder)
    runs = [(Path(base), before)] if base and before else []
    runs.append((folder, load_density(folder)))  # the very numbers that the file holds
    paths, found_here = zip(*runs, strict=True)
    write_report(list(zip(run_labels(paths, found_here), found_here, strict=True)), folder)
    print(density_table(density))
    print(f"\nwritten to {folder}/: density.json, plots and report.html")
    return density


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
    documents = read_documents(data, suffixes, exclude)
    if not held_out_share:
        return documents
    held_out = split_by_file(documents, held_out_share, salt)[1]
    if not held_out:
        raise DataError(f"{data}: no file is held out at a share of {held_out_share:g}")
    return held_out


def device_of(name: str) -> torch.device:
    """The device of that name, or the best one for "auto".

    Raises:
        InvalidInputError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device  # a device that can be named may not be there
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInputError(
            f"device: found {name!r}, which this machine cannot use ({reason}); allowed are "
            "'auto', 'cpu' and the accelerators that torch finds"
        ) from error
