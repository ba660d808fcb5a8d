"""Random states as a function of seed, step and accumulated batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from softtrace.cli.fit import FitCLI
from tests.support.corpus import write_model, write_tree

pytestmark = pytest.mark.thorough


def test_seeds_of_steps(tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model", "gpt2"), write_tree(tmp_path / "text")
    words = (
        *("--model.path", model, "--data.path", text, "--data.block_size", 16),
        *("--data.batch_size", 4, "--trainer.accelerator", "cpu", "--trainer.max_steps", 6),
        *("--trainer.limit_val_batches", 0, "--trainer.enable_progress_bar", "false"),
    )
    drawn: dict[str, list[float]] = {}

    class Draws(Callback):
        def __init__(self, name: str) -> None:
            self.seen = drawn.setdefault(name, [])

        def on_after_backward(self, *_: object) -> None:
            self.seen.append(float(torch.rand(())))

    for name, more in {
        "one": (),
        "again": (),
        "other": ("--seed_everything", 1),
        "accumulated": ("--trainer.accumulate_grad_batches", 2),
    }.items():
        cli = FitCLI([str(word) for word in (*words, "--out", tmp_path / name, *more)])
        cli.trainer.callbacks.append(Draws(name))
        cli.fit()
    assert len(set(drawn["one"])) == 6
    assert drawn["one"] == drawn["again"]
    assert not set(drawn["one"]) & set(drawn["other"])
    assert len(set(drawn["accumulated"])) == 12
