"""The progress bar of a fit: optimiser steps done of steps to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from softtrace.cli.fit import FitCLI, fit
from softtrace.lightning.progress import StepProgress, progress_of
from tests.cli.test_fit import arguments
from tests.support.corpus import write_model, write_tree
from tests.support.fitting import Tuner, batches

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


class Shown(Callback):
    """What the bar says after every batch, and at the end."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int | None]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        bar = trainer.progress_bar_callback.train_progress_bar  # type: ignore[union-attr]
        self.seen.append((bar.desc, bar.n, bar.total))


def shown(**options: Any) -> list[tuple[str, int, int | None]]:
    """What the bar says in a fit of four batches an epoch."""
    seen = Shown()
    more = options.pop("callbacks", [])
    Trainer(**QUIET, callbacks=[*more, StepProgress(), seen], **options).fit(Tuner(), batches(4))
    return seen.seen


def test_accumulated_batches_are_one_step() -> None:
    found = shown(max_steps=3, max_epochs=-1, accumulate_grad_batches=2)
    assert found == [
        *(("epoch 1: ", 0, 3), ("epoch 1: ", 1, 3), ("epoch 1: ", 1, 3), ("epoch 1: ", 2, 3)),
        *(("epoch 2: ", 2, 3), ("epoch 2: ", 3, 3)),
    ]


def test_steps_of_all_epochs_are_counted() -> None:
    found = shown(max_epochs=2, accumulate_grad_batches=3)  # the last step of an epoch is shorter
    assert [done for _, done, _ in found] == [0, 0, 1, 2, 2, 2, 3, 4]
    assert {total for _, _, total in found} == {4}
    assert found[-1][0] == "epoch 2: "


def test_a_time_alone_gives_no_number_of_steps() -> None:
    class Ends(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    found = shown(max_epochs=-1, callbacks=[Ends()], max_time={"hours": 1})
    assert {total for _, _, total in found} == {None}
    assert [done for _, done, _ in found] == [1, 2, 3]


def test_where_accumulation_changes_with_the_epoch_the_number_is_not_known() -> None:
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    found = shown(max_epochs=2, callbacks=[schedule])
    assert [(done, total) for _, done, total in found] == [
        *((1, None), (2, None), (3, None), (4, None)),
        *((4, None), (5, None), (5, None), (6, None)),
    ]


def test_a_resumed_fit_shows_the_steps_of_before(tmp_path: Path) -> None:
    first = Trainer(**QUIET, callbacks=[StepProgress()], max_steps=4, max_epochs=-1)
    first.fit(Tuner(), batches(4))
    first.save_checkpoint(tmp_path / "last.ckpt")
    seen = Shown()
    again = Trainer(**QUIET, callbacks=[StepProgress(), seen], max_steps=6, max_epochs=-1)
    again.fit(Tuner(), batches(4), ckpt_path=tmp_path / "last.ckpt")
    assert [(done, total) for _, done, total in seen.seen] == [(5, 6), (6, 6)]


def test_a_log_file_gets_few_lines_with_short_names_and_no_number_of_the_log_s_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Validated(Tuner):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss/held_out", self.training_step(batch, batch_idx), prog_bar=True)

    options = {**QUIET, "logger": CSVLogger(tmp_path), "max_steps": 30}
    trainer = Trainer(**options, callbacks=[StepProgress()], val_check_interval=30, max_epochs=-1)
    trainer.fit(Validated(), batches(40), batches(40))
    text = capsys.readouterr().out
    assert "30/30" in text
    assert " held_out=" in text
    assert "v_num" not in text
    assert text.count("\r") < 20


def test_an_error_has_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        Trainer(**QUIET, callbacks=[StepProgress(), Fails()], max_steps=2).fit(Tuner(), batches(4))
    assert capsys.readouterr().out.endswith("\n")


def test_the_bar_of_the_user_is_the_only_one() -> None:
    given = TQDMProgressBar()
    assert progress_of({}, [given]) == []
    assert progress_of({"enable_progress_bar": False}, []) == []
    assert progress_of({"barebones": True}, []) == []
    (own,) = progress_of({"enable_progress_bar": None}, [Callback()])
    assert isinstance(own, StepProgress)


def test_a_fit_that_is_resumed_within_an_epoch_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    more = ("--trainer.enable_progress_bar", "true", "--trainer.limit_train_batches", 5)
    more += ("--trainer.log_every_n_steps", "1")
    for steps, again in ((6, "false"), (8, "true")):
        words = (*more, "--resume", again, "--trainer.max_steps", steps)
        fit(arguments(sources, tmp_path / "out", *words))
    text = capsys.readouterr().out
    assert "epoch 2:  75%" in text
    assert "8/8" in text
    assert "Training" not in text


def test_fit_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    more = ("--trainer.enable_progress_bar", "true", "--trainer.accumulate_grad_batches", 2)
    cli = FitCLI(arguments(sources, tmp_path / "out", *more))
    cli.fit()
    text = capsys.readouterr().out
    assert "6/6" in text
    assert "-2" not in text
    assert "Epoch" not in text
