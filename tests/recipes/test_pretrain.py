"""The recipe of the shipped model, with a few steps, and what it left in the repository."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest
import transformers

from recipes.benchmarks.places import MODEL as SHIPPED
from recipes.benchmarks.places import ROOT
from softtrace.data import read_documents, split_by_file
from softtrace.errors import OutputExistsError
from softtrace.model.loading import load_model, load_tokenizer
from tests.support import warm


@pytest.mark.slow
def test_a_short_run_writes_all_that_the_card_says(tmp_path: Path) -> None:
    text, output = Path(sysconfig.get_paths()["stdlib"]) / "xml", tmp_path / "model"
    command = [sys.executable, "-m", "recipes.benchmarks.comparison.pretrain"]
    command += ["--data", text, "--output", output]
    command += ["--steps", "3", "--batch-size", "4", "--block-size", "32", "--warmup-steps", "1"]
    command += ["--eval-every", "2", "--eval-blocks", "4", "--device", "cpu"]
    command += ["--layers", "3", "--hidden-size", "96", "--heads", "3", "--kv-heads", "1"]
    command += ["--vocabulary", "512"]
    done = warm.run(command, cwd=ROOT, check=True, capture_output=True)
    said = done.stdout
    assert "held-out loss of the saved weights" in said
    facts = json.loads((output / "pretrain.json").read_text(encoding="utf-8"))
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"{facts['held_out_nats_per_token']:.4f} nats/token" in card
    assert facts["command"] in card
    assert str(tmp_path) not in card
    model = load_model(output)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert len(load_tokenizer(output)) == facts["vocabulary"] == model.config.vocab_size == 512
    assert model.config.intermediate_size == 256
    assert "3 layers of width\n96, 3 heads, 1 key/value heads" in card
    held_out = {
        document.name for document in split_by_file(read_documents(text), 0.05, "pystdlib")[1]
    }
    assert set((output / "held_out_files.txt").read_text().split()) == held_out
    again = warm.run(command, cwd=ROOT, capture_output=True)
    assert again.returncode != 0
    assert OutputExistsError.__name__ in again.stderr


def test_the_shipped_model_is_what_its_card_says() -> None:
    facts = json.loads((SHIPPED / "pretrain.json").read_text(encoding="utf-8"))
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    model = load_model(SHIPPED)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert 3_000_000 <= facts["parameters"] <= 6_000_000
    assert (SHIPPED / "model.safetensors").stat().st_size <= 10_000_000
    assert f"{facts['held_out_nats_per_token']:.4f} nats/token" in card
    names = (SHIPPED / "held_out_files.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(names) == facts["held_out"]["documents"]
    assert "held_out_files.txt" in card
