"""Lightning's checkpoints, whole or not there: also where a process is killed while it writes one.

Lightning writes to a temporary file and moves it, which is a copy where the two are on different
disks. Here the temporary file lies in the same folder, reaches the disk, and is renamed.
"""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from softtrace.errors import CheckpointError
from softtrace.evaluation.files import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """``Trainer(plugins=[AtomicCheckpointIO()])``; what ``softtrace fit`` uses."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; what was at the path stays until the new one is whole.

        Raises:
            CheckpointError: it could not be written, as on a full disk.
        """
        try:
            with atomic_path(path) as temporary:
                super().save_checkpoint(checkpoint, temporary, storage_options)
        except (OSError, RuntimeError) as error:  # torch's writer of archives raises the latter
            raise CheckpointError(
                f"checkpoint {path}: could not be written ({_reason(error)}). What was there "
                "before is untouched; make room, then go on from it"
            ) from error

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: it cannot be read, or holds other things than tensors and numbers.
        """
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises whatever its reader of archives does
            raise CheckpointError(
                f"checkpoint {path}: cannot be read ({_reason(error)}). It was cut short or "
                "changed; go on from another copy, or delete it and start anew"
            ) from error


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
