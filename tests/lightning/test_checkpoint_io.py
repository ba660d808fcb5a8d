"""Lightning's checkpoints: written in their own folder, read only if they are whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from softtrace.errors import CheckpointError
from softtrace.lightning import AtomicCheckpointIO

STATE: dict[str, Any] = {"state_dict": {"weight": torch.arange(5000.0)}, "global_step": 3}


def save(path: Path, state: dict[str, Any] = STATE) -> None:
    AtomicCheckpointIO().save_checkpoint(state, path)


def load(path: Path) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


def test_goes_through_no_other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a temporary file elsewhere")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    path = tmp_path / "new" / "last.ckpt"
    save(path)
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    found = load(path)
    assert torch.equal(found["state_dict"]["weight"], STATE["state_dict"]["weight"])


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    before = path.read_bytes()
    with pytest.raises(AttributeError, match="local object"):
        save(path, {**STATE, "cannot be written": lambda: None})
    path.parent.chmod(0o700)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_file_in_the_way_of_its_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: could not be written"):
        save(tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_any_changed_byte_is_noticed(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    whole = bytearray(path.read_bytes())
    whole[int(share * len(whole))] ^= 1
    path.write_bytes(whole)
    torch.load(path, weights_only=True)  # torch itself does not look
    with pytest.raises(CheckpointError, match=r"cannot be read .*checksum"):
        load(path)


@pytest.mark.parametrize("other", [{}, [1, 2], {"state_dict": {}}])
def test_other_things_than_a_checkpoint_are_refused(tmp_path: Path, other: Any) -> None:
    torch.save(other, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="it lacks state_dict and global_step"):
        load(tmp_path / "last.ckpt")


def test_a_checkpoint_that_is_not_there_is_lightnings_affair(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.ckpt")
