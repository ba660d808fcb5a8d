"""What ``at_size.py`` runs, in which order, and what it makes of races."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks.comparison import at_size
from softtrace.files import write_json

RACING = ("plain=plain,0", "fifth=drafting after 0.21, exits 2,0.15")
MODELS = ("plain-0", "drafting-after-0.21,-exits-2-0.15")


class Scripts:
    """Stands for the scripts: notes their words, and what runs at the same time.

    As they do, it writes files that are whole or not there: ``at_size.py`` reads all races that
    are there while others end.
    """

    def __init__(self, out: Path, broken: str = "") -> None:
        self.out, self.broken = out, broken
        self.calls: list[list[str]] = []
        self.begins: list[str] = []
        self.ends: list[str] = []
        self.on_device: dict[str, int] = {}
        self.lock = threading.Condition()

    def __call__(self, words: list[str], *, stdout: Any, check: bool, **others: Any) -> None:
        assert words[:2] == [sys.executable, "-m"]
        script = words[2].rpartition(".")[2]
        part = Path(stdout.name).stem
        with self.lock:
            self.calls.append([script, *words[3:]])
            self.begins.append(part)
            self.lock.notify_all()
        if script == "pretrain":
            (self.out / "model").mkdir()
            write_json(self.out / "model" / "pretrain.json", {})
        if script == "peers":
            self.train(words)
        if script == "decoding":
            self.race(words, part)
        with self.lock:
            self.ends.append(part)

    def train(self, words: list[str]) -> None:
        """Models come one after another, the last when those before it decode already."""
        keep = Path(words[words.index("--keep") + 1])
        for name in MODELS:
            for seed in range(2):
                if (keep / f"{name}-{seed}").exists():
                    continue
                if (name, seed) == (MODELS[-1], 1):
                    with self.lock:  # for as long as it takes, or pytest allows
                        self.lock.wait_for(lambda: "race-cpu-plain-1" in self.begins)
                    if self.broken == "peers":
                        raise subprocess.CalledProcessError(1, words)
                (keep / f"{name}-{seed}").mkdir(parents=True)
                write_json(keep / f"{name}-{seed}" / "kept.json", {})

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
        write_json(words[words.index("--out") + 1], found)
        with self.lock:
            self.on_device[device] -= 1


def call(monkeypatch: pytest.MonkeyPatch, scripts: Scripts) -> None:
    monkeypatch.setattr(at_size.subprocess, "run", scripts)
    words = f"at_size.py --out {scripts.out} --seeds 2 --at-once 2 --devices cuda:0 cuda:1 --racing"
    monkeypatch.setattr(sys, "argv", [*words.split(), *RACING])
    at_size.main()


def test_models_decode_as_they_come_and_on_gpus_when_all_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(tmp_path)
    call(monkeypatch, scripts)
    assert scripts.begins[:2] == ["pretrain", "peers"]
    (peers,) = (each for each in scripts.calls if each[0] == "peers")
    racing = ["plain=0", "drafting after 0.21, exits 2=0.15"]
    methods = [*racing, *at_size.OTHERS]  # what decodes comes first
    assert peers[peers.index("--methods") + 1 :] == methods
    assert "--by-method" in peers
    assert peers[peers.index("--jobs=12") + 1 :][:3] == ["--devices", "cuda:0", "cuda:1"]
    ended = scripts.ends.index("peers")
    assert all("gpu" not in part for part in scripts.ends[:ended])
    on_cpu = [scripts.ends.index(part) for part in scripts.ends if "cpu" in part]
    on_gpu = [scripts.begins.index(part) for part in scripts.begins if "gpu" in part]
    assert max(on_cpu) < min(on_gpu)  # both lists begin with the same parts, in any order
    races = json.loads((tmp_path / "decoding.json").read_text())["races"]
    found = {(race["kind"], race["name"], race["seed"]) for race in races}
    assert found == {(k, n, s) for k in ("gpu", "cpu") for n in ("plain", "fifth") for s in (0, 1)}
    kept = {race[race["name"]]["model"] for race in races if race["seed"] == 1}
    assert kept == {f"{model}-1" for model in MODELS}


def test_what_failed_is_said_and_what_is_there_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(tmp_path, broken="race-cpu-fifth-1")
    with pytest.raises(subprocess.CalledProcessError):
        call(monkeypatch, scripts)
    assert sorted(scripts.ends) == [
        "peers", "pretrain", "race-cpu-fifth-0", "race-cpu-plain-0", "race-cpu-plain-1"
    ]  # fmt: skip
    assert len(json.loads((tmp_path / "decoding.json").read_text())["races"]) == 3
    (tmp_path / "decoding.json").unlink()  # as if killed before it was written
    again = Scripts(tmp_path)
    call(monkeypatch, again)
    assert len(again.ends) == 1 + 1 + 4
    assert not {"pretrain", "race-cpu-plain-0"} & set(again.begins)
    assert json.loads((tmp_path / "decoding.json").read_text())["hardware"] == "a CPU; a GPU"
    (tmp_path / "decoding.json").unlink()
    call(monkeypatch, Scripts(tmp_path))  # nothing left to do but that
    assert len(json.loads((tmp_path / "decoding.json").read_text())["races"]) == 8
    monkeypatch.setattr(at_size, "SIZES", {"layers": 12})
    with pytest.raises(SystemExit, match="is of other arguments"):
        call(monkeypatch, again)


def test_nobody_waits_for_a_model_that_will_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(tmp_path, broken="peers")
    before = set(threading.enumerate())
    with pytest.raises(subprocess.CalledProcessError):
        call(monkeypatch, scripts)
    assert not set(threading.enumerate()) - before
    assert not [part for part in scripts.begins if "gpu" in part or part == "race-cpu-fifth-1"]


def test_a_model_that_was_lost_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, Scripts(tmp_path))
    lost = "models/drafting-after-0.21,-exits-2-0.15-1/kept.json"
    (tmp_path / lost).unlink()
    (tmp_path / "races" / "gpu-fifth-1.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"exits-2-0\.15-1 has no kept\.json"):
        call(monkeypatch, Scripts(tmp_path))
