"""Checkpoints that are folders; what writes them here is a strategy that needs no DeepSpeed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from softtrace.errors import CheckpointError, InvalidInputError
from softtrace.lightning import folders
from softtrace.lightning.folders import LastCheckpoint, check_resumes, newest, sweep
from tests.support.fitting import Batches, Tuner, batches, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class InFolders(SingleDeviceStrategy):
    """Writes into a folder, in place, as DeepSpeed does."""

    fails_at = 0

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        Path(filepath, "checkpoint").mkdir(parents=True)
        step = checkpoint["global_step"]
        torch.save(checkpoint, Path(filepath, "checkpoint", "rank-0.pt"))
        if step == self.fails_at:
            raise OSError(28, "No space left on device")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        return torch.load(Path(checkpoint_path, "checkpoint", "rank-0.pt"), weights_only=True)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "writes_folders", lambda each: isinstance(each, InFolders))


def fitted(folder: Path, strategy: Any, checkpoint: Path | None = None, steps: int = 4) -> Tuner:
    module = Tuner()
    callback = LastCheckpoint(
        folder, filename="last", every_n_train_steps=1, enable_version_counter=False
    )
    fitting = trainer(
        callback, strategy=strategy, max_epochs=-1, max_steps=steps, enable_checkpointing=True
    )
    fitting.fit(module, Batches(*batches(1).batches), ckpt_path=checkpoint, weights_only=True)
    return module


def step_of(path: Path) -> int:
    step: int = torch.load(path / "checkpoint" / "rank-0.pt", weights_only=True)["global_step"]
    return step


def test_a_fit_resumes_from_a_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    straight = fitted(tmp_path / "straight", InFolders("cpu"))
    fitted(tmp_path / "cut", InFolders("cpu"), steps=2)
    last = tmp_path / "cut" / "last.ckpt"
    assert step_of(last) == 2
    strategy = InFolders("cpu")
    check_resumes(last, strategy, 1)
    resumed = fitted(tmp_path / "cut", strategy, newest(last))
    assert step_of(last) == 4
    assert [each.name for each in last.parent.iterdir()] == ["last.ckpt"]
    pairs = zip(resumed.parameters(), straight.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path: Path) -> None:
    strategy = InFolders("cpu")
    strategy.fails_at = 3
    with pytest.raises(CheckpointError, match=r"last.ckpt: could not be written .*No space left"):
        fitted(tmp_path, strategy)
    assert step_of(tmp_path / "last.ckpt") == 2
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("renames", "step"), [(0, 1), (1, 1), (2, 2)])
def test_a_kill_at_any_rename_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, step: int
) -> None:
    fitted(tmp_path, InFolders("cpu"), steps=1)
    last, done = tmp_path / "last.ckpt", 0
    replace, rmtree = os.replace, folders.shutil.rmtree

    def counted(one: Any, other: Any) -> None:
        nonlocal done
        if "last.ckpt" in (Path(one).name, Path(other).name):
            if done == renames:
                raise Killed
            done += 1
        replace(one, other)

    def killed(path: Any, ignore_errors: bool = False) -> None:
        if done == 2:
            raise Killed
        rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", counted)
        patched.setattr(folders.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            fitted(tmp_path, InFolders("cpu"), last, steps=2)
    found = newest(last)
    assert found is not None
    assert step_of(found) == step
    check_resumes(found, InFolders("cpu"), 1)
    fitted(tmp_path, InFolders("cpu"), found, steps=3)
    sweep(last)
    assert step_of(last) == 3
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_another_run_cannot_take_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, InFolders("cpu"), steps=1)
    last = tmp_path / "last.ckpt"
    with pytest.raises(InvalidInputError, match=r"by 1 processes, and this run has 3; .* to 1 in"):
        check_resumes(last, InFolders("cpu"), 3)
    with pytest.raises(InvalidInputError, match=r"a folder, as InFolders .* resumes from one file"):
        check_resumes(last, SingleDeviceStrategy("cpu"), 1)
    file = tmp_path / "file.ckpt"
    file.touch()
    check_resumes(file, SingleDeviceStrategy("cpu"), 1)
    with pytest.raises(InvalidInputError, match="one file; InFolders resumes from a folder"):
        check_resumes(file, InFolders("cpu"), 1)
    note = last / "softtrace.json"
    said = json.loads(note.read_text())
    note.write_text(json.dumps({**said, "strategy": "DeepSpeedStrategy(stage=3)"}))
    with pytest.raises(InvalidInputError, match=r"by DeepSpeedStrategy\(stage=3\), and .* InFol"):
        check_resumes(last, InFolders("cpu"), 1)
    note.unlink()
    with pytest.raises(CheckpointError, match=r"softtrace.json: cannot be read .FileNotFoundError"):
        check_resumes(last, InFolders("cpu"), 1)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    fitted(tmp_path, InFolders("cpu"), steps=1)
    part = tmp_path / "last.ckpt" / "checkpoint" / "rank-0.pt"
    whole = bytearray(part.read_bytes())
    whole[len(whole) // 2] ^= 1
    part.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"checkpoint/rank-0.pt: cannot be read"):
        check_resumes(tmp_path / "last.ckpt", InFolders("cpu"), 1)


def test_runs_that_began_with_lightnings_own_go_on() -> None:
    given: dict[str, Any] = {"every_n_train_steps": 5}
    assert LastCheckpoint(**given).state_key == ModelCheckpoint(**given).state_key


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "last.ckpt") is None
