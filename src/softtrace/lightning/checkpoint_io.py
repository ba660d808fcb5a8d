"""Lightning's checkpoints, whole or not there: also where a process is killed while it writes one.

Lightning writes to a temporary file in the system's folder for those and moves it, which is a copy
where the two are on different disks, and leaves it there if the process is killed. Here the
temporary file lies in the same folder, reaches the disk, and is renamed. Nor does torch look at the
checksums that it writes: a changed byte inside a tensor would be read as a number.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from softtrace.errors import CheckpointError
from softtrace.files import atomic_path
from softtrace.libraries import first_line

_EXPECTED = ("state_dict", "global_step")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint as a whole or not at all, to local files only.

    ``softtrace fit`` uses it; elsewhere give it to ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; what was at the path stays until the new one is whole.

        Raises:
            CheckpointError: It could not be written, as on a full disk.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Into a file of Python's: what is wrong with the disk is not heard of otherwise.
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                # Lightning's format; it is read back with weights_only=True
                torch.save(checkpoint, file)  # noqa: TID251
        except (OSError, RuntimeError) as error:  # torch's writer of archives raises the latter
            disk = error.__context__ if isinstance(error.__context__, OSError) else error
            raise not_written(path, disk) from error

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: It cannot be read, its checksums are not those of its bytes, or it
                holds other things than tensors and numbers.
        """
        try:
            check_checksums(path)
            found = super().load_checkpoint(path, *args, **kwargs)
            if not isinstance(found, Mapping) or not all(name in found for name in _EXPECTED):
                raise ValueError(f"it lacks {' and '.join(_EXPECTED)}")
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises whatever its reader of archives does
            raise not_read(path, error) from error
        return found


def check_checksums(path: Path | str) -> None:
    """Raise :class:`ValueError` where bytes of an archive are not those that torch wrote."""
    with zipfile.ZipFile(path) as archive:
        if (changed := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {changed} is another")


def not_written(path: Path | str, error: Exception) -> CheckpointError:
    """What to raise where a checkpoint could not be written."""
    return CheckpointError(
        f"checkpoint {path}: could not be written ({_reason(error)}). What was there before is "
        "untouched; make room, then resume from it"
    )


def not_read(path: Path | str, error: Exception) -> CheckpointError:
    """What to raise where a checkpoint, or a file of it, cannot be read."""
    return CheckpointError(
        f"checkpoint {path}: cannot be read ({_reason(error)}). It was cut short or changed; "
        "resume from another copy, or delete it and start anew"
    )


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"
