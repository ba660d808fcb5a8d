"""Real models are taken apart, and what is recorded of them has their own losses."""

from __future__ import annotations

import json

import pytest
import torch

from softtrace.cli import main
from softtrace.data import pack
from softtrace.density.easiness import loss_score
from softtrace.tracing.attach import attach
from tests.support.real import (
    GEMMA,
    LONG,
    SMOLLM,
    documents,
    every_model,
    place,
    real_model,
    real_tokenizer,
)

pytestmark = pytest.mark.real

SIZES = {SMOLLM: (30, 134_515_008), GEMMA: (18, 268_098_176)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(SMOLLM, "float32"), (GEMMA, "float32"), (GEMMA, "bfloat16")],  # SmolLM's is evaluated too
)
def test_inspect_proves_them(name: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", place(name), "--dtype", dtype, "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers, parameters = SIZES[name]
    assert (found["model"]["layers"], found["model"]["parameters"]) == (layers, parameters)
    assert found["model"]["dtype"] == dtype
    assert all(each["mismatch"] <= each["allowed"] for each in found["verified"].values())
    norms = {modules[1] for modules in (each["modules"] for each in found["layers"])}
    assert len(norms) == 1  # every layer is laid out alike


@every_model
def test_a_recording_has_the_losses_of_the_plain_model(name: str) -> None:
    model = real_model(name, "float32")
    instrument = attach(model)
    for length in (64, LONG):
        blocks = pack(documents(), real_tokenizer(name), length)[:1]
        with torch.no_grad():
            batch = instrument.batch(blocks)
            recording = instrument.record(batch, keep_attention=False)
            wanted = model(input_ids=blocks, labels=blocks).loss
        losses = loss_score(recording.logits, batch.targets)[0, :-1]
        assert float(losses.mean()) == pytest.approx(float(wanted), abs=1e-4), length
        assert 1 < float(wanted) < 8  # a model that was put together wrongly knows nothing: log V
