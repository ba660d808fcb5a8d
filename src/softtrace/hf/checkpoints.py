"""Which checkpoint of transformers' Trainer a run that was killed can resume from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from softtrace.errors import CheckpointError

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
