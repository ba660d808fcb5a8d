"""Saving models that were fine-tuned, where nothing else is wanted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recipes.benchmarks.comparison import on_real_models
from recipes.benchmarks.places import TRAINED
from softtrace.model.loading import load_model
from tests.support.corpus import write_model

NAME, RUN = "smollm2-135m", "smollm2-135m-prose-plain-0-full-2-steps-seed-0"


def test_a_model_is_saved_with_its_loss_and_no_run_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / NAME)
    for file in base.glob("tokenizer*"):  # as on a machine that has weights alone
        file.unlink()
    runs = tmp_path / "runs"
    runs.mkdir()
    monkeypatch.setattr(on_real_models, "RUNS", runs)
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, 60, (40, 16), generator=draw, dtype=torch.int32)
    sides = {"train": blocks[:32], "held_out": blocks[32:]}
    save_file(sides, runs / f"{NAME} prose.safetensors", {"copied": "0.0"})
    command = [
        "on_real_models", "train", "--folder", str(tmp_path), "--models", NAME, "--texts", "prose",
        "--ways", "plain", "--steps", "2", "--seeds", "1", "--measure", "loss",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):  # nothing would be left
        on_real_models.main()
    monkeypatch.setattr(sys, "argv", [*command, "--save", str(tmp_path / "saved")])
    on_real_models.main()
    beside = tmp_path / "saved" / RUN / TRAINED
    found = json.loads(beside.read_text(encoding="utf-8"))
    assert found["loss"] == pytest.approx(found["held_out_losses"]["2"])
    assert not {"64 recorded", "tasks", "side_effects"} & {*found}
    assert [path.suffix for path in runs.iterdir()] == [".safetensors"]
    assert not any(beside.parent.glob("tokenizer*"))
    saved = load_model(beside.parent)
    ids = blocks[:1].long()
    with torch.no_grad():
        assert not torch.equal(saved(input_ids=ids).logits, load_model(base)(input_ids=ids).logits)  # type: ignore[operator]
    before = beside.stat().st_mtime_ns
    on_real_models.main()  # it is there
    assert beside.stat().st_mtime_ns == before


def test_all_makes_the_tokens_that_are_missing_trains_and_summarises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    (tmp_path / f"{NAME} tasks.safetensors").touch()
    monkeypatch.setattr(on_real_models, "RUNS", tmp_path)
    monkeypatch.setattr(on_real_models, "make_tokens", lambda *args: done.append(args[3]))
    monkeypatch.setattr(on_real_models, "summarise_runs", lambda _: done.append("summary"))
    monkeypatch.setattr(sys, "argv", ["on_real_models", "all", "--ways", "plain", "--seeds", "1"])
    on_real_models.main()  # there are no blocks to train on
    assert done == [["gemma3-270m"], "summary"]


def test_nothing_is_trained_on_blocks_that_do_not_say_what_they_have_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"train": torch.ones(1, 8)}, tmp_path / f"{NAME} prose.safetensors")
    monkeypatch.setattr(on_real_models, "RUNS", tmp_path)
    monkeypatch.setattr(on_real_models, "load_model", lambda *_: pytest.fail("was loaded"))
    command = ["on_real_models", "train", "--models", NAME, "--texts", "prose", "--ways", "plain"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="make its tokens anew"):
        on_real_models.main()
