"""``softtrace inspect``, ``evaluate`` and a step of training, from end to end, for each pattern."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import softtrace
from softtrace.anatomy.patterns import Evidence, name_of
from softtrace.cli import main
from softtrace.model.loading import load_model
from tests.support.corpus import byte_tokenizer, write_tree
from tests.support.zoo import VERIFIED, tiny

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("undrawn")]

#: pattern -> a case of the zoo that has it
CASES = {
    "sequential pre-norm": "qwen3",
    "parallel residual": "phi",
    "post-norm": "olmo2",
    "sandwich norm": "gemma2",
    "sequential pre-norm, residual multiplier": "granite",
    "sandwich norm, residual multiplier": "hyperclovax",
    "sequential pre-norm, residual added inside the sub-module": "bloom",
    "sequential pre-norm, no MLP module": "opt",
}
BY_SOFTMAX = {"parallel residual": "falcon, new layout"}
EXPERTS = {"sequential pre-norm": "mixtral"}
ALL = [*CASES.items(), *BY_SOFTMAX.items(), *EXPERTS.items()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tree(tmp_path_factory.mktemp("text")))


def saved(case: str, folder: Path) -> str:
    kind, changes = VERIFIED[case]
    special = {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": 256}
    tiny(kind, **{**changes, **special}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_every_layout_and_trait_has_a_case() -> None:
    named = ", ".join(CASES)
    every = (Evidence(*each) for each in itertools.product((True, False), repeat=6))
    names = {name for evidence in every for name in name_of(evidence).split(", ")}
    assert len(names) == 8
    for name in names:
        assert name in named or name == "sequential without norms"


@pytest.mark.parametrize(("pattern", "case"), ALL, ids=lambda each: str(each))
def test_inspect_and_evaluate(
    pattern: str, case: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(case, tmp_path / "model")
    assert main(["inspect", model, "--length", "9", "--json", "true"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["pattern"] == pattern
    assert all(each["mismatch"] <= each["allowed"] for each in found["verified"].values())
    layers, heads = found["model"]["layers"], found["model"]["heads"]
    nodes = 9 * (layers - 1) + 1  # of one kind that can reach the last token
    parallel = pattern.startswith("parallel")
    assert found["edges"]["mlp"] == found["edges"]["attention_residual"] == nodes
    assert found["edges"]["mlp_residual"] == (0 if parallel else nodes)
    assert found["edges"]["attention"] == heads * (45 * (layers - 1) + 9)
    assert main(["inspect", model]) == 0
    shown = capsys.readouterr().out
    assert pattern in shown
    assert "verified on tiny batches, largest mismatch" in shown
    assert max(len(line) for line in shown.splitlines()) <= 120

    out = tmp_path / "out"
    options = ["--block_size", "16", "--blocks", "2", "--extra_blocks", "1", "--device", "cpu"]
    assert main(["evaluate", "--model", model, "--data", text, "--out", str(out), *options]) == 0
    density = json.loads((out / "density.json").read_text())
    assert density["model"]["pattern"] == pattern
    assert 0 < density["area"]["all"] < 1
    assert 0 < density["size_at_tv_0.2"]["easy"] <= 1
    network = load_model(model)
    with torch.no_grad():
        own = network(torch.arange(12)[None]).logits
        ours = softtrace.attach(network).record(
            softtrace.attach(network).batch(torch.arange(12)[None]), keep_hidden=True
        )
    assert ours.hidden is not None
    torch.testing.assert_close(ours.logits, own, atol=1e-4, rtol=1e-4)
    agreement = density["early_exit"]["layers"][-1]
    assert agreement["all"] == 1.0 if isinstance(agreement, dict) else agreement == layers


@pytest.mark.parametrize(("pattern", "case"), ALL, ids=lambda each: str(each))
def test_training_with_the_term_alone_makes_it_smaller(pattern: str, case: str) -> None:
    """Ten steps on one batch, with weights that a few steps can move."""
    kind, changes = VERIFIED[case]
    model = tiny(kind, **changes).train()
    ids = torch.randint(3, 67, (4, 10), generator=torch.Generator().manual_seed(0))
    penalty = softtrace.DensityLoss(model, strength=1.0, share=1.0, easy_quantile=1.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = penalty(ids, step=0).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(math.isfinite(each) for each in losses)
    assert losses[-1] < 0.9 * losses[0]
