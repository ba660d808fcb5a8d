"""``softtrace evaluate`` and ``study`` of a model whose layers are on several devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softtrace.cli.evaluate import evaluate
from softtrace.cli.study import StudySource, study
from softtrace.data.text_source import TextSource
from softtrace.evaluation.run_options import RunOptions
from softtrace.model import loading
from tests.support.corpus import write_model, write_tree
from tests.support.fake_devices import fake_devices, spread
from tests.support.numbers import in_order

# Each operation of a device that is not there goes through Python: a minute for a command.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

OF_BOTH: dict[str, Any] = {"blocks": 2, "batch_size": 2, "device_map": "auto"}


def evaluated(model: str, text: str, out: str, run: RunOptions) -> Any:
    options = {**OF_BOTH, "block_size": 8, "extra_blocks": 1, "run": run}
    return evaluate(model, TextSource(text), out, **options)


def studied(**mode: bool) -> Callable[[str, str, str, RunOptions], Any]:
    options = {**OF_BOTH, **mode, "block_size": 17, "lengths": (4, 8), "targets": 2}

    def found(model: str, text: str, out: str, run: RunOptions) -> Any:
        source = StudySource(text, held_out_share=0.5)
        return study([model], source, out, **options, resamples=20, run=run)["results"]

    return found


COMMANDS = {
    "evaluate": evaluated, "study": studied(), "study, generation": studied(generation=True),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_are_those_of_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """What Accelerate would make of ``--device_map auto`` and two accelerators is made by hand."""
    model, text = str(write_model(tmp_path / "model")), str(write_tree(tmp_path / "text"))
    own = loading.load_model

    def numbers(device: str) -> Any:
        out = str(tmp_path / device.replace(":", ""))
        read = COMMANDS[command](model, text, out, RunOptions(device=device))
        for name in ("created", "command", "seconds"):
            read.pop(name, None)
        return in_order(read)

    expected = numbers("cpu")
    with fake_devices() as (first, second):

        def load(path: Any, **options: Any) -> Any:
            assert options["device_map"] == "auto"
            return spread(own(path), first, second)

        monkeypatch.setattr(loading, "load_model", load)
        found = numbers(first)
    assert len(found) > 50
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
