"""Quantised weights: torchao's int8, and bitsandbytes where it runs, by what they multiply with.

The two libraries slow every import of transformers down and write to stderr, so they are not part
of the environment that people get: `make test-all` installs them beside it for this file.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import softtrace
from softtrace.errors import UnsupportedModelError
from tests.anatomy.test_adapters import assert_written_out, importance_of
from tests.support.zoo import tiny

pytestmark = [
    pytest.mark.quantised,
    # torchao and bitsandbytes warn on a machine without an accelerator
    pytest.mark.filterwarnings("default"),
]


def test_int8_weights_of_torchao() -> None:
    torchao = importlib.import_module("torchao.quantization")

    def quantise(model: Any) -> None:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())

    assert_written_out(tiny("llama", hidden_size=64, head_dim=16), quantise)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_through_the_module(bits: int, tmp_path: Path) -> None:
    """Within the rounding of bfloat16; in float32 it is refused where it computes more coarsely.

    In 4 bits that is a matter of the processor: with bfloat16 instructions, bitsandbytes uses them.
    """
    original: Any = tiny("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    original.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def load(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
        )

    model = load(torch.bfloat16)
    anatomy = softtrace.attach(model).anatomy
    found = anatomy.output_weight(0).flatten(0, 1).float()
    projection = model.model.layers[0].self_attn.o_proj
    probe = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    applied = projection(probe).float()
    assert (probe.float() @ found - applied).norm() < 0.02 * applied.norm()
    original = original.model.layers[0].self_attn.o_proj.weight.T
    assert (found - original).norm() < (0.15 if bits == 4 else 0.02) * original.norm()
    assert importance_of(model).layers[0].attention.isfinite().all()
    exact = load(torch.float32)
    projection = exact.model.layers[0].self_attn.o_proj
    try:
        softtrace.attach(exact)
        refusal = ""
    except UnsupportedModelError as error:
        refusal = str(error)
    if refusal:
        assert "o_proj is not affine" in refusal
        return
    assert bits == 4
    applied = projection(probe.float())
    found = softtrace.attach(exact).anatomy.output_weight(0).flatten(0, 1)
    assert (probe.float() @ found - applied).norm() < 1e-5 * applied.norm()
