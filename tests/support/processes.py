"""What tests share that run scripts in processes of their own, or stand in for several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import softtrace
from softtrace.loss import draws

ROOT = Path(__file__).resolve().parents[2]


def script_environment() -> dict[str, str]:
    """For a script that imports ``tests`` and the very softtrace that runs here."""
    paths = (ROOT, Path(softtrace.__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # the name of this host need not lead anywhere
    }


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """Draw as the process of this rank would."""
    with patch.object(draws, "rank", lambda: rank):
        yield
