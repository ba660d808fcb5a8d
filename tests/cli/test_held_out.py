"""A fit remembers what it was trained on, and no command measures that as if it were held out."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from softtrace.cli import main
from softtrace.data import read_documents, split_by_file
from softtrace.data.split_record import NAME, mark, read_records
from tests.support.corpus import write_model, write_tree

SHARE, SALT = "0.3", "mine"


class Fitted(NamedTuple):
    base: Path
    text: Path
    model: Path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A model that was fitted to a part of a text."""
    root = tmp_path_factory.mktemp("fitted")
    base, text = write_model(root / "base"), write_tree(root / "text")
    assert fit(base, text, root / "model", "--data.salt", SALT) == 0
    return Fitted(base, text, root / "model")


def fit(model: Path, text: Path, out: Path, *more: str) -> int:
    return main([
        *("fit", "--model.path", str(model), "--data.path", str(text), "--out", str(out)),
        *("--data.block_size", "16", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"),
        *("--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"),
        *("--card_blocks", "0", "--checkpoint_every", "0", "--data.held_out_share", SHARE),
        *("--penalty.strength", "0", "--trainer.log_every_n_steps", "1", *more),
    ])  # fmt: skip


def words_of(command: str, fitted: Fitted, text: Path, out: Path) -> list[str]:
    """A quick run of a command on the fitted model."""
    options = {
        "evaluate": ["--model", fitted.model, "--block_size", 16, "--blocks", 2,
                     "--extra_blocks", 0],
        "study": [fitted.base, fitted.model, "--block_size", 16, "--blocks", 2, "--lengths", "[4]",
                  "--targets", 1, "--resamples", 10],
        "decode-bench": ["--model", fitted.model, "--prompts", 1, "--prompt_tokens", 8,
                         "--new_tokens", 4, "--rounds", 1],
    }[command]  # fmt: skip
    return [command, *map(str, options), "--data", str(text), "--out", str(out), "--device", "cpu"]


COMMANDS = ("evaluate", "study", "decode-bench")


def renamed(text: Path, folder: Path) -> Path:
    """The same texts under other names, as lines of a file."""
    path = folder / "renamed.jsonl"
    rows = [json.dumps({"text": document.text}) for document in read_documents(text)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", ["salt", "share", "names"])
def test_what_was_trained_on_is_not_measured_as_held_out(
    command: str, change: str, fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = renamed(fitted.text, tmp_path) if change == "names" else fitted.text
    words = words_of(command, fitted, text, tmp_path / "out")
    words += ["--held_out_share", "0.9" if change == "share" else SHARE]
    words += [] if change == "salt" else ["--salt", SALT]
    assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"softtrace {command}: {fitted.model}: was trained on ")
    assert f"fitted with --held_out_share {SHARE} --salt '{SALT}'" in last
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_held_out_is_measured(
    command: str, fitted: Fitted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = words_of(command, fitted, fitted.text, tmp_path / "out")
    assert main([*words, "--held_out_share", SHARE, "--salt", SALT]) == 0
    assert "trained on" not in caplog.text


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_all_text_is_measured_on_purpose(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = split_by_file(read_documents(fitted.text), float(SHARE), SALT)
    assert main(words_of("evaluate", fitted, fitted.text, tmp_path / "out")) == 0
    total = len(train) + len(held_out)
    said = f"{fitted.model} was trained on {len(train)} of these {total} documents"
    assert said in capsys.readouterr().err


def test_a_fit_writes_hashes_of_its_training_side(fitted: Fitted) -> None:
    train, _ = split_by_file(read_documents(fitted.text), float(SHARE), SALT)
    [record] = read_records(fitted.model)
    assert (record.held_out_share, record.salt) == (float(SHARE), SALT)
    assert list(record.trained_on) == sorted(mark(document.text) for document in train)
    weights = (fitted.model / "model.safetensors").stat()
    assert (fitted.model / NAME).stat().st_mode == weights.st_mode


@pytest.mark.thorough
def test_a_model_without_a_record_is_measured_as_ever(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted.model, tmp_path / "copy")
    (tmp_path / "copy" / NAME).unlink()
    copied = fitted._replace(model=tmp_path / "copy")
    words = words_of("evaluate", copied, fitted.text, tmp_path / "out")
    assert main([*words, "--held_out_share", SHARE]) == 0
    (tmp_path / "copy" / NAME).write_text("[]", encoding="utf-8")
    words = words_of("evaluate", copied, fitted.text, tmp_path / "other")
    assert main([*words, "--held_out_share", SHARE]) == 1
    assert "delete it to measure without looking" in capsys.readouterr().err


def test_a_fit_goes_on_from_what_its_model_was_trained_on(
    fitted: Fitted,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = fitted._replace(model=tmp_path / "again")
    caplog.set_level(logging.WARNING)
    assert fit(fitted.model, fitted.text, again.model, "--data.salt", "another") == 0
    assert f"{fitted.model} was trained on " in caplog.text
    assert [record.salt for record in read_records(again.model)] == [SALT, "another"]
    words = words_of("evaluate", again, fitted.text, tmp_path / "out")
    assert main([*words, "--held_out_share", SHARE, "--salt", "another"]) == 1
    assert f"--salt '{SALT}'" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_rest_of_a_single_file(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "one.txt"
    text.write_text("".join(f"line {n}\n\n" for n in range(100)), encoding="utf-8")
    single = fitted._replace(model=tmp_path / "single")
    assert fit(fitted.base, text, single.model) == 0
    capsys.readouterr()
    for share, code in (("0.3", 0), ("0.2", 0), ("0.4", 1)):
        out = tmp_path / share
        assert main([*words_of("evaluate", single, text, out), "--held_out_share", share]) == code
    assert "was trained on 1 of the 1 documents" in capsys.readouterr().err
