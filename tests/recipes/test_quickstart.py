"""The quickstart from end to end, with a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_writes_what_it_says(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "recipes" / "quickstart.py", "--out", tmp_path / "out"]
    command += ["--steps", "2", "--blocks", "2", "--keep", tmp_path / "kept"]
    for name in ("plain", "compare"):  # of an earlier run, which this one replaces
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "density.json").write_text("old")
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
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
