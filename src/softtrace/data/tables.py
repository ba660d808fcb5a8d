"""Rows of Parquet files and of data sets of the hub, by the libraries of ``softtrace[data]``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from softtrace.data.rows import COLUMNS, OTHER_COLUMNS
from softtrace.errors import DataError
from softtrace.libraries import first_line

HUB_FORM = "hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]"
_HUB = re.compile(r"hf:/{1,2}(?:datasets/(.*))?", re.DOTALL)  # a Path makes one stroke of two


class HubDataset(NamedTuple):
    """A data set of the hub.

    Attributes:
        name: ``OWNER/NAME``.
        config: one of its configurations; None for the only or the default one.
        split: such as ``train`` or ``train[:1000]``.
    """

    name: str
    config: str | None
    split: str

    @property
    def label(self) -> str:
        """What names of its documents begin with."""
        return f"{'/'.join(filter(None, (self.name, self.config)))}:{self.split}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Its rows, one at a time; ``datasets`` downloads them once and keeps them in its cache.

        Raises:
            DataError: no such data set, configuration or split, or it cannot be had from here.
        """
        datasets = _datasets(f"hf://datasets/{self.label}")
        try:
            found = datasets.load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # of the hub, of the network and of formats: many unrelated ones
            raise DataError(
                f"hf://datasets/{self.label}: cannot be loaded ({type(error).__name__}: "
                f"{first_line(error)}). Check owner, name, configuration and split on its page of "
                "the hub."
            ) from error
        for row in found.select_columns(_wanted(found.column_names)):
            yield {key: _without_nulls(value) for key, value in row.items()}


def hub_dataset(path: str | os.PathLike[str]) -> HubDataset | None:
    """The data set of the hub that a path names, or None for the path of a file or folder.

    Only ``hf://`` leads to the hub: a misspelt path is never looked up there.

    Raises:
        DataError: it begins with ``hf://`` and is not of the form ``HUB_FORM``.
    """
    match = _HUB.fullmatch(os.fspath(path))
    if match is None:
        return None
    name, _, split = (match.group(1) or "").partition(":")
    parts = name.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise DataError(
            f"{os.fspath(path)}: a data set of the hub is written {HUB_FORM}, such as "
            "hf://datasets/HuggingFaceH4/ultrachat_200k:train_sft; without a split it is 'train'."
        )
    return HubDataset("/".join(parts[:2]), parts[2] if parts[2:] else None, split or "train")


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, read batch by batch; of the columns those that are known.

    Raises:
        DataError: it cannot be read, or the libraries to read it with are missing.
    """
    datasets = _datasets(f"{path}")
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = _wanted(file.schema_arrow.names)
            schema = arrow.schema(
                [file.schema_arrow.field(name) for name in columns], file.schema_arrow.metadata
            )
            features = datasets.Features.from_arrow_schema(schema)
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for row in map(features.decode_example, batch.to_pylist()):
                    yield {key: _without_nulls(value) for key, value in row.items()}
    except (OSError, arrow.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet ({error}). Was a copy cut short?"
        ) from error


_ROWS = 1000  # that are held at once


def _wanted(columns: list[str]) -> list[str]:
    """The columns that a row is read by; all of them where there is none, for the error to name."""
    return [name for name in columns if name in (*COLUMNS, *OTHER_COLUMNS)] or columns


def _without_nulls(value: Any) -> Any:
    """Without the keys of dicts that are null: Arrow gives every dict the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _datasets(what: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{what}: reading it takes the library datasets ({error}); "
            "install it with pip install datasets"
        ) from error
