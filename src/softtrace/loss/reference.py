"""Held-out losses of a training that is over, from what its trainer left on disk."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from softtrace.errors import InvalidInputError
from softtrace.loss.budget import LossBudget
from softtrace.loss.options import DensityOptions

#: names under which Lightning's CSVLogger keeps a fit, and transformers' Trainer a training
_CSV = ("metrics.csv", "logs/version_*/metrics.csv")
_STATE = ("trainer_state.json", "checkpoint-*/trainer_state.json")
#: names under which ``softtrace fit`` and transformers' Trainer log the held-out loss
HELD_OUT, EVAL_LOSS = "loss/held_out", "eval_loss"


def loss_budget(options: DensityOptions) -> LossBudget | None:
    """The budget that the options ask for, its reference read; None without one.

    Raises:
        InvalidInputError: no losses where the reference should be.
    """
    if options.budget is None or options.reference is None:
        return None
    reference = options.reference
    if not isinstance(reference, Mapping):
        reference = read_losses(reference, options.monitor)
    start = options.start_step + options.warmup_steps
    return LossBudget(options.budget, reference, start)


def read_losses(path: str | Path, monitor: str | None = None) -> dict[int, float]:
    """Held-out losses of a run by global step, nats.

    Args:
        path: folder of ``softtrace fit``; a ``metrics.csv`` of Lightning's CSVLogger or its folder;
            the output folder of transformers' Trainer, one of its checkpoints, or the
            ``trainer_state.json`` in it.
        monitor: name that the loss was logged under; None for ``loss/held_out`` in Lightning's
            files and ``eval_loss`` in transformers'.

    Raises:
        InvalidInputError: there is nothing, or nothing with losses of that name.
    """
    path = Path(path)
    logs = (
        [path] if path.is_file() else [file for name in _CSV + _STATE for file in path.glob(name)]
    )
    found: dict[int, float] = {}
    names: set[str] = set()
    for file in logs:
        wanted = monitor or (HELD_OUT if file.suffix == ".csv" else EVAL_LOSS)
        for step, values in _rows(file):
            names |= values.keys()
            if wanted in values:
                found[step] = values[wanted]
    if found:
        return found
    if not logs:
        what = "no file" if not path.exists() else "none of " + ", ".join(_CSV + _STATE)
        raise InvalidInputError(
            f"reference: found {what} at {path}; give the folder of a run with strength 0, the "
            "metrics.csv or trainer_state.json of one, or its held-out losses as {step: nats}"
        )
    raise InvalidInputError(
        f"reference: found no {monitor or f'{HELD_OUT} or {EVAL_LOSS}'} in {path}, but "
        f"{', '.join(sorted(names)) or 'no numbers'}; name the held-out loss by monitor, or let "
        "that run validate"
    )


def _rows(file: Path) -> Iterable[tuple[int, dict[str, float]]]:
    """Global step and what was logged there.

    Raises:
        InvalidInputError: the file cannot be read as what its name says.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".csv":
            return list(_rows_of_csv(text))
        logged = json.loads(text)["log_history"]
        return [(int(each["step"]), _numbers(each)) for each in logged]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"reference: {file} is no metrics.csv of Lightning's CSVLogger and no "
            f"trainer_state.json of transformers ({type(error).__name__}: {error}); give one of "
            "them, or the folder of the run"
        ) from error


def _rows_of_csv(text: str) -> Iterator[tuple[int, dict[str, float]]]:
    for row in csv.DictReader(text.splitlines()):
        values = {name: float(value) for name, value in row.items() if value}
        # Lightning counts a step only after the validation that follows it.
        yield int(values.pop("step")) + 1, values


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
