"""The end of ``softtrace fit``: whole weights, and an exit to decode by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import PreTrainedModel

from softtrace.cli import main
from softtrace.cli.fit import FitCLI
from softtrace.model.loading import load_model
from tests.cli.test_fit import arguments, trained
from tests.support.corpus import write_model, write_tree


@pytest.fixture
def cli(tmp_path: Path) -> FitCLI:
    """A short fit of a tiny model, into ``out``."""
    sources = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    return FitCLI(arguments(sources, tmp_path / "out"))


@pytest.mark.parametrize("error", [None, ValueError("cannot be moved"), KeyError("name")])
def test_an_exit_is_looked_for_where_the_model_was_trained(
    cli: FitCLI,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
) -> None:
    """On a CPU 65,536 tokens of 8 billion parameters take as long as their training."""
    seen: list[str] = []

    def to(model: PreTrainedModel, device: object) -> PreTrainedModel:
        seen.append(str(device))
        if error is not None:
            raise error
        return model

    def after_training(*_: object) -> None:
        cli.trainer.strategy._root_device = torch.device("cuda", 7)  # type: ignore[attr-defined]

    monkeypatch.setattr("softtrace.cli.fit._EXIT_TOKENS", 12)
    monkeypatch.setattr("softtrace.cli.fit._EXIT_READ", 38)
    monkeypatch.setattr("softtrace.cli.fit.whole_weights", after_training)
    monkeypatch.setattr(PreTrainedModel, "to", to)
    monkeypatch.setattr(
        "softtrace.cli.fit.recommend_exit", lambda _, blocks: seen.append(str([*blocks.shape]))
    )
    cli.fit()
    assert seen == (["cuda:7", "[3, 12]", "cpu"] if error is None else ["cuda:7", "cpu"])
    assert trained(tmp_path / "out")


def test_a_process_whose_weights_cannot_be_gathered_ends_the_others(
    cli: FitCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("softtrace.cli.fit.whole_weights", fails)
    monkeypatch.setattr(
        "softtrace.lightning.failed_process.end_without_others", lambda *args: ended.append(args)
    )
    with pytest.raises(torch.OutOfMemoryError):
        cli.fit()
    assert ended == [(cli.trainer, 1)]


def test_the_model_is_saved_undisturbed_by_processes_that_are_done(
    cli: FitCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []

    @contextmanager
    def undisturbed(trainer: object) -> Iterator[None]:
        happened.append(trainer)
        yield
        happened.append("over")

    monkeypatch.setattr("softtrace.cli.fit.undisturbed", undisturbed)
    monkeypatch.setattr(FitCLI, "_save", lambda *_: happened.append("saved"))
    cli.fit()
    assert happened == [cli.trainer, "saved", "over"]


def test_the_command_says_what_it_does_after_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU that takes minutes."""
    sources = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    monkeypatch.setattr("softtrace.cli.fit.recommend_exit", lambda *_: 1)
    assert main(["fit", *arguments(sources, tmp_path / "out", "--card_blocks", 2)]) == 0
    said = capsys.readouterr().err
    assert "softtrace: looking for the early exit that decodes fastest, on " in said
    assert "softtrace: measuring densities for the model card on 2 held-out blocks" in said


@pytest.mark.parametrize("during", ["recommend_exit", "measured"])
def test_the_trained_model_outlives_an_interrupt_after_the_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    during: str,
) -> None:
    """It was written after the exit was found, and there need be no checkpoint to resume from."""

    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    sources = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    monkeypatch.setattr(f"softtrace.cli.fit.{during}", interrupted)
    assert main(["fit", *arguments(sources, out, "--card_blocks", 2)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"softtrace fit: interrupted; the trained model is in {out}"
    load_model(out)


def test_the_exit_that_is_recommended_reaches_the_config_and_nothing_else_of_it_changes(
    tmp_path: Path,
) -> None:
    sources = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    found = FitCLI(arguments(sources, tmp_path / "out")).fit()
    config = json.loads((found / "config.json").read_text())
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config.pop("softtrace_exit_layer") in range(1, before["num_hidden_layers"])
    assert config == before
