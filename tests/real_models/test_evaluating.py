"""Real models are measured by the command line, and the losses are those of the plain models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from softtrace.cli import main
from softtrace.data import pack
from softtrace.data.blocks import evenly
from tests.support.real import GEMMA, SMOLLM, TEXT, documents, place, real_model, real_tokenizer

pytestmark = pytest.mark.real

#: of a token, in nats; one rounding of a logit in bfloat16 is a tenth
ALLOWED = {"float32": 1e-4, "bfloat16": 0.3}


@pytest.mark.parametrize(
    ("name", "dtype", "block_size", "positions", "count"),
    [
        (SMOLLM, "float32", 16, 4, 2),
        (SMOLLM, "bfloat16", 8, 2, 1),  # a CPU may multiply it at an eighth of the speed of float32
        (GEMMA, "float32", 8, 2, 1),  # a vocabulary of 262,144 is read some eighty times a token
    ],
)
def test_evaluate_writes_the_losses_of_the_plain_model(
    name: str, dtype: str, block_size: int, positions: int, count: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = {
        "model": place(name), "data": TEXT, "out": out, "dtype": dtype, "device": "cpu",
        "block_size": block_size, "positions": positions, "blocks": count, "extra_blocks": 0,
        "per_token": "true",
    }  # fmt: skip
    assert main(["evaluate", *(f"--{key}={value}" for key, value in words.items())]) == 0
    blocks = evenly(pack(documents(), real_tokenizer(name), block_size), count)
    with torch.no_grad():
        logs = real_model(name, dtype)(input_ids=blocks).logits.float().log_softmax(-1)
    lines = [json.loads(line) for line in (out / "tokens.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == count * positions
    wanted = []
    for line in lines:
        row, at = line["sequence"], line["position"]
        assert [line["token_id"], line["next_id"]] == blocks[row, at : at + 2].tolist()
        wanted.append(-float(logs[row, at, line["next_id"]]))
    assert [line["loss"] for line in lines] == pytest.approx(wanted, abs=ALLOWED[dtype])
    density = json.loads((out / "density.json").read_text("utf-8"))
    mean = sum(wanted) / len(wanted)
    assert density["loss_nats"]["all"] == pytest.approx(mean, abs=ALLOWED[dtype] / 3)
    assert 0 < density["size_at_tv_0.2"]["easy"] < 1
    assert (out / "report.html").stat().st_size > 10_000
