"""Checkpoints that are folders, into which each process writes its part: whole or not there.

Lightning writes such a folder in place. Here it is written beside the last one, reaches the disk,
and takes its place; of a process that is killed meanwhile at least one of both is left.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from typing_extensions import override

from softtrace.errors import InvalidInputError
from softtrace.files import sync, sync_names, write_json
from softtrace.lightning.checkpoint_io import check_checksums, not_read, not_written
from softtrace.lightning.support import name_of

#: of the folder: what wrote it
_NOTE = "softtrace.json"


def writes_folders(strategy: object) -> bool:
    """Whether the checkpoints of a strategy are folders."""
    return isinstance(strategy, DeepSpeedStrategy)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def newest(path: Path) -> Path | None:
    """The checkpoint that a run resumes from; None where there is none.

    That is ``path``, or the one before it where a process was killed between two renames.
    """
    before = _beside(path, "before")
    return next((each for each in (path, before) if each.exists()), None)


def sweep(path: Path) -> None:
    """Remove what processes left beside a checkpoint that were killed while they wrote one."""
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        half.unlink(missing_ok=True)
    shutil.rmtree(_beside(path, "writing"), ignore_errors=True)
    if path.exists():
        shutil.rmtree(_beside(path, "before"), ignore_errors=True)


class LastCheckpoint(ModelCheckpoint):
    """Lightning's, which replaces a folder by a new one only when that is whole."""

    @property
    @override
    def state_key(self) -> str:
        """The key of Lightning's own class, so that runs resume that began with it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not writes_folders(trainer.strategy):
            super()._save_checkpoint(trainer, filepath)
            return
        path = Path(filepath)
        fresh = _beside(path, "writing")
        if trainer.is_global_zero:
            sweep(path)
            path.parent.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        try:
            super()._save_checkpoint(trainer, str(fresh))
            if trainer.is_global_zero:
                note = {"strategy": name_of(trainer.strategy), "processes": trainer.world_size}
                write_json(fresh / _NOTE, note)
                replace_folder(fresh, path)
        except (OSError, RuntimeError) as error:  # torch's writer of archives raises the latter
            if trainer.is_global_zero:
                shutil.rmtree(fresh, ignore_errors=True)
            raise not_written(path, error) from error
        self._last_checkpoint_saved = filepath
        trainer.strategy.barrier()


def replace_folder(fresh: Path, path: Path) -> None:
    """Let ``fresh`` take the place of ``path``; until then that, or its old name, stays whole."""
    for file in fresh.rglob("*"):
        if file.is_file():
            sync(file)
    before = _beside(path, "before")
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(path, before)
    os.replace(fresh, path)
    sync_names(path.parent)
    if before.is_dir():
        shutil.rmtree(before, ignore_errors=True)
    else:
        before.unlink(missing_ok=True)


def check_resumes(path: Path, strategy: Any, processes: int) -> None:
    """Refuse a checkpoint that this strategy cannot take, before anything of it is loaded.

    Args:
        path: that :func:`newest` gave.
        strategy: of the Trainer.
        processes: of this run.

    Raises:
        InvalidInputError: another strategy's, or of another number of processes.
        CheckpointError: it cannot be read, or its checksums are not those of its bytes.
    """
    own, folder = name_of(strategy), path.is_dir()
    if folder != writes_folders(strategy):
        found = f"a folder, as {_note(path)['strategy']} writes it" if folder else "one file"
        wanted = "one file" if folder else "a folder that DeepSpeed wrote"
        raise InvalidInputError(
            f"resume: found {path}, {found}; {own} resumes from {wanted}. Resume with the "
            "--trainer.strategy that the run began with, or start anew in another folder"
        )
    if folder:
        _check_note(path, own, processes)
        _check_bytes(path)


def _note(path: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads((path / _NOTE).read_text(encoding="utf-8"))
        return {"strategy": str(note["strategy"]), "processes": int(note["processes"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise not_read(path / _NOTE, error) from error


def _check_note(path: Path, own: str, processes: int) -> None:
    note = _note(path)
    if note["processes"] != processes:
        raise InvalidInputError(
            f"resume: found {path}, written by {note['processes']} processes, and this run has "
            f"{processes}; DeepSpeed resumes at the same number alone. Set --trainer.devices (and "
            f"--trainer.num_nodes) to {note['processes']} in all"
        )
    if note["strategy"] != own:
        raise InvalidInputError(
            f"resume: found {path}, written by {note['strategy']}, and this run has {own}; allowed "
            "is the same. Resume with the --trainer.strategy that the run began with"
        )


def _check_bytes(path: Path) -> None:
    for file in sorted(path.rglob("*.pt")):
        try:
            check_checksums(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise not_read(file, error) from error
