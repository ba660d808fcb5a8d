"""Every block of Python and every command line of the pages works as it stands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import lightning.pytorch
import pytest
import torch
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import softtrace
from softtrace.cli import main
from tests.docs.pages import PAGES, ROOT, command_lines, parsed, python_blocks
from tests.support.corpus import write_model, write_tree
from tests.support.fitting import Tuner, batches
from tests.support.tiny import tiny_model, tiny_prompt

TUTORIAL = "recipes/TUTORIAL.md"
BLOCKS = [
    pytest.param(code, id=f"{page}-{number}")
    for page in PAGES
    if page != TUTORIAL  # its blocks follow from one another and from its commands: see below
    for number, code in enumerate(python_blocks(page), 1)
]
LINES = [
    pytest.param(words, id=f"{page}-{number}-{words[0]}")
    for page in PAGES
    for number, words in enumerate(command_lines(page), 1)
]


class Validated(Tuner):
    """The module of a user who validates too."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss/held_out", self.model(**batch).loss, batch_size=4)


class Data(lightning.pytorch.LightningDataModule):
    """The data of a user."""

    def train_dataloader(self) -> Any:
        return DataLoader(batches().batches, batch_size=None)

    val_dataloader = train_dataloader


@contextmanager
def short_trainers(folder: Path) -> Iterator[None]:
    """Lightning's Trainer with an end, and nothing on the screen."""
    real = lightning.pytorch.Trainer

    def trainer(**options: Any) -> Any:
        quiet: dict[str, Any] = {
            "max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1,
            "num_sanity_val_steps": 0, "default_root_dir": folder,
        }  # fmt: skip
        return real(**{**quiet, **options})

    with patch.object(lightning.pytorch, "Trainer", trainer):
        yield


def names(folder: Path) -> dict[str, Any]:
    """What a reader of the pages has at hand already."""
    model = tiny_model("llama", num_hidden_layers=6)
    input_ids = tiny_prompt(12)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    arguments = TrainingArguments(
        str(folder), max_steps=2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    return {
        "softtrace": softtrace, "model": model, **batch, "batch": {**batch, "labels": input_ids},
        "your_module": Validated(), "your_data": Data(), "args": arguments,
        "data": [{"input_ids": row, "labels": row} for row in tiny_prompt(12, batch=4)],
    }  # fmt: skip


def names_of_trl(folder: Path) -> dict[str, Any]:
    """What a reader who trains by TRL has besides."""
    from trl import SFTConfig

    from tests.support.trl_training import chats, tiny, tokenizer

    config = SFTConfig(
        str(folder), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    return {"model": tiny(), "sft_config": config, "chats": chats(), "tokenizer": tokenizer()}


@pytest.mark.parametrize("code", BLOCKS)
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
def test_blocks_run(code: str, tmp_path: Path) -> None:
    known = names(tmp_path)
    if "trl" in code:  # takes seconds to import
        known |= names_of_trl(tmp_path)
    with short_trainers(tmp_path):
        exec(compile(code, "block", "exec"), known)


def test_the_pages_are_read() -> None:
    assert len(BLOCKS) >= 7
    assert len(python_blocks(TUTORIAL)) == 3
    shown = {words.values[0][0] for words in LINES}
    assert shown >= {"fit", "evaluate", "compare", "decode-bench", "inspect", "card", "study"}


@pytest.mark.parametrize("words", LINES)
def test_command_lines_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = parsed(words).options
    # every value that was given has arrived, under its own name
    for name, value in itertools.pairwise(words):
        if name.startswith("--") and name != "--config":
            found = options
            for part in name[2:].split("."):
                found = found[part] if part in found else found["init_args"][part]
            if name == "--trainer.logger":  # a class, by its name
                found = found.class_path.rpartition(".")[2]
            if isinstance(found, float):
                assert found == float(value), name
            else:
                assert str(found).lower() == value.lower(), name


EXTRA = {
    "fit": ["--trainer.max_steps", "4", "--data.block_size", "16", "--data.batch_size", "4",
            "--trainer.accelerator", "cpu", "--monitor_every", "2", "--model.learning_rate", "0.01",
            "--trainer.enable_progress_bar", "false"],
    "evaluate": ["--block_size", "16", "--blocks", "4", "--extra_blocks", "1", "--device", "cpu"],
    "study": ["--block_size", "32", "--blocks", "4", "--lengths", "[8]", "--targets", "1",
              "--resamples", "50", "--device", "cpu"],
    "decode-bench": ["--prompts", "2", "--prompt_tokens", "8", "--new_tokens", "8", "--rounds", "1",
                     "--device", "cpu"],
    "inspect": ["--length", "16"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", [TUTORIAL, "README.md"])
def test_commands_run_one_after_the_other(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """On a tiny model, with a few options more that keep it short; the tutorial's draw."""
    if page != TUTORIAL:
        request.getfixturevalue("undrawn")
    monkeypatch.chdir(tmp_path)
    for name in ("create_repo", "upload_folder"):  # the hub
        monkeypatch.setattr(HfApi, name, Mock())
    write_model(tmp_path / "MODEL", num_hidden_layers=4)
    write_tree(tmp_path / "TEXT", files=60)
    for words in command_lines(page):
        if {"MODEL", "RUN", "BASE/density"} & set(words):
            assert main([*words, *EXTRA.get(words[0], [])]) == 0, capsys.readouterr().err
    assert (tmp_path / "RUN" / "compare" / "compare.json").is_file()
    assert (tmp_path / "RUN" / "density" / "decoding.json").is_file()
    if page == TUTORIAL:
        assert "| before | this model |" in (tmp_path / "RUN" / "README.md").read_text()
        assert (
            "density/size_easy"
            in (tmp_path / "RUN" / "logs" / "version_0" / "metrics.csv").read_text()
        )
        namespace: dict[str, Any] = {}
        for code in python_blocks(page):
            exec(compile(code, page, "exec"), namespace)
        assert "of the guesses were right" in capsys.readouterr().out
