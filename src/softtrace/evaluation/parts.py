"""Measurements in files, a part of the blocks each: how processes share work, and resume it.

The plan depends on the blocks and the batch size alone, never on who measures: a part is measured
in the same batches whatever the number of processes, so the numbers are the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softtrace.density.baselines import NAMES_IN_FILES
from softtrace.errors import CheckpointError
from softtrace.evaluation.measure import LISTS, Measurements
from softtrace.files import OVERWRITE, atomic_path, check_output

FOLDER = "evaluate-parts"
RESUME = f"--resume true to continue with the parts in it, or {OVERWRITE}"

_MOST = 1000  # files: each is mapped into memory in the end, and systems limit that
_NAMES = "part-*.safetensors"
_TEMPORARY = f".{_NAMES}.*.tmp"  # of a process that was killed while it wrote


class Part(NamedTuple):
    """Blocks ``first`` to ``end`` - 1."""

    first: int
    end: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"part-{self.first:09d}-{self.end:09d}.safetensors"


def check_parts_output(out: str | Path, overwrite: bool, resume: bool) -> None:
    """:func:`softtrace.files.check_output`, which may hold parts to continue with.

    Raises:
        OutputExistsError: OUT holds other things, or parts and ``resume`` is False.
    """
    parts = (Path(out) / FOLDER).is_dir()
    check_output(out, overwrite or (resume and parts), RESUME if parts else OVERWRITE)


def plan(blocks: int, batch_size: int) -> list[Part]:
    """Parts of whole batches, at most 1000 of them."""
    step = batch_size * math.ceil(math.ceil(blocks / batch_size) / _MOST)
    return [Part(first, min(first + step, blocks)) for first in range(0, blocks, step)]


#: settings that are kept as hashes, which say nothing to people
_HASHED = {
    "blocks": "blocks of another text, share, number or block_size",
    "model": "a model of other weights",
}


class Parts:
    """The folder of the parts of one evaluation.

    Args:
        out: of the evaluation.
        settings: everything that the numbers depend on, as JSON; parts of others are refused.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(out) / FOLDER
        self.settings = json.loads(json.dumps(settings))

    def finished(self, wanted: list[Part]) -> list[Part]:
        """Those of the wanted parts that are there.

        Raises:
            CheckpointError: parts with other settings, or a file that cannot be read.
        """
        for path in sorted(self.folder.glob(_NAMES)):
            self._check(path, _metadata(path))
        return [part for part in wanted if (self.folder / part.name).exists()]

    def _check(self, path: Path, metadata: Mapping[str, str]) -> None:
        found = json.loads(metadata["settings"])
        names = [
            name
            for name in {**self.settings, **found}
            if found.get(name) != self.settings.get(name)
        ]
        if names:
            differing = ", ".join(
                _HASHED.get(name, f"{name} {found.get(name)!r} (now {self.settings.get(name)!r})")
                for name in names
            )
            raise CheckpointError(
                f"{path}: measured with other settings: {differing}. Resume with those of then, "
                "or start anew with overwrite=True (--overwrite true --resume false)"
            )

    def write(self, part: Part, found: Measurements) -> None:
        """Write a part that was measured, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"settings": json.dumps(self.settings), "batch_size": str(found.batch_size)}
        with atomic_path(self.folder / part.name) as temporary:
            save_file(dict(_tensors(found)), temporary, metadata)

    def batch_size(self, parts: list[Part]) -> int:
        """The smallest that any of the parts (at least one) ended with."""
        return min(int(_metadata(self.folder / part.name)["batch_size"]) for part in parts)

    def read(self, parts: list[Part]) -> Measurements:
        """All parts in their order, mapped from their files rather than read into memory.

        Raises:
            CheckpointError: a part is not there, or cannot be read.
        """
        missing = [part for part in parts if not (self.folder / part.name).exists()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {len(parts)} parts are not there; OUT has to be "
                "on a file system that all processes share"
            )
        found = Measurements(batch_size=self.batch_size(parts))
        for part in parts:
            found.extend(self.read_part(part))
        return found

    def read_part(self, part: Part) -> Measurements:
        """One part.

        Raises:
            CheckpointError: it is not there, or cannot be read.
        """
        path = self.folder / part.name
        with _named(path), safe_open(path, framework="pt") as file:
            return _measurements({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def remove(self) -> None:
        """Delete the parts, and their folder if nothing else is in it."""
        for pattern in (_NAMES, _TEMPORARY):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _metadata(path: Path) -> Mapping[str, str]:
    with _named(path), safe_open(path, framework="pt") as file:
        found: dict[str, str] | None = file.metadata()
    if found is None or not {"settings", "batch_size"} <= set(found):
        raise CheckpointError(
            f"{path}: is no part of an evaluation, it says nothing of its settings; delete it"
        )
    return found


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); delete it, and its blocks are measured again"
        ) from error


def _tensors(found: Measurements) -> Iterator[tuple[str, Tensor]]:
    for name in LISTS:
        if parts := getattr(found, name):
            yield name, torch.cat(parts, dim=min(1, parts[0].dim() - 1))
    if found.composition is not None:
        yield "composition", found.composition
    for (kind, kept), parts in found.baselines.items():
        yield f"baseline {NAMES_IN_FILES[kind]} {kept}", torch.cat(parts, dim=1)


def _measurements(tensors: Mapping[str, Tensor]) -> Measurements:
    found = Measurements(composition=tensors.get("composition"))
    for name in LISTS:
        if name in tensors:
            getattr(found, name).append(tensors[name])
    for kind, name in NAMES_IN_FILES.items():
        for kept in (True, False):
            if (values := tensors.get(f"baseline {name} {kept}")) is not None:
                found.baselines[kind, kept] = [values]
    return found
