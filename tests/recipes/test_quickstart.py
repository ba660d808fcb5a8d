"""The quickstart from end to end, with a few steps."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from tests.support import warm

ROOT = Path(__file__).resolve().parents[2]


def run_on_short_blocks(command: list[str], **options: Any) -> Any:
    """The very command, but for how long blocks are; what it says last holds."""
    prefix = {"fit": "--data.", "evaluate": "--"}.get(command[3])
    short = [] if prefix is None else [f"{prefix}block_size", "24"]
    return warm.run([*command, *short], **options)


@pytest.mark.slow
def test_quickstart_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "2", "--blocks", "2", "--keep", tmp_path / "kept")
    command = ["quickstart.py", "--out", tmp_path / "out", *options]
    for name in ("plain", "compare"):  # of an earlier run, which this one replaces
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "density.json").write_text("old")
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    monkeypatch.setattr(subprocess, "run", run_on_short_blocks)
    # A thirtieth of its text, which is tokenised four times.
    part = Path(matplotlib.__file__).parent / "tri"
    monkeypatch.setattr(matplotlib, "__file__", str(part / "__init__.py"))
    runpy.run_path(str(ROOT / "recipes" / "quickstart.py"), run_name="__main__")
    output = capfd.readouterr().out
    assert not (tmp_path / "out" / "compare" / "density.json").exists()
    assert "area under distortion" in output
    for name in ("plain", "penalty"):
        density = json.loads((tmp_path / "out" / name / "density.json").read_text())
        assert density["data"]["split"] == "held out, share 0.1"
        assert density["command"].startswith("softtrace evaluate --model")
    plain, penalty = (
        json.loads((tmp_path / "out" / name / "density.json").read_text())
        for name in ("plain", "penalty")
    )
    assert plain["data"] == penalty["data"]
    assert plain["area"] != penalty["area"]
    assert len(list((tmp_path / "kept").iterdir())) == 4
