"""What a fit was trained on, by content: text that it saw is not measured as if it were held out.

Names decide the side of a split, and names change: a file is renamed, a salt forgotten. So a fit
writes a hash of every text of its training side beside the weights, and what measures held-out text
looks the texts up.
"""

from __future__ import annotations

import base64
import json
import logging
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from softtrace.data.documents import Document
from softtrace.errors import DataError
from softtrace.files import write_json

logger = logging.getLogger(__name__)

NAME = "trained_on.json"
VERSION = 1
_BYTES = 8  # of a hash


@dataclass(frozen=True)
class SplitRecord:
    """One fit's split.

    Attributes:
        held_out_share, salt: of the split.
        trained_on: hashes of the texts of the training side, in rising order. A text that is on
            both sides (a license, say) is left out: it would refuse the run's own split.
    """

    held_out_share: float
    salt: str
    trained_on: Sequence[int]

    def saw(self, mark: int) -> bool:
        """Whether the text of this hash was trained on."""
        place = bisect_left(self.trained_on, mark)
        return place < len(self.trained_on) and self.trained_on[place] == mark


def record_split(
    train: Sequence[Document], held_out: Sequence[Document], held_out_share: float, salt: str
) -> SplitRecord:
    """What to remember of the two sides of :func:`softtrace.data.split_by_file`."""
    trained, kept = {mark(each.text) for each in train}, {mark(each.text) for each in held_out}
    if twice := len(trained & kept):
        logger.warning(
            "%d of %d texts that are held out are word for word on the training side too",
            twice, len(kept),
        )  # fmt: skip
    if len(train) == 1 and len(held_out) < 2:
        # A single document, whose tail is held out (or two, to which this does nothing). Another
        # share would give another tail of it, which begins in what is trained on.
        whole = train[0].text + "".join(each.text for each in held_out)
        trained.update(_marks_of_tails(whole))
        kept.update(*(_marks_of_tails(each.text) for each in held_out))
    return SplitRecord(held_out_share, salt, array("Q", sorted(trained - kept)))


def mark(text: str) -> int:
    """A hash of 64 bits of the words of all lines; other white space does not count."""
    found = 0
    for tail in _marks_of_tails(text):
        found = tail
    return found


def _marks_of_tails(text: str) -> Iterator[int]:
    """Hashes of the text from each line that is not blank to its end; the whole text's is last."""
    digest = b""
    for line in reversed(text.split("\n")):
        if words := line.split():
            content = " ".join(words).encode("utf-8", "surrogatepass")
            digest = blake2b(content + digest, digest_size=_BYTES).digest()
            yield int.from_bytes(digest, "little")


def unseen(
    documents: Iterable[Document], models: Sequence[str | Path], held_out_share: float
) -> Iterator[Document]:
    """The documents, one at a time; after the last one it is said how many a model was trained on.

    A model that has no record (of ours or of anybody) is not asked.

    Args:
        documents: what is to be measured.
        models: directories, or names on the hub.
        held_out_share: 0 where all text is read on purpose; then it is only logged.

    Raises:
        DataError: a model was trained on some of what was to be held out, or its record is damaged.
    """
    records = [(model, record) for model in models for record in read_records(model)]
    seen: list[list[str]] = [[] for _ in records]
    total = 0
    for document in documents:
        total += 1
        found = mark(document.text) if records else 0
        for (_, record), names in zip(records, seen, strict=True):
            if record.saw(found):
                names.append(document.name)
        yield document
    for (model, record), names in zip(records, seen, strict=True):
        if names and held_out_share:
            raise DataError(_refusal(model, record, names, total))
        if names:
            logger.warning(
                "%s was trained on %d of these %d documents, which say nothing of text that is new "
                "to it", model, len(names), total,
            )  # fmt: skip


def _refusal(model: str | Path, record: SplitRecord, names: Sequence[str], total: int) -> str:
    own = f"--held_out_share {record.held_out_share:g}"
    if record.salt:
        own += f" --salt {record.salt!r}"
    then = (
        f"it was fitted with {own}: give these, and the text under the names of then, or text "
        "that is new to it"
        if record.held_out_share
        else "it was fitted on all of its text: give text that is new to it"
    )
    return (
        f"{model}: was trained on {len(names)} of the {total} documents that were to be held out, "
        f"the first is {names[0]}; {then}"
    )


def write_records(folder: Path | str, records: Sequence[SplitRecord]) -> None:
    """Write them beside the weights, those of the fits that a model came from first."""
    runs = [
        {
            "held_out_share": record.held_out_share,
            "salt": record.salt,
            "trained_on": base64.b64encode(_swapped(record.trained_on).tobytes()).decode("ascii"),
        }
        for record in records
    ]
    write_json(Path(folder) / NAME, {"version": VERSION, "runs": runs})


def read_records(model: str | Path) -> list[SplitRecord]:
    """What is remembered of the fits that a model came from, the last one last; often nothing.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(model) / NAME
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']!r}, known is {VERSION}")
        return [_read(run) for run in found["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); it says which text the "
            "model was trained on. Copy it again, or delete it to measure without looking"
        ) from error


def _read(run: Any) -> SplitRecord:
    trained_on: array[int] = array("Q")
    trained_on.frombytes(base64.b64decode(run["trained_on"], validate=True))
    return SplitRecord(float(run["held_out_share"]), str(run["salt"]), _swapped(trained_on))


def _swapped(marks: Sequence[int]) -> array[int]:
    """Hashes as the file has them, the lowest byte first on any machine; or back again."""
    found = array("Q", marks)
    if sys.byteorder == "big":
        found.byteswap()
    return found
