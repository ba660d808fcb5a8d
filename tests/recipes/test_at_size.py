"""What ``at_size.py`` runs, in which order, and what it makes of races."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
RACING = ("plain=plain,0", "fifth=drafting after 0.21, exits 2,0.15")


@pytest.fixture
def at_size(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("at_size")


class Scripts:
    """Stands for the scripts: notes their words, and what runs at the same time."""

    def __init__(self, out: Path, broken: str = "") -> None:
        self.out, self.broken = out, broken
        self.calls: list[list[str]] = []
        self.begins: list[str] = []
        self.ends: list[str] = []
        self.on_device: dict[str, int] = {}
        self.lock = threading.Lock()

    def __call__(self, words: list[str], *, stdout: Any, check: bool, **others: Any) -> None:
        script = Path(words[1]).stem
        with self.lock:
            self.calls.append([script, *words[2:]])
            part = Path(stdout.name).stem
            self.begins.append(part)
        if script == "pretrain":
            (self.out / "model").mkdir()
            (self.out / "model" / "pretrain.json").write_text("{}")
        if script == "decoding":
            self.race(words, part)
        with self.lock:
            self.ends.append(part)

    def race(self, words: list[str], part: str) -> None:
        (device,) = (word.partition("=")[2] for word in words if word.startswith("--device="))
        with self.lock:
            self.on_device[device] = self.on_device.get(device, 0) + 1
            assert device == "cpu" or self.on_device[device] == 1
        if part == self.broken:
            raise subprocess.CalledProcessError(1, words)
        name, _, model = words[words.index("--penalty") + 1].partition("=")
        found = {
            name: {"model": Path(model).name},
            "created": f"2026-11-2{len(self.ends) % 10}",
            "versions": {"torch": "2"},
            "hardware": "a CPU" if device == "cpu" else "a GPU",
        }
        Path(words[words.index("--out") + 1]).write_text(json.dumps(found))
        with self.lock:
            self.on_device[device] -= 1


def call(at_size: Any, monkeypatch: pytest.MonkeyPatch, scripts: Scripts) -> None:
    monkeypatch.setattr(at_size.subprocess, "run", scripts)
    words = f"at_size.py --out {scripts.out} --seeds 2 --at-once 2 --devices cuda:0 cuda:1 --racing"
    monkeypatch.setattr(sys, "argv", [*words.split(), *RACING])
    at_size.main()


def test_models_decode_on_free_devices_and_the_rest_is_trained_afterwards(
    at_size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(tmp_path)
    call(at_size, monkeypatch, scripts)
    assert [each[0] for each in scripts.calls][:2] == ["pretrain", "peers"]
    first, others = (each for each in scripts.calls if each[0] == "peers")
    assert first[first.index("--methods") + 1 :] == ["drafting after 0.21, exits 2=0.15"]
    assert others[others.index("--methods") + 1 :] == list(at_size.OTHERS)
    assert first[first.index("--jobs=12") + 1 :][:3] == ["--devices", "cuda:0", "cuda:1"]
    where = {k: [i for i, part in enumerate(scripts.begins) if k in part] for k in ("gpu", "cpu")}
    assert max(where["gpu"]) < min(where["cpu"])  # alone on the machine
    assert max(where["gpu"]) < scripts.begins.index("others")
    races = json.loads((tmp_path / "decoding.json").read_text())["races"]
    found = {(race["kind"], race["name"], race["seed"]) for race in races}
    assert found == {(k, n, s) for k in ("gpu", "cpu") for n in ("plain", "fifth") for s in (0, 1)}
    kept = {race[race["name"]]["model"] for race in races if race["seed"] == 1}
    assert kept == {"plain-0-1", "drafting-after-0.21,-exits-2-0.15-1"}


def test_what_failed_is_said_and_what_is_there_is_not_done_again(
    at_size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(tmp_path, broken="race-cpu-fifth-1")
    with pytest.raises(subprocess.CalledProcessError):
        call(at_size, monkeypatch, scripts)
    assert len(scripts.ends) == 1 + 2 + 7  # all the others
    assert not (tmp_path / "decoding.json").exists()
    again = Scripts(tmp_path)
    call(at_size, monkeypatch, again)
    assert sorted(again.ends) == ["others", "peers", "race-cpu-fifth-1"]
    assert json.loads((tmp_path / "decoding.json").read_text())["hardware"] == "a CPU; a GPU"
    monkeypatch.setattr(at_size, "SIZES", {"layers": 12})
    with pytest.raises(SystemExit, match="is of other arguments"):
        call(at_size, monkeypatch, again)
