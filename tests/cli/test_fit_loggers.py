"""One run of ``softtrace fit``, logged to CSV, TensorBoard and W&B offline: the same numbers.

TensorBoard and W&B are not part of the environment that people get, and Lightning chooses another
default logger where TensorBoard is: `make test-all` installs them beside it for this file.
"""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest

from softtrace.cli.fit import fit
from tests.cli.test_fit import arguments
from tests.support.corpus import write_model, write_tree
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.loggers, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text, for runs."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    write_tree(folder / "text")
    return folder


def logged(root: Path, name: str, *options: object) -> Path:
    """The folder of a short run that measures density and validates on its way."""
    more = ("--trainer.log_every_n_steps", 1, "--monitor_every", 2, "--card_blocks", 0)
    validated = ("--trainer.limit_val_batches", 1)
    sources = root / "model", root / "text"
    return fit(arguments(sources, root / name, *more, *validated, *options))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, dict[int, str]]:
    """Values in CSV, as they are written, by name and step."""
    out = logged(root, "csv")
    found: dict[str, dict[int, str]] = {}
    with (out / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, {})[int(row["step"])] = value
    assert {"loss/task", "loss/density", "loss/held_out", "density/area_easy"} <= set(found)
    return found


def test_tensorboard_gets_what_csv_gets(root: Path, expected: dict[str, dict[int, str]]) -> None:
    out = root / "tensorboard"
    logger = (
        "TensorBoardLogger",
        "--trainer.logger.save_dir",
        out,
        "--trainer.logger.name",
        "logs",
    )
    logged(root, out.name, "--trainer.logger", *logger)
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(out / "logs" / "version_0"))
    events.Reload()
    for name, values in expected.items():
        found = {each.step: each.value for each in events.Scalars(name)}
        assert found == pytest.approx({step: float(value) for step, value in values.items()})


def test_wandb_offline_gets_what_csv_gets(
    root: Path, expected: dict[str, dict[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own format has no public reader: names and values stand in it as text."""
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever becomes of the option
    out = root / "wandb"
    logger = ("WandbLogger", "--trainer.logger.save_dir", out, "--trainer.logger.offline", "true")
    logged(root, out.name, "--trainer.logger", *logger)
    importlib.import_module("wandb").finish()
    [kept] = out.glob("wandb/offline-run-*/run-*.wandb")
    wanted = {*expected, *expected["loss/task"].values()}

    def arrived() -> bool:  # a process of W&B's writes it
        written = kept.read_bytes()
        return all(text.encode() in written for text in wanted)

    wait_until(arrived, "names and values in W&B's file")
    assert not (out / "logs").exists()
