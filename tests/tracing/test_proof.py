"""The attach-time proof: models that are the sum of their edges pass."""

from __future__ import annotations

import pytest
import torch
import transformers

import softtrace
from softtrace.anatomy import decomposition
from softtrace.errors import UnsupportedModelError
from tests.support.altered import built, changed, odd_layer, two_results
from tests.support.tiny import COMMON, FAMILIES, GROUPED, tiny_model, tiny_prompt
from tests.support.zoo import tiny

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_pre_norm_models_pass_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    for seed, layers in enumerate((3, 3, 12)):
        model = tiny_model(family, seed=seed, num_hidden_layers=layers).to(dtype)
        instrument = softtrace.attach(model)
        assert instrument.anatomy.pattern == "sequential pre-norm"
        assert len(instrument.anatomy.layers) == layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_surroundings_of_attach_play_no_part(family: str) -> None:
    """Autocast rounds and a default device moves what is made without one; gradients are on."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        softtrace.attach(tiny_model(family))
        with pytest.raises(UnsupportedModelError):
            softtrace.attach(odd_layer(1, 1, 1, 0.999))
    model, ids = tiny_model(family, seed=1), tiny_prompt(5)
    with torch.device("meta"):
        softtrace.attach(model)
        term = softtrace.DensityLoss(model)(ids, step=0)
    assert term.loss.device.type == "cpu"
    assert term == softtrace.DensityLoss(model)(ids, step=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("stem", ["Phi3", "Granite", "Starcoder2"])
def test_models_of_the_same_layout_pass_without_being_on_a_list(stem: str) -> None:
    config = getattr(transformers, f"{stem}Config")(**{**COMMON, **GROUPED, "num_hidden_layers": 2})
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    ids = tiny_prompt(6)
    with torch.no_grad():
        recording = softtrace.attach(model).record(softtrace.attach(model).batch(ids))
        torch.testing.assert_close(recording.logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_odd_layer_without_factors_passes() -> None:
    model = odd_layer(1, 1, 1, 1)
    softtrace.attach(model)


def test_projections_that_values_need_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong guess of what nobody reads costs time, never a wrong number."""
    usual = softtrace.attach(tiny_model("llama")).anatomy.layers[0].score_projections
    assert len(usual) == 2
    monkeypatch.setattr(decomposition, "_SCORES", ("q_proj", "v_proj"))
    instrument = softtrace.attach(tiny_model("llama"))
    assert all(modules.score_projections == () for modules in instrument.anatomy.layers)


def test_an_mlp_that_also_returns_its_routing_passes() -> None:
    model, other, ids = changed(two_results)(), tiny_model("llama"), tiny_prompt(6)
    found, expected = (softtrace.density_curve(each, ids) for each in (model, other))
    torch.testing.assert_close(found.total_variation, expected.total_variation)


def test_multipliers_are_found_by_what_adds_up() -> None:
    """Granite scales embeddings, attention, residuals and logits."""
    scales = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 4.0}
    model = built("Granite", num_key_value_heads=2, residual_multiplier=0.3, **scales)()
    ids = tiny_prompt(5)
    with torch.no_grad():
        instrument = softtrace.attach(model)
        recording = instrument.record(instrument.batch(ids))
        torch.testing.assert_close(recording.logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    found = instrument.anatomy.layers[0]
    assert (found.attention_scale, found.mlp_scale) == (0.3, 0.3)
    assert instrument.anatomy.readout.after.field == "logits_scaling"


def test_a_cap_far_above_the_logits_is_found_in_half_precision() -> None:
    """The logits without it are within what is allowed, too."""
    model, ids = tiny("gemma2", dtype=torch.bfloat16), tiny_prompt(8)
    instrument = softtrace.attach(model)
    assert instrument.anatomy.readout.after.field == "final_logit_softcapping"
    with torch.no_grad():
        batch = instrument.batch(ids)
        every, chosen = (instrument.record(batch, positions=p) for p in (None, batch.valid))
    torch.testing.assert_close(chosen.logits, every.logits[0], atol=0, rtol=0)


def test_what_is_predicted_may_be_fewer_tokens_than_are_read() -> None:
    model = tiny_model("llama")
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    model.lm_head = torch.nn.Linear(32, rows - 7, bias=False)
    anatomy = softtrace.attach(model).anatomy
    assert (anatomy.vocabulary, anatomy.readout.predicted) == (rows, rows - 7)
