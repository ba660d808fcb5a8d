"""``softtrace study --sensitivity``: which conclusions survive another way to measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from softtrace.evaluation.density_file import describe
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import RunOptions
from softtrace.evaluation.study.sensitivity import (
    CONCLUSIONS,
    Definition,
    Reading,
    conclusions,
    read_definitions,
    ways,
)
from softtrace.files import prepare_output, write_json, write_text
from softtrace.model.devices import device_of
from softtrace.model.loading import load_model
from softtrace.report.sensitivity_table import sensitivity_table

SENSITIVITY_VERSION = 1


def sensitivity(
    models: Sequence[str],
    blocks: Tensor,
    data: dict[str, Any],
    out: str,
    *,
    batch_size: int,
    resamples: int,
    seed: int,
    run: RunOptions,
) -> dict[str, Any]:
    """Measure by every definition, and write sensitivity.json and sensitivity.txt to OUT.

    Args:
        models: one or two, checked.
        blocks: ``[N, T]`` ids of held-out text.
        data: what result files say of them.
        out, batch_size, resamples, seed, run: see ``softtrace study``.
    """
    began = time.perf_counter()
    first = blocks.shape[1] // 2
    where = device_of(run.device)
    readings: list[dict[Definition, Reading]] = []
    described = []
    for model in models:
        network = load_model(model, dtype=run.dtype)
        network.to(where).eval()  # type: ignore[arg-type]
        described.append(describe(network, model))
        total = len(blocks) * ways()
        with tqdm(total=total, desc=f"measuring {model}", unit="sequence") as bar:
            readings.append(
                read_definitions(
                    network, blocks, first=first, batch_size=batch_size, progress=bar.update
                )
            )
        del network
    found = {
        "version": SENSITIVITY_VERSION,
        "models": described,
        "data": data,
        "tokens": len(blocks) * (blocks.shape[1] - 1 - first),
        "min_context": first,
        "conclusions": dict(list(CONCLUSIONS.items())[: len(models) + 1]),
        "definitions": conclusions(readings, resamples, seed),
        "resamples": resamples,
        "seed": seed,
        **provenance(where),
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder = prepare_output(out, run.overwrite)
    table = sensitivity_table(found)
    write_json(folder / "sensitivity.json", found)
    write_text(folder / "sensitivity.txt", table)
    print(table)
    print(f"\nwritten to {folder}/: sensitivity.json and sensitivity.txt")
    return found
