"""The script that runs ``softtrace fit`` with configurations for several GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.benchmarks.speed import fitted
from tests.support import warm
from tests.support.corpus import write_model
from tests.support.processes import script_environment

pytestmark = pytest.mark.thorough


def test_a_configuration_for_two_gpus_fits_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], check: bool) -> Any:
        return warm.run(command, env=script_environment(), check=check)

    monkeypatch.setattr(fitted.subprocess, "run", run)
    monkeypatch.setitem(fitted.TINY, "vocab_size", 500)
    out = tmp_path / "fitted.json"
    options = ["--tiny", "--steps", "2", "--configs", "llama-3.1-8b-2gpus", "--out", str(out)]
    tokenizer = write_model(tmp_path / "tokenizer")
    monkeypatch.setattr("sys.argv", ["fitted", *options, "--tokenizer", str(tokenizer)])
    fitted.main()
    found = json.loads(out.read_text(encoding="utf-8"))["configs"]["llama-3.1-8b-2gpus"]
    assert (found["steps"], found["whole"], found["peak GB"]) == (2, True, None)


def test_a_model_that_lacks_a_weight_is_not_whole(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    before = fitted.weights_of(model)
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name].to(torch.float64)}, model / "model.safetensors")
    assert fitted.weights_of(model).keys() == before.keys()
    assert fitted.weights_of(model) != before
    del weights[name]
    save_file(weights, model / "model.safetensors")
    assert before.keys() - fitted.weights_of(model).keys() == {name}


def test_the_highest_of_a_log_is_found_by_the_end_of_its_column(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,Monitor/bytes.peak,bytes\n0,5.0,\n1,,9.0\n2,7.0,\n", encoding="utf-8")
    assert fitted.highest(log, "bytes.peak") == 7.0
    assert fitted.highest(log, "step") == 2.0
    assert fitted.highest(log, "nothing") is None
