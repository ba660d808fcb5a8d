"""Real models are taken apart and measured by the command line, and the losses are their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from softtrace.cli import main
from softtrace.data import pack
from softtrace.data.blocks import evenly
from softtrace.density.easiness import loss_score
from softtrace.tracing.attach import attach
from tests.support.real import (
    DTYPES,
    GEMMA,
    LONG,
    SMOLLM,
    TEXT,
    documents,
    every_dtype,
    every_model,
    place,
    real_model,
    real_tokenizer,
)

pytestmark = pytest.mark.real

#: of a token, in nats; one rounding of a logit in bfloat16 is a tenth
ALLOWED = {"float32": 1e-4, "bfloat16": 0.3}
SIZES = {SMOLLM: (30, 134_515_008), GEMMA: (18, 268_098_176)}


@every_dtype
@every_model
def test_inspect_proves_them(name: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", place(name), "--dtype", dtype, "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers, parameters = SIZES[name]
    assert (found["model"]["layers"], found["model"]["parameters"]) == (layers, parameters)
    assert found["model"]["dtype"] == dtype
    assert all(each["mismatch"] <= each["allowed"] for each in found["verified"].values())
    norms = {modules[1] for modules in (each["modules"] for each in found["layers"])}
    assert len(norms) == 1  # every layer is laid out alike


@pytest.mark.parametrize(
    ("name", "dtype", "block_size"),
    [
        *((SMOLLM, dtype, 64) for dtype in DTYPES),
        (GEMMA, "float32", 16),  # a vocabulary of 262,144 is read some eighty times a token
    ],
)
def test_evaluate_writes_the_losses_of_the_plain_model(
    name: str, dtype: str, block_size: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = {
        "model": place(name), "data": TEXT, "out": out, "block_size": block_size, "blocks": 2,
        "extra_blocks": 0, "dtype": dtype, "device": "cpu", "per_token": "true",
    }  # fmt: skip
    assert main(["evaluate", *(f"--{key}={value}" for key, value in words.items())]) == 0
    blocks = evenly(pack(documents(), real_tokenizer(name), block_size), 2)
    with torch.no_grad():
        logs = real_model(name, dtype)(input_ids=blocks).logits.float().log_softmax(-1)
    lines = [json.loads(line) for line in (out / "tokens.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 2 * (block_size // 2 - 1)
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


@pytest.mark.parametrize("length", [64, LONG])
@every_model
def test_a_recording_has_the_losses_of_the_plain_model(name: str, length: int) -> None:
    model = real_model(name, "float32")
    blocks = pack(documents(), real_tokenizer(name), length)[:1]
    instrument = attach(model)
    with torch.no_grad():
        batch = instrument.batch(blocks)
        recording = instrument.record(batch, keep_attention=False)
        wanted = model(input_ids=blocks, labels=blocks).loss
    losses = loss_score(recording.logits, batch.targets)[0, :-1]
    assert float(losses.mean()) == pytest.approx(float(wanted), abs=1e-4)
    assert 1 < float(wanted) < 8  # a model that was put together wrongly knows nothing: log V
