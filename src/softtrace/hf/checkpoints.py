"""Checkpoints of transformers' Trainer: which of them is whole, and maps of exits in them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import nn

from softtrace.errors import CheckpointError, UnsupportedModelError
from softtrace.loss.learned_maps import LearnedMaps
from softtrace.model.exit_maps import save_exit_maps, write_exit_maps

logger = logging.getLogger(__name__)


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest ``checkpoint-N`` of a Trainer that is whole; None where there never was one.

    Args:
        folder: its ``output_dir``.

    Raises:
        CheckpointError: all that there are were cut short.
    """
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    }
    for _, path in sorted(found.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was cut short while it was written; taking an older one", path)
            continue
        return str(path)
    if not found:
        return None
    raise CheckpointError(
        f"resume_from_checkpoint: found no whole checkpoint in {folder}; leave it out to start anew"
    )


def save_maps(model: nn.Module, learned: LearnedMaps | None, folder: str | Path) -> None:
    """Write maps of exits beside the weights that were written there.

    Args:
        model: whose weights they are.
        learned: what learns its maps now, kept with all that it learns on from; None if nothing.
        folder: of the weights.
    """
    if learned is not None:
        write_exit_maps(learned.state(), folder)
        return
    try:
        save_exit_maps(model, folder)
    except UnsupportedModelError:  # what is no model of ours (prompt tuning) is trained without
        logger.debug("%s: no maps of exits", folder)
