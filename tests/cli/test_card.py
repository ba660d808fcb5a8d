"""``softtrace card``."""

from __future__ import annotations

from pathlib import Path

import pytest

from softtrace.cli import main
from tests.support.densities import synthetic_density, write_run


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_run(tmp_path / "a", synthetic_density())
    own = write_run(tmp_path / "b", synthetic_density("penalty", 0.5))
    model = tmp_path / "model"
    words = ["card", "--model", str(model), "--density", str(own), "--base", str(base.parent)]
    assert main(words) == 1
    assert "no such directory" in capsys.readouterr().err
    model.mkdir()
    assert main(words) == 1  # such as the folder that models lie in, which has a README of its own
    assert "found no config.json" in capsys.readouterr().err
    assert not (model / "README.md").exists()
    (model / "config.json").touch()
    assert main(words) == 0
    assert "| 0.300 | 0.150 |" in (model / "README.md").read_text()
    bounds = {"area_easy": [0.125, 0.175], "loss_all": [None, None]}
    write_run(tmp_path / "b", {**synthetic_density("penalty", 0.5), "intervals": bounds})
    assert main(words) == 0
    assert "| 0.300 | 0.150 (0.125 to 0.175) |" in (model / "README.md").read_text()
    assert "| lower | 3.000 | 3.000 |" in (model / "README.md").read_text()
    other = synthetic_density()
    other["data"]["sha256"] = "f" * 64
    write_run(tmp_path / "a", other)
    assert main(words) == 1
    assert "these runs cannot be compared" in capsys.readouterr().err
