"""Runs of ``softtrace fit`` in processes of their own, to which something may happen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.support import warm
from tests.support.corpus import write_model, write_tree
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
SAYING = 5.0  # seconds


@dataclass
class End:
    """How a process ended."""

    code: int
    said: str


class Jobs:
    """Runs of ``softtrace fit`` on one tiny model and text.

    Args:
        root: where both are written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.text = write_model(root / "model", "gpt2"), write_tree(root / "text")

    def options(self, out: Path) -> list[str]:
        """Of ``softtrace fit``."""
        words = [
            *("--model.path", self.model),
            *("--data.path", self.text, "--out", out, "--data.block_size", 16),
            *("--data.batch_size", 4, "--trainer.accelerator", "cpu"),
            *("--trainer.max_steps", STEPS, "--model.learning_rate", 0.01),
            *("--checkpoint_every", 1, "--trainer.limit_val_batches", 0),
            *("--trainer.enable_progress_bar", "false", "--penalty.warmup_steps", 3),
            *("--penalty.every", 2, "--card_blocks", 0),
        ]
        return [str(word) for word in words]

    def command(self, out: Path, fault: str, at: int, rank: int, *more: object) -> list[str]:
        words = ["-m", "tests.faults.job", fault, at, rank, *self.options(out), *more]
        return [sys.executable, *map(str, words)]

    def start(
        self,
        out: Path,
        fault: str = "none",
        at: int = 0,
        rank: int = 0,
        *more: object,
    ) -> Any:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return warm.Process(
            self.command(out, fault, at, rank, *more), cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip

    def run(self, *args: object) -> End:
        return ended(self.start(*args))  # type: ignore[arg-type]


def ended(process: Any) -> End:
    """Wait for the end, which comes unless it hangs; nothing of its group is left then."""
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        for number in (signal.SIGABRT, signal.SIGKILL):  # the first makes each say where it is
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(SAYING)
        said, _ = process.communicate()
        lines = [line for line in said.splitlines() if not line.startswith("Extension modules")]
        pytest.fail(f"no end after {PATIENCE:g} s; it said " + "\n".join(lines[-200:]))
    return End(process.returncode, said)


def saved(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")
